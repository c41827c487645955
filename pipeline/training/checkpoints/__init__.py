"""Checkpoints: their files, their records, and what is in them."""
