"""From raw medical images to a classifier in clinical use: the science."""

SPINS = {"GOMP_SPINCOUNT": "10000"}
"""Environment of a process that will import torch: how often a waiting thread looks for work before it sleeps.

OpenMP's own count is 300,000. Beside any other busy process, a training step with two threads on two cores then takes
nine times as long, and with ours two and a half times; alone both are about as fast (`python -m benchmarks threads`).
Fewer cost an image that is asked about alone: 3,000 a seventh more, as threads fall asleep between two layers. No bit
of a result changes.
"""
