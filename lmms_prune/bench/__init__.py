"""Time measurements: whole runs under schedules, and each method's selection."""
