"""Degrees -> process groups, and the collectives that every room shares."""

from mindspeed_simpo.parallel.groups import Groups, consecutive_ranks, initialize, seed_model_ranks, shutdown

__all__ = ["Groups", "consecutive_ranks", "initialize", "seed_model_ranks", "shutdown"]
