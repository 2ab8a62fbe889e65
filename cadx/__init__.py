"""From raw medical images to a classifier in clinical use: the science."""

SPINS = {"GOMP_SPINCOUNT": "3000"}
"""Environment of a process that will import torch: how often a waiting thread looks for work before it sleeps.

OpenMP's own count is 300,000. Beside any other busy process, a training step with two threads on two cores then takes
eight times as long, and with ours twice; alone both are about as fast (`python -m benchmarks threads`). No bit of a
result changes.
"""
