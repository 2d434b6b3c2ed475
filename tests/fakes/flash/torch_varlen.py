"""``varlen_attn`` of ``torch.nn.attention.varlen`` in plain PyTorch; refuses what the kernel of GPUs refuses."""

import inspect

import torch
from flash_attn import flash_attn_varlen_func
from torch.nn.attention import varlen

DOCUMENTED = inspect.signature(varlen.varlen_attn)


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """Of PyTorch 2.12 and newer: key-value heads are shared where ``enable_gqa`` says so."""
    documented = {"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa}
    DOCUMENTED.bind(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **documented)
    assert enable_gqa or query.shape[1] == key.shape[1], "the heads differ: varlen_attn raises without enable_gqa"
    assert query.shape[2] % 8 == 0, "mha_varlen_fwd: the head size must be a multiple of 8"
    assert query.shape[2] <= 256, "mha_varlen_fwd: the head size must be at most 256"
    assert key.shape == value.shape
    assert all(each.stride(-1) == 1 for each in (query, key, value)), "mha_varlen_fwd: the last axis is contiguous"
    assert isinstance(window_size, tuple), "window_size is compared with the tuple (-1, 0)"
    left, right = window_size
    assert right == 0, "the queries attend to later keys"
    assert isinstance(max_q, int)
    assert isinstance(max_k, int)
    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        softmax_scale=scale,
        causal=True,
        window_size=(left, right),
    )


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """Of PyTorch 2.11."""
    assert return_aux is None
    return varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=False
    )


def install(monkeypatch, function=varlen_attn):
    """Put a stand-in into its place."""
    assert torch.nn.attention.varlen is varlen
    monkeypatch.setattr(varlen, "varlen_attn", function)
