"""Degrees -> process groups, and the collectives that every room shares."""

from mindspeed_simpo.parallel.groups import Groups, initialize, seed_model_ranks, shutdown

__all__ = ["Groups", "initialize", "seed_model_ranks", "shutdown"]
