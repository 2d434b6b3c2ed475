"""``npu_fusion_attention`` for SBH, BSH, BSND, BNSD and TND, and its gradient for all but the last, in PyTorch."""

import math

import torch

MAX_STATISTIC = 8
"""The softmax statistics repeat their value along a last dimension of this size."""


def _to_heads(tensor, layout, head_num):
    """[B, N, S, D], whatever the layout."""
    if layout == "SBH":
        return tensor.unflatten(-1, (head_num, -1)).permute(1, 2, 0, 3)
    if layout == "BSH":
        return tensor.unflatten(-1, (head_num, -1)).transpose(1, 2)
    if layout == "BSND":
        return tensor.transpose(1, 2)
    if layout == "BNSD":
        return tensor
    raise NotImplementedError(f"input_layout {layout}")


def _from_heads(tensor, layout):
    if layout == "SBH":
        return tensor.permute(2, 0, 1, 3).flatten(2)
    if layout == "BSH":
        return tensor.transpose(1, 2).flatten(2)
    return tensor.transpose(1, 2) if layout == "BSND" else tensor


def _hidden(mask, sparse_mode, pre, following, query_len, key_len, device):
    """True where attention is not allowed, broadcastable to [B, N, Sq, Sk], or None."""
    if sparse_mode in (2, 3):
        shift = key_len - query_len if sparse_mode == 3 else 0
        return torch.ones(query_len, key_len, dtype=torch.bool, device=device).triu(1 + shift)
    if sparse_mode == 4:  # a band, counted from the last query and the last key
        shift = key_len - query_len
        ones = torch.ones(query_len, key_len, dtype=torch.bool, device=device)
        return ones.triu(1 + shift + following) | ones.tril(shift - pre - 1)
    if sparse_mode not in (0, 1):
        raise NotImplementedError(f"sparse_mode {sparse_mode}")
    hidden = None if mask is None else mask.bool()
    if sparse_mode == 0 and (pre < key_len or following < key_len):
        distance = torch.arange(key_len, device=device) - torch.arange(query_len, device=device)[:, None]
        band = (distance > following) | (distance < -pre)
        hidden = band if hidden is None else hidden | band
    return hidden


def _documents(query, key, value, head_num, query_ends, key_ends):
    """Query, key and value [1, S, N, D] of each member of a TND batch."""
    for tensor, ends in ((query, query_ends), (key, key_ends), (value, key_ends)):
        if tensor.dim() != 3 or not isinstance(ends, list) or ends != sorted(ends) or ends[-1] != tensor.shape[0]:
            raise RuntimeError(f"TND: shape {tuple(tensor.shape)} and ends {ends}")
    if query.shape[1] != head_num or len(query_ends) != len(key_ends):
        raise RuntimeError(f"TND: {head_num} heads of {tuple(query.shape)}, {len(query_ends)} and {len(key_ends)} ends")
    for q_start, q_end, k_start, k_end in zip([0, *query_ends], query_ends, [0, *key_ends], key_ends, strict=False):
        yield query[None, q_start:q_end], key[None, k_start:k_end], value[None, k_start:k_end]


def npu_fusion_attention(
    query,
    key,
    value,
    head_num,
    input_layout,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    pre_tockens=2147483647,
    next_tockens=2147483647,
    inner_precise=0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    **kwargs,
):
    """``softmax(scale * q k^T, masked) v``; returns (out, softmax max, softmax sum, out, seed, offset, numels).

    ``atten_mask`` is True (1) where attention is not allowed. The statistics are fp32 [B, N, Sq, 8].

    TND has the tokens of all batch members end to end, [T, N, D]; ``actual_seq_qlen`` and ``actual_seq_kvlen`` are the
    running sums of their lengths, and sparse_mode 3 and 4 align the mask to the last query and key of each of them. The
    statistics are [T, N, 8].
    """
    if pse is not None or keep_prob != 1.0:
        raise NotImplementedError("pse and dropout")
    if input_layout == "TND":
        if sparse_mode not in (2, 3, 4) or atten_mask is None or atten_mask.shape != (2048, 2048):
            raise NotImplementedError("TND without a compressed mask")
        documents = _documents(query, key, value, head_num, actual_seq_qlen, actual_seq_kvlen)
        shape = {"scale": scale, "sparse_mode": sparse_mode, "pre_tockens": pre_tockens, "next_tockens": next_tockens}
        parts = [npu_fusion_attention(*d, head_num, "BSND", **shape) for d in documents]
        out = torch.cat([part[0][0] for part in parts])
        statistics = [torch.cat([part[i][0].transpose(0, 1) for part in parts]) for i in (1, 2)]
        return out, *statistics, out.detach(), 0, 0, 0
    if actual_seq_qlen is not None:
        raise NotImplementedError("variable lengths but with TND")
    q = _to_heads(query, input_layout, head_num)
    kv_heads = key.shape[-1] * head_num // query.shape[-1] if input_layout in ("SBH", "BSH") else None
    k, v = (_to_heads(t, input_layout, kv_heads) for t in (key, value))
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1).float() for t in (k, v))
    scores = scale * q.float() @ k.transpose(-1, -2)
    hidden = _hidden(atten_mask, sparse_mode, pre_tockens, next_tockens, q.shape[2], k.shape[2], q.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    maximum = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (scores - maximum.detach()).exp()
    total = weights.sum(-1, keepdim=True)
    out = _from_heads(((weights / total) @ v).to(query.dtype), input_layout)
    statistics = [t.detach().expand(*t.shape[:-1], MAX_STATISTIC).contiguous() for t in (maximum, total)]
    return out, *statistics, out.detach(), 0, 0, 0


def npu_fusion_attention_grad(
    query,
    key,
    value,
    dy,
    head_num,
    input_layout,
    *,
    softmax_max,
    softmax_sum,
    attention_in,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    scale_value=1.0,
    pre_tockens=2147483647,
    next_tockens=2147483647,
    sparse_mode=0,
    **kwargs,
):
    """(dq, dk, dv, dpse) with the softmax given by its statistics, which may span more keys than ``key`` holds."""
    q, grad, whole = (_to_heads(t, input_layout, head_num).float() for t in (query, dy, attention_in))
    kv_heads = key.shape[-1] * head_num // query.shape[-1] if input_layout in ("SBH", "BSH") else None
    k, v = (_to_heads(t, input_layout, kv_heads).float() for t in (key, value))
    groups = q.shape[1] // k.shape[1]
    k_all, v_all = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = scale_value * q @ k_all.transpose(-1, -2)
    hidden = _hidden(atten_mask, sparse_mode, pre_tockens, next_tockens, q.shape[2], k.shape[2], q.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    weights = (scores - softmax_max[..., :1]).exp() / softmax_sum[..., :1]
    grad_weights = grad @ v_all.transpose(-1, -2)
    grad_scores = weights * (grad_weights - (grad * whole).sum(-1, keepdim=True)) * scale_value
    dq = grad_scores @ k_all
    dk, dv = (
        t.unflatten(1, (-1, groups)).sum(2)
        for t in (grad_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad)
    )
    return *(_from_heads(t.to(query.dtype), input_layout) for t in (dq, dk, dv)), None
