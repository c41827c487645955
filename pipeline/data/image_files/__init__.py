"""Image files of the world: which formats are read, where the picture is in each, and its colours as grey or RGB."""
