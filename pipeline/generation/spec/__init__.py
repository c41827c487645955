"""What decides the images: the sampling spec, its output shards, edits. Pure: no storage, no Ray."""
