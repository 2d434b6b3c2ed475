"""A stand-in for torch_npu on a machine without an NPU: what MindSpeed and MindSpeed-LLM name of it, on the CPU.

Put the folder above on PYTHONPATH. Importing this module names ``torch.npu``; importing ``contrib.transfer_to_npu``
redirects ``torch.cuda`` and NCCL to the CPU and gloo, as the real one redirects them to the NPU and HCCL. Operators
compute what the public documentation of torch_npu says, with plain PyTorch, and refuse what it or the sources refuse;
each check names where that is written.
"""

import sys

import torch

from torch_npu import _C, contrib, hccl, npu, utils
from torch_npu.attention import npu_fusion_attention, npu_fusion_attention_grad
from torch_npu.operators import npu_grouped_matmul, npu_rms_norm, npu_rotary_mul, npu_swiglu
from torch_npu.products import npu_all_gather_base_mm, npu_mm_reduce_scatter_base

__version__ = "2.7.1"
unsupported_dtype = ()
__all__ = [
    "_C",
    "contrib",
    "hccl",
    "npu",
    "npu_all_gather_base_mm",
    "npu_fusion_attention",
    "npu_fusion_attention_grad",
    "npu_grouped_matmul",
    "npu_mm_reduce_scatter_base",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_swiglu",
    "unsupported_dtype",
    "utils",
]

torch.npu = npu
sys.modules["torch.npu"] = npu
