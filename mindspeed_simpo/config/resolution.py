"""Options whose default depends on the model or the device get their value here, in one call."""

from __future__ import annotations

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.model_sizes import Model
from mindspeed_simpo.config.options import CPU_CHUNK_TOKENS

ACCELERATOR_CHUNK_TOKENS = 4096
"""Tokens of a chunk of the head that keep the matrix units of an accelerator busy."""
_CHUNK_BYTES = 2**31
"""Limit of the logits of a chunk and their gradients on one rank, in bf16."""
_LOGIT_BYTES = {"cuda": 4, "npu": 8}
"""Of one logit of a chunk: the product and its gradient in bf16; on NPUs the fp32 logit too, which on CUDA is never
stored, see :mod:`mindspeed_simpo.loss.chunks`."""


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
    """Default of ``logprob_chunk_tokens``: 512 on CPUs; elsewhere 4096, or as many as take 2 GiB.

    In a backward each chunk reads and writes the whole fp32 gradient of the output weight once: chunks on accelerators
    are therefore as large as memory allows. On CPUs, chunks that the caches hold are faster.

    Args:
        device: ``npu``, ``cuda`` or ``cpu``.
        local_vocabulary: Rows of the output weight on one tensor-parallel rank.
    """
    if device == "cpu":
        return CPU_CHUNK_TOKENS
    fitting = _CHUNK_BYTES // (_LOGIT_BYTES[device] * local_vocabulary)
    return max(CPU_CHUNK_TOKENS, min(ACCELERATOR_CHUNK_TOKENS, fitting // 128 * 128))


def computation(given: Config, used: Config, device: str) -> str:
    """The precision and the chunks of the head in one line, each with the reason why it is so.

    Args:
        given: The configuration before :func:`resolve`.
        used: The one after it.
        device: ``npu``, ``cuda`` or ``cpu``.
    """
    precision, other = ("bf16", "fp32") if used.bf16_in_use else ("fp32", "bf16")
    why = f"default on {device}; bf16: {str(not used.bf16_in_use).lower()} computes in {other}"
    if given.bf16 is not None:
        why = f"bf16: {str(given.bf16).lower()}"
    line = f"device: {device}; precision: {precision} ({why})"
    if not used.fused_logprob:
        return line
    chosen = "default" if given.logprob_chunk_tokens is None else "logprob_chunk_tokens"
    return f"{line}; output layer: chunks of {used.chunk_tokens_in_use} tokens ({chosen})"
