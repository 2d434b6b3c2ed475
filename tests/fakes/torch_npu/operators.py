"""Fused operators of torch_npu but attention, from their public documentation, in plain PyTorch."""

import torch

from torch_npu.refusals import FLOATS, require

ROTATED_WIDTH = 896
ROTATED_HEADS = 1000
ROTATED_ANGLE_GRADIENTS = 1024
_NORM_DTYPES = {
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    *((dtype, dtype) for dtype in FLOATS),
}


def npu_rms_norm(self, gamma, epsilon=1e-6):
    """``(self * rstd * gamma, rstd)``, ``rstd = 1 / sqrt(mean(self^2) + epsilon)`` in fp32 over gamma's dims.

    The result has the dtype of ``self``; ``rstd`` is fp32 with ones for gamma's dims, and has no gradient.

    Source: ``docs/zh/custom_APIs/torch_npu/（beta）torch_npu-npu_rms_norm.md`` of op-plugin, its table of dtypes;
    ``norm/rms_norm/docs/aclnnRmsNorm.md`` of CANN ops-nn, for 1 to 8 axes where op-plugin's text says 2 to 8.
    """
    dtypes, shapes = (self.dtype, gamma.dtype), (tuple(self.shape), tuple(gamma.shape))
    require(dtypes in _NORM_DTYPES, "npu_rms_norm", f"one of the pairs {sorted(map(str, _NORM_DTYPES))}", dtypes)
    require(1 <= gamma.dim() <= self.dim() <= 8, "npu_rms_norm", "1 to 8 axes, no more of gamma", shapes)
    require(shapes[0][-gamma.dim() :] == shapes[1] and gamma.numel(), "npu_rms_norm", "gamma of the last axes", shapes)
    dims = tuple(range(-gamma.dim(), 0))
    rstd = self.float().square().mean(dims, keepdim=True).add(epsilon).rsqrt()
    return ((self.float() * rstd).to(self.dtype) * gamma).to(self.dtype), rstd.detach()


def npu_swiglu(self, dim=-1):
    """``silu(a) * b`` with ``self = [a, b]`` along ``dim``.

    Source: ``docs/zh/custom_APIs/torch_npu/（beta）torch_npu-npu_swiglu.md`` of op-plugin and
    ``activation/swi_glu/docs/aclnnSwiGlu.md`` of CANN ops-nn: neither takes tensors that are not contiguous.
    """
    require(self.dtype in FLOATS, "npu_swiglu", "fp16, bf16 or fp32", self.dtype)
    require(1 <= self.dim() <= 8 and self.numel(), "npu_swiglu", "1 to 8 axes, not empty", tuple(self.shape))
    require(-self.dim() <= dim < self.dim(), "npu_swiglu", f"dim within {self.dim()} axes", dim)
    require(self.shape[dim] % 2 == 0, "npu_swiglu", f"an even axis {dim}", tuple(self.shape))
    require(self.is_contiguous(), "npu_swiglu", "a contiguous tensor", f"strides {self.stride()}")
    gate, up = self.chunk(2, dim=dim)
    return torch.nn.functional.silu(gate) * up


def npu_grouped_matmul(x, weight, *, group_list, split_item=0, group_type, group_list_type=0):
    """``[x_g @ weight_g]`` of groups of one tensor each, concatenated; ``group_list`` has the end of each group.

    Groups of the first axis of ``x`` (``group_type`` 0) have a matrix each in ``weight``; groups of the summed axis (2)
    give a matrix each, and ``x`` is then a transposed view. The results are one tensor (``split_item`` 2 or 3).

    Source: page of ``torch_npu.npu_grouped_matmul`` in the documentation of Ascend Extension for PyTorch 7.0.0;
    ``docs/ops/gmm.md`` of MindSpeed for the two types of groups. Empty tensors are refused to be safe.
    """
    name, [left], [right] = "npu_grouped_matmul", x, weight
    require(left.dtype in FLOATS and left.dtype == right.dtype, name, "one of fp16, bf16, fp32", (left, right))
    require(split_item in (2, 3) and group_list_type == 0, name, "one result, ends of groups", split_item)
    require(group_list.dtype == torch.int64, name, "int64 ends", group_list.dtype)
    require(left.numel() and right.numel(), name, "tensors that are not empty", (left.shape, right.shape))
    sizes = group_list.diff(prepend=group_list.new_zeros(1)).tolist()
    if group_type == 0:
        require(left.is_contiguous() and sum(sizes) == len(left), name, "rows of all groups", left.shape)
        return [torch.cat([part @ each for part, each in zip(left.split(sizes), right, strict=True)])]
    require(
        group_type == 2 and left.t().is_contiguous() and right.is_contiguous(), name, "a transposed view", left.shape
    )
    require(sum(sizes) == len(right), name, "rows of all groups", right.shape)
    return [torch.stack([a @ b for a, b in zip(left.split(sizes, 1), right.split(sizes), strict=True)])]


def npu_rotary_mul(self, r1, r2, rotary_mode="half", rotate=None):
    """``self * r1 + turned(self) * r2``; ``half`` turns the two halves, ``interleave`` neighbours.

    The cosines ``r1`` and sines ``r2`` are cast to the dtype of ``self``. Their documented range, [-1, 1], is not
    checked by the operator.

    Source: ``docs/zh/custom_APIs/torch_npu/torch_npu-npu_rotary_mul.md`` and
    ``op_plugin/ops/opapi/RotaryMulKernelNpuOpApi.cpp`` of op-plugin.
    """
    require(rotary_mode in ("half", "interleave"), "npu_rotary_mul", "half or interleave", rotary_mode)
    dtypes = [each.dtype for each in (self, r1, r2)]
    require(all(dtype in FLOATS for dtype in dtypes), "npu_rotary_mul", "fp16, bf16 or fp32", dtypes)
    _check_angles(self, r1, r2, rotary_mode)
    if rotate is not None:
        raise NotImplementedError("a matrix of rotation")
    r1, r2 = r1.to(self.dtype), r2.to(self.dtype)
    if rotary_mode == "half":
        first, second = self.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-self[..., 1::2], self[..., ::2]), dim=-1).flatten(-2)
    return self * r1 + turned * r2


def _check_angles(heads, cosines, sines, mode):
    """Shapes: 3 or 4 axes, an even width below 896, and angles that one of the layouts explains.

    =======  ====================================  =================================  ==========================
    layout   ``half``                              ``interleave``                     sizes
    =======  ====================================  =================================  ==========================
    BNSD     11SD, B1SD, BNSD, where B N <= 8 S    11SD                               ``half``: B and N below
    BSND     1S1D, BS1D, BSND                      1S1D                               1000; ``interleave``: B N
    SBND     S11D, SB1D, SBND                      S11D                               below 1000; B N up to 1024
    TND      T1D, TND                              T1D                                for gradients of angles
    =======  ====================================  =================================  ==========================

    Source: "约束说明" of the document of ``npu_rotary_mul``; ``posembedding/rotary_position_embedding/`` of CANN
    ops-transformer: ``docs/aclnnRotaryPositionEmbedding.md`` (for 8 S, where half the width fills blocks of 32 bytes),
    ``op_host/rope_interleaved_tiling.cpp`` and ``op_host/rope_rotate_half_tiling.cpp``.
    """
    shapes = [tuple(each.shape) for each in (heads, cosines, sines)]
    expect = [shapes[0], "and angles", *shapes[1:]]
    require(heads.dim() in (3, 4), "npu_rotary_mul", "3 or 4 axes", expect)
    require(shapes[1] == shapes[2] and len(shapes[1]) == heads.dim(), "npu_rotary_mul", "angles of one shape", expect)
    width = heads.shape[-1]
    require(width == shapes[1][-1], "npu_rotary_mul", "angles of the width of the heads", expect)
    require(width % 2 == 0 and width < ROTATED_WIDTH, "npu_rotary_mul", f"an even width below {ROTATED_WIDTH}", expect)
    trained = cosines.requires_grad or sines.requires_grad
    reads = [
        layout
        for layout in (("BNSD", "BSND", "SBND") if heads.dim() == 4 else ("TND",))
        if _explains(layout, dict(zip(layout, shapes[0], strict=True)), shapes[1], mode, trained, heads.element_size())
    ]
    require(reads, "npu_rotary_mul", f"heads and angles of a layout of mode {mode}", expect)


def _explains(layout, sizes, angles, mode, trained, item_bytes):
    """Whether the heads may have this layout, angles of this shape considered."""
    position = "T" if layout == "TND" else "S"
    free = [axis for axis in layout[:-1] if axis != position]
    broadcast = [free] if mode == "interleave" else [[], ["N"], free]
    shapes = {tuple(1 if axis in axes else sizes[axis] for axis in layout) for axes in broadcast}
    batch, heads = sizes.get("B", 1), sizes["N"]
    few = batch * heads < ROTATED_HEADS if mode == "interleave" else max(batch, heads) < ROTATED_HEADS
    if layout == "BNSD" and mode == "half" and sizes["D"] // 2 * item_bytes % 32 == 0 and angles[:2] == (1, 1):
        few &= batch * heads <= 8 * sizes["S"]
    return angles in shapes and few and not (trained and batch * heads > ROTATED_ANGLE_GRADIENTS)
