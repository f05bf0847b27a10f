"""What each visual token is worth at each decoder layer (arXiv 2512.07580, section 3)."""
