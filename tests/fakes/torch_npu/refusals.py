"""How the stand-in refuses: with the exception class of the real one, and the words ``expected`` and ``found``."""

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that the fused operators take."""


def require(condition, operator, expected, found):
    """RuntimeError, as TORCH_CHECK and a failed aclnn call raise it, unless ``condition`` holds."""
    if not condition:
        raise RuntimeError(f"{operator}: expected {expected}, found {found}")
