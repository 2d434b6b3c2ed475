"""``npu_fusion_attention`` for SBH, BSH, BSND, BNSD and TND, and its gradient, in PyTorch."""

import functools
import math

import torch

from torch_npu.attention_rules import TND_BACKWARD_WIDTH, check, check_dtypes, check_shapes, refuse

MAX_STATISTIC = 8
"""The softmax statistics repeat their value along a last dimension of this size."""


def _to_heads(tensor, layout, head_num):
    """[B, N, S, D], whatever the layout."""
    if layout == "SBH":
        return tensor.unflatten(-1, (head_num, -1)).permute(1, 2, 0, 3)
    if layout == "BSH":
        return tensor.unflatten(-1, (head_num, -1)).transpose(1, 2)
    return tensor.transpose(1, 2) if layout == "BSND" else tensor


def _from_heads(tensor, layout):
    if layout == "SBH":
        return tensor.permute(2, 0, 1, 3).flatten(2)
    if layout == "BSH":
        return tensor.transpose(1, 2).flatten(2)
    return tensor.transpose(1, 2) if layout == "BSND" else tensor


def _hidden(mask, sparse_mode, pre, following, query_len, key_len, device):
    """True where attention is not allowed, broadcastable to [B, N, Sq, Sk], or None.

    Without a mask attention is full: ``sparse_mode``, ``pre_tockens`` and ``next_tockens`` have no effect then.
    """
    if mask is None:
        return None
    if sparse_mode in (2, 3):
        shift = key_len - query_len if sparse_mode == 3 else 0
        return torch.ones(query_len, key_len, dtype=torch.bool, device=device).triu(1 + shift)
    if sparse_mode == 4:  # a band, counted from the last query and the last key
        shift = key_len - query_len
        ones = torch.ones(query_len, key_len, dtype=torch.bool, device=device)
        return ones.triu(1 + shift + following) | ones.tril(shift - pre - 1)
    if sparse_mode not in (0, 1):
        raise NotImplementedError(f"sparse_mode {sparse_mode}")
    hidden = mask.bool()
    if sparse_mode == 0 and (pre < key_len or following < key_len):
        distance = torch.arange(key_len, device=device) - torch.arange(query_len, device=device)[:, None]
        hidden = hidden | (distance > following) | (distance < -pre)
    return hidden


def _heads(query, key, value, scale, hidden):
    """Context, maximum and sum of ``[B, N, S, D]`` heads in fp32."""
    groups = query.shape[1] // key.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1).float() for t in (key, value))
    scores = scale * query.float() @ k.transpose(-1, -2)
    if hidden is not None:
        if bool(hidden.all(-1).any()):
            raise NotImplementedError("a query without a key: its result is not documented")
        scores = scores.masked_fill(hidden, -math.inf)
    maximum = scores.amax(-1, keepdim=True)
    weights = (scores - maximum.detach()).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights / total) @ v, maximum.detach(), total.detach()


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
    gen_mask_parallel=True,
    sync=False,
    softmax_layout="",
    sink=None,
    dropout_mask=None,
    seed=0,
    offset=0,
):
    """``softmax(scale * q k^T, masked) v``; (out, softmax max, softmax sum, an empty tensor, seed, offset, numels).

    ``atten_mask`` is True (1) where attention is not allowed. The statistics are fp32 [B, N, Sq, 8].

    TND has the tokens of all batch members end to end, [T, N, D]; ``actual_seq_qlen`` and ``actual_seq_kvlen`` are the
    running sums of their lengths, and sparse_mode 3 and 4 align the mask to the last query and key of each of them. The
    statistics have the shape [T, N, 8], and the order of [N, T, 8] in memory unless ``softmax_layout`` is TND. Rows of
    the result beyond the last document are not written: NaN here.

    Source: :mod:`torch_npu.attention_rules`.
    """
    window, ends = (pre_tockens, next_tockens), (actual_seq_qlen, actual_seq_kvlen)
    layout, sizes = check(
        query, key, value, head_num, input_layout, atten_mask, keep_prob, sparse_mode, window, ends, softmax_layout
    )
    if any(each is not None for each in (pse, padding_mask, sink, dropout_mask, prefix)) or keep_prob != 1.0:
        raise NotImplementedError("pse, padding_mask, sink, prefix and dropout")
    nothing = query.new_empty(0)
    hide = functools.partial(_hidden, atten_mask, sparse_mode, *window)
    if layout == "TND":
        if sparse_mode in (0, 1) and atten_mask is not None:
            raise NotImplementedError("TND with a mask that is not compressed")
        out, statistics, numels = _varlen(query, key, value, scale, hide, ends)
        if softmax_layout != "TND":
            statistics = [each.transpose(0, 1).contiguous().view(each.shape) for each in statistics]
        if out.requires_grad and sizes.widths[0] > TND_BACKWARD_WIDTH:
            out.register_hook(functools.partial(_refuse_backward, sizes.widths[0]))
        return out, *statistics, nothing, seed, offset, head_num * numels
    if actual_seq_qlen is not None or actual_seq_kvlen is not None:
        raise NotImplementedError("lengths of documents but with TND")
    q, k, v = (_to_heads(t, layout, heads) for t, heads in zip((query, key, value), sizes.heads, strict=True))
    out, *statistics = _heads(q, k, v, scale, hide(q.shape[2], k.shape[2], q.device))
    statistics = [t.expand(*t.shape[:-1], MAX_STATISTIC).contiguous() for t in statistics]
    numels = q.shape[0] * head_num * q.shape[2] * k.shape[2]
    return _from_heads(out, layout).to(query.dtype), *statistics, nothing, seed, offset, numels


def _varlen(query, key, value, scale, hide, ends):
    """Result and statistics of TND, and the sum of queries times keys."""
    parts, numels = [], 0
    for queries, keys in zip(*map(_spans, ends), strict=True):
        if queries.start >= queries.stop:
            continue
        q, k, v = (t[None, span].transpose(1, 2) for t, span in ((query, queries), (key, keys), (value, keys)))
        parts.append([t[0].transpose(0, 1) for t in _heads(q, k, v, scale, hide(q.shape[2], k.shape[2], q.device))])
        numels += q.shape[2] * k.shape[2]
    unwritten = query.shape[0] - sum(len(part[0]) for part in parts)
    parts.append([query.new_full((unwritten, query.shape[1], size), math.nan) for size in (value.shape[2], 1, 1)])
    out, *statistics = (torch.cat([part[i] for part in parts]) for i in range(3))
    statistics = [t.float().expand(*t.shape[:2], MAX_STATISTIC).contiguous() for t in statistics]
    return out.to(query.dtype), statistics, numels


def _spans(ends):
    return [slice(start, max(start, end)) for start, end in zip([0, *ends], ends, strict=False)]


def _refuse_backward(width, grad):
    """The backward of TND takes widths of up to 512.

    Source: CANN ops-transformer of CANN 8.5, ``attention/flash_attention_score_grad/docs/
    aclnnFlashAttentionUnpaddingScoreGrad.md``; later documents say 768.
    """
    refuse(width <= TND_BACKWARD_WIDTH, f"a head width of at most {TND_BACKWARD_WIDTH} in the backward of TND", width)
    return grad


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
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    softmax_layout="",
    **kwargs,
):
    """(dq, dk, dv, dpse) with the softmax given by its statistics, which may span more keys than ``key`` holds.

    The statistics have the shape and the order in memory that :func:`npu_fusion_attention` gives them.

    Source: ``npu_fusion_attention_grad`` of ``op_plugin/ops/opapi/FlashAttentionKernelNpuOpApi.cpp`` in op-plugin.
    """
    layout, window, ends = input_layout.upper(), (pre_tockens, next_tockens), (actual_seq_qlen, actual_seq_kvlen)
    _, sizes = check(query, key, value, head_num, layout, atten_mask, 1.0, sparse_mode, window, ends, softmax_layout)
    check_dtypes((query, dy, attention_in))
    check_shapes((dy, key, value), head_num, layout)
    refuse(softmax_max.dtype == softmax_sum.dtype == torch.float32, "fp32 statistics", softmax_max.dtype)
    hide, tensors = functools.partial(_hidden, atten_mask, sparse_mode, *window), (query, dy, attention_in, key, value)
    if layout == "TND":
        _refuse_backward(sizes.widths[0], dy)
        statistics = [
            each if softmax_layout == "TND" else each.view(head_num, -1, MAX_STATISTIC).transpose(0, 1)
            for each in (softmax_max, softmax_sum)
        ]
        grads = [torch.zeros_like(each) for each in (query, key, value)]
        for queries, keys in zip(*map(_spans, ends), strict=True):
            spans = (queries, queries, queries, keys, keys, queries, queries)
            parts = [t[None, span].transpose(1, 2) for t, span in zip((*tensors, *statistics), spans, strict=True)]
            for grad, span, part in zip(
                grads, (queries, keys, keys), _gradients(*parts, scale_value, hide), strict=True
            ):
                grad[span] = part[0].transpose(0, 1).to(grad.dtype)
        return *grads, None
    parts = [
        _to_heads(t, layout, heads) for t, heads in zip(tensors, (*3 * (head_num,), *sizes.heads[1:]), strict=True)
    ]
    grads = _gradients(*parts, softmax_max, softmax_sum, scale_value, hide)
    return *(_from_heads(t.to(query.dtype), layout) for t in grads), None


def _gradients(query, grad, whole, key, value, maximum, total, scale, hide):
    """Gradients of query, key and value in fp32; all are [B, N, S, D], statistics [B, N, S, 8]."""
    q, grad, whole, k, v = (t.float() for t in (query, grad, whole, key, value))
    groups = q.shape[1] // k.shape[1]
    k_all, v_all = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = scale * q @ k_all.transpose(-1, -2)
    hidden = hide(q.shape[2], k.shape[2], q.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    weights = (scores - maximum[..., :1]).exp() / total[..., :1]
    grad_weights = grad @ v_all.transpose(-1, -2)
    grad_scores = weights * (grad_weights - (grad * whole).sum(-1, keepdim=True)) * scale
    dk, dv = (
        t.unflatten(1, (-1, groups)).sum(2)
        for t in (grad_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad)
    )
    return grad_scores @ k_all, dk, dv
