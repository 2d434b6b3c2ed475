"""A run: the loop, pair schedules, optimizer, checkpoints, metrics."""
