"""Generation: what to make, making it, committing it once."""
