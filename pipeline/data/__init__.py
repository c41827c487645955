"""Datasets: made, verified, ordered, streamed."""
