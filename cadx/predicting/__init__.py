"""Answers: from a bundle and raw samples to probabilities, decisions and tables of them."""
