"""One optimizer step's micro-batches of pairs -> gradients, through megatron-core's forward-backward schedules."""

from mindspeed_simpo.training.schedule.runner import PairSchedule
from mindspeed_simpo.training.schedule.scoring import PairScorer, ReferenceLookup, ScoredBatch

__all__ = ["PairSchedule", "PairScorer", "ReferenceLookup", "ScoredBatch"]
