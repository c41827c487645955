"""Shards made by actors all over a cluster."""
