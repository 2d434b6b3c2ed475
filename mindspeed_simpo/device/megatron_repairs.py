"""Patches of megatron-core: for runs without TransformerEngine, parameters that share a bucket, frozen embeddings."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any


@functools.cache
def repair() -> None:
    """Patch the installed version's defects; call before megatron-core is used. A second call has no effect.

    Each patch first inspects the code of megatron-core and is skipped where that code does not have the defect.
    """
    _allow_optimizers_without_fp8()
    _start_tied_embeddings_at_a_bucket()
    _leave_frozen_embeddings_alone()


def _allow_optimizers_without_fp8() -> None:
    # 0.12.1: optimizer/distrib_optimizer.py calls this function, which raises without TransformerEngine, even where
    # the model has no fp8 parameter
    from megatron.core import fp8_utils

    original = getattr(fp8_utils, "_quantize_param_shard_impl", None)
    if original is None:
        return

    def quantize(model_params: list[Any], *args: Any) -> None:
        if model_params:
            original(model_params, *args)

    fp8_utils._quantize_param_shard_impl = quantize


def _start_tied_embeddings_at_a_bucket() -> None:
    # distributed/param_and_grad_buffer.py, distributed optimizer: the bucket before a tied embedding is padded, but the
    # embedding's start index is that before padding; with padding, the embedding's range then spans two buckets
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

    original = _ParamAndGradBuffer.__init__
    if "param_start_index = _update_bucket_metadata(" in inspect.getsource(original):
        return
    signature = inspect.signature(original)

    def initialise(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        params = bound.arguments["params"]
        # buckets are filled from the last parameter to the first: the tied embedding then starts at index 0
        order = sorted(range(len(params)), key=lambda index: getattr(params[index], "shared_embedding", False))
        for name in ("params", "param_indices"):
            bound.arguments[name] = [bound.arguments[name][index] for index in order]
        original(*bound.args, **bound.kwargs)

    _ParamAndGradBuffer.__init__ = initialise


def _leave_frozen_embeddings_alone() -> None:
    # 0.12.1: distributed/finalize_model_grads.py all-reduces the gradient of a tied embedding also where the embedding
    # is frozen and has no gradient
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    original = module._allreduce_word_embedding_grads
    if "grad is None" in inspect.getsource(module):
        return
    from megatron.core.utils import get_attr_wrapped_model

    def reduce(model: list[Any], config: Any) -> None:
        weights = [get_attr_wrapped_model(chunk, "shared_embedding_or_output_weight")() for chunk in model]
        if any(weight is not None and weight.requires_grad for weight in weights):
            original(model, config)

    module._allreduce_word_embedding_grads = reduce
