"""Console output and pictures of the commands."""
