"""How close two sets of images are, and pictures that show it."""
