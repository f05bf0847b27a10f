"""The cost of a schedule from a model's sizes: FLOPs and bytes of the key-value cache. Needs no torch."""
