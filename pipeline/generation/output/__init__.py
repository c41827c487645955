"""The output prefix: exactly-once commits, what is there, the manifest."""
