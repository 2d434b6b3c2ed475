"""A training run: the step loop, pair schedules, optimizer, checkpoints, metrics."""
