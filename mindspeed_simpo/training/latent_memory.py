"""The formula of :class:`~mindspeed_simpo.training.pass_memory.PassMemory` for multi-head latent attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mindspeed_simpo.model.description import Attention

if TYPE_CHECKING:
    from mindspeed_simpo.training.pass_memory import PassMemory

_FP32 = 4


def latent_attention_bytes(run: PassMemory, attention: Attention, *, recomputed: bool) -> int:
    """Saved tensors of one layer's latent attention, between its input and the output projection.

    Of each token: the latent vectors before and after their norms, ``2 q + 2 c`` and the rotated part of the keys,
    divided by the tensor ranks under sequence parallelism; rotated queries, keys and padded values of the rank's heads,
    ``3 w`` with w the wider of keys and values, and the result, ``w``, and again without its padding. Context ranks
    save the gathered keys and values, and suffixes those of their prefixes too, ``2 w`` a token.

    Args:
        run: Sizes of the pass.
        attention: The attention, with latent vectors.
        recomputed: Whether the core attention is computed again in the backward.
    """
    latent, batch, layout = attention.latent, run.batch, run.layout
    assert latent is not None
    heads, rotated = run.share(attention).queries, attention.rotation.dims
    width = max(attention.head_dim, latent.value_dim)
    shards = layout.tensor if run.config.sequence_parallel else 1
    latents = run.tokens * (2 * (latent.query_rank or 0) + 2 * latent.kv_rank + rotated) // shards
    result = run.tokens * heads * latent.value_dim
    queries = run.tokens * heads
    norms = run.tokens * _FP32 * (2 if latent.query_rank else 1) // shards
    if recomputed:
        mixed = attention.head_dim - rotated + latent.value_dim
        return run.width * (latents + queries * (2 * attention.head_dim + mixed) + result) + norms
    seen, gathered = run.tokens, layout.context > 1 and run.config.context_parallel_algo == "gathered"
    if gathered:
        seen = run.seen_by_chunks() if run.config.batching_in_use != "padded" else run.tokens * layout.context
    elif batch.longest_branch:
        seen += batch.prefixes + batch.branch_tokens
    padded = 0 if width == latent.value_dim else queries * width
    values = latents + queries * width + 2 * heads * width * seen + result + padded
    softmax = queries * _FP32 * (16 if run.device == "npu" else 1)
    return run.width * values + softmax + norms
