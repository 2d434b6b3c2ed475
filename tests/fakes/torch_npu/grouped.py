"""The grouped products that MindSpeed compiles with CANN (``mindspeed/ops/csrc/cann/gmm.cpp``), as loops on CPUs."""

import torch
from torch.library import impl


class _Operators:
    """What the compiled module has: lists of one tensor; group type 0 divides the rows of ``x``."""

    @staticmethod
    def npu_gmm(x, weight, bias, groups, group_type, group_list_type):
        assert group_type == 0, "only the division of rows stands in"
        assert not bias, "only products without a bias stand in"
        parts = zip(torch.split(x[0], _sizes(groups, group_list_type)), weight[0], strict=True)
        return [torch.cat([rows @ matrix for rows, matrix in parts])]

    @staticmethod
    def npu_gmm_backward(grad, x, weight, groups, group_list_type):
        sizes = _sizes(groups, group_list_type)
        grads, rows = torch.split(grad[0], sizes), torch.split(x[0], sizes)
        dx = torch.cat([part @ matrix.t() for part, matrix in zip(grads, weight[0], strict=True)])
        dw = torch.stack([part.t() @ own for part, own in zip(rows, grads, strict=True)])
        return [dx], [dw], []


class _Builder:
    @staticmethod
    def load():
        return _Operators


def _sizes(groups, group_list_type):
    """Rows of each group; list type 0 has the ends of the groups, type 1 their sizes."""
    groups = groups.tolist() if isinstance(groups, torch.Tensor) else list(groups)
    if group_list_type == 1:
        return groups
    return [end - start for start, end in zip([0, *groups], groups, strict=False)]


def install():
    """Let MindSpeed's operators run on CPU tensors."""
    from mindspeed.op_builder.builder import AS_LIBRARY
    from mindspeed.ops import gmm

    gmm.GMMFunction.builder = gmm.GMMFunction.builder2 = _Builder
    for name, operator in (
        ("npu_gmm.List", gmm._npu_gmm),
        ("npu_gmm.Tensor", gmm._npu_gmm),
        ("npu_gmm_v2.Tensor", gmm._npu_gmm_v2),
    ):
        impl(AS_LIBRARY, name, "CPU")(operator)
