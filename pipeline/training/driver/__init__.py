"""The driver: groups of workers, one after the other, watched and replaced."""
