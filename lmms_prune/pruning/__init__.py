"""Removing visual tokens: the hooks, the packed layout, what happened, and what is refused."""
