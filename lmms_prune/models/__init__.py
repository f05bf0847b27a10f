"""The model families: what differs between architectures, and their sizes."""
