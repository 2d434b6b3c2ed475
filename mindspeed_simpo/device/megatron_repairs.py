"""Where megatron-core does not fit: on a newer torch, without TransformerEngine, or at a needless cost."""

from __future__ import annotations

import functools
import inspect
import queue
from typing import Any


@functools.cache
def repair() -> None:
    """Replace the functions below where they are the ones that fail; call before megatron-core is used."""
    _allow_optimizers_without_fp8()
    _write_checkpoints_as_torch_saves()
    _start_tied_embeddings_at_a_bucket()
    _collect_write_results_in_process()


def _allow_optimizers_without_fp8() -> None:
    # 0.12.1: optimizer/distrib_optimizer.py calls this with no fp8 parameter at all, and it raises all the same
    from megatron.core import fp8_utils

    original = getattr(fp8_utils, "_quantize_param_shard_impl", None)
    if original is None:
        return

    def quantize(model_params: list[Any], *args: Any) -> None:
        if model_params:
            original(model_params, *args)

    fp8_utils._quantize_param_shard_impl = quantize


def _write_checkpoints_as_torch_saves() -> None:
    # 0.12.1: dist_checkpointing/strategies/filesystem_async.py calls a function of torch that has an argument more now
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original = filesystem_async._write_item
    parameters = inspect.signature(original).parameters
    takes_format = "serialization_format" in parameters
    source = inspect.getsource(filesystem_async)
    if not takes_format or "serialization_format" in source:
        return
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    filesystem_async._write_item = functools.partial(original, serialization_format=SerializationFormat.TORCH_SAVE)


def _start_tied_embeddings_at_a_bucket() -> None:
    # distributed/param_and_grad_buffer.py, for the distributed optimizer: the bucket before a tied embedding is padded,
    # and the embedding starts where it was not; where that padding is not empty, the optimizer finds it in two buckets
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

    original = _ParamAndGradBuffer.__init__
    if "param_start_index = _update_bucket_metadata(" in inspect.getsource(original):
        return
    signature = inspect.signature(original)

    def initialise(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        params = bound.arguments["params"]
        # buckets are filled from the last parameter on: the tied one then comes first, at zero
        order = sorted(range(len(params)), key=lambda index: getattr(params[index], "shared_embedding", False))
        for name in ("params", "param_indices"):
            bound.arguments[name] = [bound.arguments[name][index] for index in order]
        original(*bound.args, **bound.kwargs)

    _ParamAndGradBuffer.__init__ = initialise


def _collect_write_results_in_process() -> None:
    # 0.16: dist_checkpointing/strategies/filesystem_async.py spawns a process of the whole program, on every rank, to
    # hold a queue that another process could read; a save that is not asynchronous puts and gets in this one
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if '"spawn"' in inspect.getsource(filesystem_async._get_write_results_queue):
        filesystem_async._results_queue = queue.Queue()
