"""Measured claims: `python -m benchmarks`."""
