"""The tables and figures of arXiv 2512.07580 as one chain of this package's commands, and one report page."""
