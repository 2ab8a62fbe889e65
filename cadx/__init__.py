"""From raw medical images to a classifier in clinical use: the science."""
