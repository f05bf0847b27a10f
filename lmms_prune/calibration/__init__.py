"""Searches that some methods need once for every model: on samples, offline (``lmms-prune calibrate …``)."""
