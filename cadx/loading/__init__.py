"""A dataset folder as torch sees it: one module per kind of sample."""
