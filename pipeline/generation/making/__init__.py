"""From sample ids to a committed shard, in one process. No Ray."""
