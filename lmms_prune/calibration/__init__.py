"""Offline searches on samples, which some methods need once for each model (``lmms-prune calibrate …``)."""
