"""Training: the driver, the workers, what they keep."""
