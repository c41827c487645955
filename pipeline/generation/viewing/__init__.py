"""Generated images for people."""
