"""Measured time: of whole runs under schedules, and of each method's selection."""
