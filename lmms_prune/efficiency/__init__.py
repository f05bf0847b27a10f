"""What a schedule costs, from a model's sizes alone: FLOPs and bytes of the key-value cache. Needs no torch."""
