"""diffusers' names for weights and schedulers."""
