"""What differs between model families: which modules there are, and how each is captured. One file a family."""
