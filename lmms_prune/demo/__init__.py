"""Two small trained models, the world that they know, and miniature benchmarks in it; all without a network."""
