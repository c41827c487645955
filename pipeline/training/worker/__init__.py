"""A training worker: its loop, its step, its state, and what rank 0 does besides."""
