"""Running moments, and the distance of two Gaussians."""
