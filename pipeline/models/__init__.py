"""Models as files and in the registry."""
