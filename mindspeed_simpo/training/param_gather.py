"""The all-gather of updated parameters over the data-parallel ranks, overlapped with the next forward.

With the distributed optimizer each data-parallel rank updates its share of the parameters. megatron-core's DDP gathers
them bucket by bucket: a hook before the forward of a module waits for the bucket of the module's parameters and starts
the gather of the next bucket. What reads parameters without a call of their module waits by
:attr:`~mindspeed_simpo.model.megatron.gpt.PolicyModel.await_parameters`. The computed numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from megatron.core.utils import get_model_config

from mindspeed_simpo.model.megatron.weights import unwrap


def overlap_with_forward(models: Sequence[Any]) -> None:
    """Have the forwards of the models wait for the parameters that they read.

    Args:
        models: Pipeline chunks of this rank, wrapped in DDP with ``overlap_param_gather``.
    """
    for model in models:
        unwrap(model).await_parameters = model._make_forward_pre_hook()
    if len(models) > 1:
        # the interleaved schedule starts the gathers of a chunk ahead of its first forward, on all pipeline ranks at
        # the same time; where a forward without gradients went before, the gathers are done
        get_model_config(models[0]).param_sync_func = [partial(_start_gathers, model) for model in models]


def gather_updated(models: Sequence[Any]) -> None:
    """Mark the parameters as updated and, without virtual pipeline ranks, start the gather of the first bucket.

    Args:
        models: As in :func:`overlap_with_forward`.
    """
    for model in models:
        for group in _bucket_groups(model):
            _finish(group)
            group.param_gather_dispatched = False
    if len(models) == 1:
        [model] = models
        for group in _first_read(model):
            group.start_param_sync()


def _start_gathers(model: Any, *_: Any) -> None:
    for group in _bucket_groups(model):
        if not group.param_gather_dispatched:
            group.start_param_sync()


def _finish(group: Any) -> None:
    if group.param_gather_handle is not None:
        group.param_gather_handle.wait()
        group.param_gather_handle = None


def _bucket_groups(model: Any) -> list[Any]:
    return [*model.bucket_groups, *model.expert_parallel_bucket_groups]


def _first_read(model: Any) -> Iterator[Any]:
    """The bucket of the first parameter in the order of the forward, and that of the first parameter of experts."""
    order = [model.param_to_bucket_group[each] for each in model.module.parameters() if each.requires_grad]
    for chain in (model.bucket_groups, model.expert_parallel_bucket_groups):
        yield from [group for group in order if group in chain][:1]
