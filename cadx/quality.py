"""What a look at one image can tell of its quality, and which images are copies of each other."""
