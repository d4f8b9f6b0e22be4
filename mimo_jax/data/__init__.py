"""Data: manifests, shard sets of RVQ codes, sequence layouts, packing, and the row loaders that training reads."""
