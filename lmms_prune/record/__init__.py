"""What is on disk, read by name: regular files, images, YAML, and the results that lmms-eval writes."""
