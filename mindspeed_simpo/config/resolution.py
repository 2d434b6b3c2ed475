"""Options whose default depends on the model or the device get their value here, in one call."""

from __future__ import annotations

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.model_sizes import Model
from mindspeed_simpo.config.options import CPU_CHUNK_TOKENS

ACCELERATOR_CHUNK_TOKENS = 4096
"""Tokens of a chunk of the head that keep the matrix units of an accelerator busy."""
_CHUNK_BYTES = 2**30
"""Limit of the fp32 logits of a chunk on one rank."""


def resolve(config: Config, model: Model, device: str) -> Config:
    """``config`` with ``bf16`` and ``logprob_chunk_tokens`` set, and ``batching: auto`` where the model decides it.

    ``batching: auto`` becomes ``packed`` where only the model forbids ``prefix_shared``, see
    :meth:`~mindspeed_simpo.config.model_sizes.Model.shares_prefixes`. A value that is given is kept.

    Args:
        config: A validated configuration.
        model: Description of the model.
        device: ``npu``, ``cuda`` or ``cpu``; ``auto`` is not a device.
    """
    values: dict[str, object] = {}
    if config.bf16 is None:
        values["bf16"] = device != "cpu"
    if config.logprob_chunk_tokens is None:
        local_vocabulary = -(-model.vocab_size // config.tensor_model_parallel_size)
        values["logprob_chunk_tokens"] = default_chunk_tokens(device, local_vocabulary)
    shared = config.batching == "auto" and config.batching_in_use == "prefix_shared"
    if shared and not model.shares_prefixes(config.seq_length):
        values["batching"] = "packed"
    return config.model_copy(update=values) if values else config


def default_chunk_tokens(device: str, local_vocabulary: int) -> int:
    """Default of ``logprob_chunk_tokens``: 512 on CPUs; elsewhere 4096, or as many as have fp32 logits of 1 GiB.

    Args:
        device: ``npu``, ``cuda`` or ``cpu``.
        local_vocabulary: Rows of the output weight on one tensor-parallel rank.
    """
    if device == "cpu":
        return CPU_CHUNK_TOKENS
    fitting = _CHUNK_BYTES // (4 * local_vocabulary)
    return max(CPU_CHUNK_TOKENS, min(ACCELERATOR_CHUNK_TOKENS, fitting // 128 * 128))
