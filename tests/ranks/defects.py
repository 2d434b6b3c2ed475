"""Defects that have shipped elsewhere, put into the package: a rank calls one before it builds anything."""

import dataclasses
import functools
import sys

import torch
import torch.distributed as dist

from tests.ranks.matrix import HIDDEN


def _put_in_place_of(original, defective):
    """Every name under which a module of the package knows the function."""
    import mindspeed_simpo.training.session  # noqa: F401 - brings all of them

    for name, module in list(sys.modules.items()):
        if name.startswith("mindspeed_simpo") and getattr(module, original.__name__, None) is original:
            setattr(module, original.__name__, defective)


def _undifferentiated_sum(values, group):
    """What a raw ``all_reduce`` inside autograd computes: the sum, with the gradient of the own part alone."""
    total = values.detach().clone()
    dist.all_reduce(total, group=group)
    return values + (total - values.detach())


def undifferentiated_tensor_reduction():
    """The owner of a label completes its log-probability, the other shards add a zero: they lose the softmax term."""
    from mindspeed_simpo.loss import vocab_parallel as logprobs

    def logits_logprobs(logits, targets, tensor_group, sum_dtype):
        shard = logits.shape[-1]
        local = targets - tensor_group.rank() * shard
        mine = (local >= 0) & (local < shard)
        highest = logits.detach().amax(dim=-1)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=tensor_group)
        shifted = logits - highest[:, None]
        normaliser = _undifferentiated_sum(shifted.exp().sum(dim=-1), tensor_group)
        at_target = shifted.gather(-1, local.where(mine, 0)[:, None])[:, 0]
        return _undifferentiated_sum((at_target - normaliser.log()).where(mine, 0.0), tensor_group).to(sum_dtype)

    _put_in_place_of(logprobs.logits_logprobs, logits_logprobs)


def label_zero_means_nothing():
    """``labels != 0`` on the shard's own ids: the first id of every shard is dropped."""
    from mindspeed_simpo.loss import vocab_parallel as logprobs

    original = logprobs.logits_logprobs

    def logits_logprobs(logits, targets, tensor_group, sum_dtype):
        return original(logits, targets, tensor_group, sum_dtype).where(targets % logits.shape[-1] != 0, 0.0)

    _put_in_place_of(original, logits_logprobs)


def shift_after_slicing():
    """Each context-parallel rank shifts the labels of its own slice, which has gaps and an end."""
    from mindspeed_simpo.batch import IGNORE_INDEX
    from mindspeed_simpo.parallel.context import positions_of
    from mindspeed_simpo.training.schedule.rows import Rows

    original = Rows.shard_of
    pad = functools.partial(torch.nn.functional.pad, value=IGNORE_INDEX)

    def shard_of(self, context_rank, context_size, *_):
        held = positions_of(context_rank, context_size, (self.targets.shape[1],), self.targets.device)
        labels = pad(self.targets, (1, 0))[:, held]
        targets = self.targets.index_copy(1, held, pad(labels[:, 1:], (0, 1)))
        return original(dataclasses.replace(self, targets=targets), context_rank, context_size)

    Rows.shard_of = shard_of


def supervised_term_divided_twice():
    """``pref_ftx`` times a mean that is divided by the length once more."""
    from mindspeed_simpo.loss.pair_loss import PairLoss

    original = PairLoss.__call__

    def twice_divided(self, inputs):
        once, none = original(self, inputs), original(dataclasses.replace(self, pref_ftx=0.0), inputs)
        twice = none.loss + (once.loss - none.loss) / inputs.chosen_tokens.clamp(min=1)
        return dataclasses.replace(once, loss=twice)

    PairLoss.__call__ = twice_divided


def loss_divided_by_context_ranks():
    """``loss / cp`` in front of a schedule and a DDP that already make the sum a mean."""
    from mindspeed_simpo.training.schedule.runner import PairSchedule

    original = PairSchedule.forward_backward

    def forward_backward(self, micro_batches, num_pairs, step):
        return original(self, micro_batches, num_pairs * self.groups.context.size(), step)

    PairSchedule.forward_backward = forward_backward


def expert_gradients_of_the_wrong_group():
    """The gradients of experts are reduced as those of the rest: over ranks that hold other experts."""
    from mindspeed_simpo.model.megatron import experts

    original = experts._stacked

    def reduced_with_the_rest(*args):
        weight = original(*args)
        weight.allreduce = True
        return weight

    experts._stacked = reduced_with_the_rest


def dropped_token():
    """The first token of a rank goes to one expert the fewer, as where an expert is full."""
    from mindspeed_simpo.model.megatron.experts import Router

    original = Router.forward

    def forward(self, *arguments):
        weights, chosen = original(self, *arguments)
        kept = torch.ones_like(weights)
        kept[0, -1] = 0
        return weights * kept, chosen

    Router.forward = forward


def experts_counted_twice_in_the_norm():
    """The squares of the experts' gradients are summed over ranks that hold the same experts, too."""
    from mindspeed_simpo.training import optimizer

    original = optimizer._norm_groups

    def norm_groups(*args, sharded):
        (kind, group), (experts, _) = original(*args, sharded=sharded)
        return (kind, group), (experts, None)

    optimizer._norm_groups = norm_groups


def sink_of_each_context_rank():
    """Each context-parallel rank adds the sink to the sum of its own keys, and the sums of the ranks are added."""
    import math

    from mindspeed_simpo.model import context

    original = context.CONTEXT_PARALLEL_ATTENTION["gathered"]

    def gathered_attention(*arguments):
        *others, sinks, group = arguments
        return original(*others, sinks + math.log(group.size()), group)

    context.CONTEXT_PARALLEL_ATTENTION["gathered"] = gathered_attention


def sinks_as_replicated():
    """The gradients of the sinks are summed over tensor-parallel ranks, as those of the norms."""
    from mindspeed_simpo.model.megatron.attention import Attention

    original = Attention.__init__

    def initialise(self, *args):
        original(self, *args)
        self.sinks.sequence_parallel = True

    Attention.__init__ = initialise


def bias_of_each_part_of_an_expert():
    """Each rank that holds a part of an expert adds the whole bias of the expert's output."""
    from mindspeed_simpo.model.megatron import experts

    original = experts.grouped_bias

    def grouped_bias(rows, biases, counts):
        is_output = biases.shape[1] == HIDDEN
        return original(rows, biases + biases.roll(HIDDEN // 2, 1) if is_output else biases, counts)

    experts.grouped_bias = grouped_bias


def replicated_factor_not_summed():
    """Each tensor-parallel rank keeps the gradient of its own shard of the sequence."""
    from mindspeed_simpo.model.megatron.adapters import LowRankFactors

    original = LowRankFactors.__init__

    def initialise(self, *args):
        original(self, *args)
        self.lora_A.sequence_parallel = self.lora_B.sequence_parallel = False

    LowRankFactors.__init__ = initialise


def own_rows_of_b_alone():
    """A replicated A gets the gradient of the outputs that its own rank holds; of experts' a replicated B too."""
    from mindspeed_simpo.model.megatron import adapters

    adapters.copy_to = lambda value, group: value  # noqa: ARG005


def copied_factors_counted_in_the_norm():
    """The gradient of a factor that each expert-tensor rank has counts once for each of them."""
    from mindspeed_simpo.model.slots import Slot

    Slot.is_copy = lambda self, rank: False  # noqa: ARG005


def features_counted_by_rank():
    """A rank numbers the input features that it holds from zero, so that ranks share the masks of dropout."""
    from mindspeed_simpo.model.megatron import adapters

    original = adapters.feature_keys
    adapters.feature_keys = lambda features: original(torch.arange(len(features)))


def reference_with_adapters():
    """The reference sums come from the trained model."""
    from contextlib import nullcontext

    from mindspeed_simpo.training.schedule import megatron as engine

    engine.without_adapters = nullcontext


def balance_of_own_tokens():
    """The auxiliary loss counts the tokens of a sequence on its own context-parallel rank alone."""
    import dataclasses

    from mindspeed_simpo.model.balance import Balance

    original = Balance.add_gradient
    Balance.add_gradient = lambda self, *args: original(dataclasses.replace(self, groups=()), *args)
