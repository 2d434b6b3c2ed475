"""What ``npu_fusion_attention`` refuses. Where its sources and its documentation differ, the narrower one counts.

Sources, beside those in the docstrings: op-plugin, ``docs/zh/custom_APIs/torch_npu/torch_npu-npu_fusion_attention.md``
and ``op_plugin/ops/opapi/FlashAttentionKernelNpuOpApi.cpp``; CANN ops-transformer, in
``attention/flash_attention_score/``: ``docs/aclnnFlashAttentionScore.md``, ``docs/aclnnFlashAttentionVarLenScore.md``
and ``op_host/flash_attention_score_tiling_general.cpp``.
"""

import functools
from dataclasses import dataclass

import torch

from torch_npu.refusals import FLOATS, require

MILLION = 1_000_000
DOCUMENTS = 2048
HEADS = 256
WIDTH = 768
TND_BACKWARD_WIDTH = 512
COMPRESSED = (2048, 2048)
LAYOUTS = {"BSH": 3, "SBH": 3, "BSND": 4, "BNSD": 4, "TND": 3}
COMPRESSED_MODES = (2, 3, 4, 7, 8)


@dataclass(frozen=True)
class Sizes:
    """Batch, lengths, heads and widths of a call; of TND the batch is 1 and the lengths are those of all documents."""

    batch: tuple[int, int, int]
    lengths: tuple[int, int, int]
    heads: tuple[int, int, int]
    widths: tuple[int, int, int]


def refuse(*args, **kwargs):
    """Shorthand of :func:`require` for this operator."""
    require(args[0], "npu_fusion_attention", *args[1:], **kwargs)


def check(query, key, value, head_num, layout, mask, keep_prob, sparse_mode, window, ends, softmax_layout):
    """All rules of the forward; returns the layout in capitals and the :class:`Sizes`.

    ``window`` is ``(pre_tockens, next_tockens)``, ``ends`` is ``(actual_seq_qlen, actual_seq_kvlen)``.
    """
    tensors = (query, key, value)
    check_dtypes(tensors)
    refuse(head_num > 0, "head_num above 0", head_num)
    refuse(all(tensor.dim() in (3, 4) for tensor in tensors), "3 or 4 axes", [tensor.dim() for tensor in tensors])
    refuse(0 < keep_prob <= 1, "keep_prob in (0, 1]", keep_prob)
    layout = layout.upper()
    refuse(layout in LAYOUTS, "input_layout BSH, SBH, BNSD, BSND or TND", layout)
    refuse(softmax_layout in ("", "TND"), "softmax_layout TND or none", softmax_layout)
    refuse(softmax_layout == "" or layout == "TND", "softmax_layout with input_layout TND only", layout)
    modes = (0, 1, 2, 3, 4, 6, 7, 8) if layout == "TND" else range(7)
    refuse(sparse_mode in modes, f"sparse_mode in {list(modes)} for {layout}", sparse_mode)
    sizes = check_shapes(tensors, head_num, layout)
    documents = [sizes.lengths[:2]]
    if layout == "TND":
        documents = check_documents(sizes, *ends)
    if mask is not None:
        check_mask(mask, sparse_mode, layout, head_num, sizes.batch[0], documents)
        check_window(sparse_mode, layout, *window, documents)
    return layout, sizes


def check_dtypes(tensors):
    """q, k and v have one dtype of fp16, bf16 and fp32.

    Source: "约束说明" of the documentation; ``CheckFaParam`` of ``op_host/op_api/aclnn_flash_attention_score.cpp``.
    """
    dtypes = [tensor.dtype for tensor in tensors]
    refuse(len(set(dtypes)) == 1 and dtypes[0] in FLOATS, "one dtype of fp16, bf16 and fp32", dtypes)


def check_shapes(tensors, head_num, layout):
    """Batches agree, query heads are a multiple of key heads, at most 256 of width 768, 1 M tokens, and so on.

    Source: "约束说明" of the documentation; ``AnalyzeLayout`` of the tiling.
    """
    axes = [_axes(tensor, layout) for tensor in tensors]
    batch, lengths = (tuple(each[axis] for each in axes) for axis in (0, 1))
    if layout in ("BSH", "SBH"):
        hidden = [tensor.shape[-1] for tensor in tensors]
        refuse(hidden[0] % head_num == 0 and hidden[0], f"H of the query a multiple of {head_num} heads", hidden[0])
        width = hidden[0] // head_num
        refuse(hidden[1] % width == 0 and hidden[1], f"H of the key a multiple of the width {width}", hidden[1])
        key_heads = hidden[1] // width
        heads, widths = (head_num, key_heads, key_heads), (width, width, hidden[2] // key_heads)
    else:
        heads, widths = (tuple(each[axis] for each in axes) for axis in (2, 3))
    refuse(len(set(batch)) == 1, "one batch size", batch)
    refuse(lengths[1] == lengths[2] and heads[1] == heads[2], "keys and values of one shape", (lengths, heads))
    refuse(heads[0] == head_num, f"head_num {head_num} query heads", heads[0])
    refuse(1 <= head_num <= HEADS, f"1 to {HEADS} query heads", head_num)
    refuse(heads[1] and head_num % heads[1] == 0, "query heads a multiple of the key heads", heads)
    refuse(widths[0] == widths[1] >= widths[2], "Dq = Dk >= Dv", widths)
    refuse(1 <= widths[0] <= WIDTH, f"a head width of 1 to {WIDTH}", widths[0])
    refuse(all(1 <= length <= MILLION for length in lengths), "1 to 1 M tokens", lengths)
    return Sizes(batch, lengths, heads, widths)


def _axes(tensor, layout):
    """(batch, length, heads, width), with None where the layout has no such axis of its own."""
    refuse(tensor.dim() == LAYOUTS[layout], f"{LAYOUTS[layout]} axes for {layout}", tensor.dim())
    shape = dict(zip(layout, tensor.shape, strict=True))
    return shape.get("B", 1), shape.get("S", shape.get("T")), shape.get("N"), shape.get("D")


def check_documents(sizes, query_ends, key_ends):
    """Running sums, as lists on the host, of 1 to 2,048 documents; the (queries, keys) of each.

    Zeros at the end are documents that take no part. Sums below the number of tokens are no error: the operator leaves
    the last rows of its result unwritten.

    Source: "约束说明" of ``aclnnFlashAttentionVarLenScore.md``; ``Analyze3DimLayout`` of the tiling; the types are
    those of ``int[]? actual_seq_qlen`` in op-plugin's ``op_plugin/config/op_plugin_functions.yaml``.
    """
    documents = []
    for ends in (query_ends, key_ends):
        if ends is not None and not (isinstance(ends, list | tuple) and all(type(end) is int for end in ends)):
            raise TypeError(f"npu_fusion_attention: expected the ends of documents as integers, found {ends!r:.80}")
    refuse(query_ends and key_ends, "actual_seq_qlen and actual_seq_kvlen with TND", (query_ends, key_ends))
    refuse(len(query_ends) == len(key_ends), "as many ends of keys as of queries", (len(query_ends), len(key_ends)))
    refuse(len(query_ends) <= DOCUMENTS, f"at most {DOCUMENTS} documents", len(query_ends))
    for ends, tokens in ((query_ends, sizes.lengths[0]), (key_ends, sizes.lengths[1])):
        kept = list(ends)
        while kept and kept[-1] == 0 and len(kept) > 1:
            kept.pop()
        refuse(kept == sorted(kept) and kept[0] >= 0, "running sums of the lengths", f"{ends}")
        refuse(kept[-1] <= tokens, f"ends within {tokens} tokens", kept[-1])
        documents.append([max(0, end - start) for start, end in zip([0, *ends], ends, strict=False)])
    return list(zip(*documents, strict=True))


def check_mask(mask, sparse_mode, layout, head_num, batch, documents):
    """bool or uint8; [2048, 2048], 1 above the diagonal, for the compressed modes, else of the size of the scores.

    The real operator does not read a compressed mask before it computes: another content makes wrong results.

    Source: the parameter ``atten_mask`` of the documentation; ``AnalyzeOptionalInput`` of the tiling.
    """
    refuse(mask.dtype in (torch.bool, torch.uint8), "atten_mask of bool or uint8", mask.dtype)
    shape = tuple(mask.shape)
    if sparse_mode in COMPRESSED_MODES:
        refuse(shape == COMPRESSED, f"the compressed atten_mask {COMPRESSED} with sparse_mode {sparse_mode}", shape)
        refuse(torch.equal(mask.bool(), _triangle(mask.device)), "1 above the diagonal, else 0", "another atten_mask")
        return
    refuse(sparse_mode != 6 or shape == (3072, 2048), "the compressed atten_mask (3072, 2048)", shape)
    scores = max(queries for queries, _ in documents), max(keys for _, keys in documents)
    allowed = [scores] if layout == "TND" else [scores, *((*first, *scores) for first in ((1, 1), (batch, 1)))]
    allowed += [] if layout == "TND" else [(batch, head_num, *scores)]
    refuse(sparse_mode == 6 or shape in allowed, f"an atten_mask of {allowed}", shape)


@functools.cache
def _triangle(device):
    return torch.ones(COMPRESSED, dtype=torch.bool, device=device).triu(1)


def check_window(sparse_mode, layout, pre, following, documents):
    """No query without a key: Sq <= Skv in mode 3 of TND, and bands that meet the scores.

    Outside TND mode 3 takes more queries than keys.

    Source: "sparseMode的约束" of ``aclnnFlashAttentionVarLenScore.md``; ``CheckPretokenAndNexttoken`` (TND) and
    ``SparseBandModeCheck`` of the tiling.
    """
    for queries, keys in documents:
        if layout == "TND" and sparse_mode == 3:
            refuse(queries <= keys, "at most as many queries as keys with sparse_mode 3", (queries, keys))
        if sparse_mode != 4:
            continue
        found = f"pre_tockens {pre}, next_tockens {following}, {queries} queries, {keys} keys"
        if layout == "TND":
            refuse(pre >= 0 and pre + following >= 0, "a band of at least one key", found)
            refuse(not queries or not keys or queries - following <= keys, "a key for each query", found)
            continue
        before, after = pre + queries - keys, following + keys - queries  # counted from the first query and key
        refuse(before >= 0 or (after >= -before and -before < keys), "a band that meets the scores", found)
        refuse(after >= 0 or (before >= -after and -after < queries), "a band that meets the scores", found)
