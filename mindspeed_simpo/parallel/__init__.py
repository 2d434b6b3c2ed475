"""Process groups from the degrees of parallelism, differentiable collectives, and the slices of context parallelism."""

from mindspeed_simpo.parallel.groups import Groups, consecutive_ranks, initialize, seed_model_ranks, shutdown

__all__ = ["Groups", "consecutive_ranks", "initialize", "seed_model_ranks", "shutdown"]
