"""Charts and pictures of the method and of a model."""
