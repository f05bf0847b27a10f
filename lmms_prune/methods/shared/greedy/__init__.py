"""Greedy searches: in plain torch, as one GPU kernel each, and the choice between the two."""
