"""One optimizer step's micro-batches of pairs -> gradients, through megatron-core's forward-backward schedules."""

from mindspeed_simpo.schedule.runner import PairSchedule
from mindspeed_simpo.schedule.scoring import PairScorer, ReferenceLookup, ScoredBatch

__all__ = ["PairSchedule", "PairScorer", "ReferenceLookup", "ScoredBatch"]
