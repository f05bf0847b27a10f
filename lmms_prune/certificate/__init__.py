"""The certificate: whether a checkpoint, pruned in every way, does what an independent masked reference does."""
