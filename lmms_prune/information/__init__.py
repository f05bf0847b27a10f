"""The information of each visual token at each decoder layer (arXiv 2512.07580, section 3)."""
