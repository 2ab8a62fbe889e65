"""The door: archives, the handler that answers, TorchServe around it, and the client in front of it."""
