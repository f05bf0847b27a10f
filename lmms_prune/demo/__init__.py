"""Tiny random checkpoints and miniature benchmarks, built on the spot without a network."""
