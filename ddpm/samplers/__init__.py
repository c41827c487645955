"""Samplers, one method per file."""
