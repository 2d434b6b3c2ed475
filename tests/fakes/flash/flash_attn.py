"""``flash_attn_varlen_func`` in plain PyTorch: documents end to end, its causal mask aligned to the bottom right."""

import math

import torch


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
):
    """``[total_q, heads, dim]`` over ``[total_k, kv_heads, dim]``; the bounds are int32 and begin with 0."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) == max_seqlen_k
    assert causal
    assert not dropout_p
    out = torch.zeros_like(q)
    groups = q.shape[1] // k.shape[1]
    bounds = zip(*(c.tolist()[i:] for c in (cu_seqlens_q, cu_seqlens_k) for i in (0, 1)), strict=False)
    for q_start, q_end, k_start, k_end in bounds:
        keys, values = (t[k_start:k_end].repeat_interleave(groups, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q_start:q_end], keys) * softmax_scale
        if softcap:
            scores = (scores / softcap).tanh() * softcap
        shift = scores.shape[2] - scores.shape[1]
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + shift)
        if window_size[0] >= 0:
            hidden |= torch.ones(scores.shape[1:], dtype=torch.bool).tril(shift - window_size[0] - 1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        out[q_start:q_end] = torch.einsum("hqk,khd->qhd", weights, values)
    return out
