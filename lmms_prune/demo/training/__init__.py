"""Trains the demo's two models from scratch: ``python -m lmms_prune.demo.training --help``."""
