"""Removing visual tokens: the hooks, the packed layout, the trace, and the guards."""
