"""Formulas of several elementwise operations and reductions as one kernel on CUDA, by ``torch.compile``.

PyTorch for CUDA brings the compiler, Triton. A kernel reads each input once, where one operator after the other would
read and write every intermediate result. The first call with inputs of a new kind compiles, for seconds, and keeps the
kernel in the cache folder of ``torch.compile``; the number of tokens may change from call to call. Where nothing can be
compiled, or with ``TORCH_COMPILE_DISABLE=1`` in the environment, the formulas run operator by operator.

Source: https://docs.pytorch.org/docs/stable/generated/torch.compile.html
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])

DEVICE_TYPES = {"cuda"}
"""Types of the devices whose formulas are compiled."""
_OPTIONS: dict[str, Any] = {
    # results in bf16 are rounded where the operators round them
    "emulate_precision_casts": True,
}
_failed: set[Callable[..., Any]] = set()


def as_one_kernel(formula: Callable[..., Result], *arguments: Any) -> Result:
    """``formula(*arguments)``, compiled where the tensors are on CUDA.

    The compiled function is computed without autograd, inside of an autograd function of the caller. The last axis of
    tensors with several axes has a fixed size; the sizes of the others may differ from call to call.

    Args:
        formula: A function of a module, of tensors and constants, which changes none of its arguments that the caller
            reads afterwards.
        arguments: The first is a tensor.
    """
    if not _compiles(formula, arguments[0]):
        return formula(*arguments)
    kernel = _compiled(formula)
    detached = [_of_fixed_width(each.detach()) if isinstance(each, Tensor) else each for each in arguments]
    try:
        result: Result = kernel(*detached)
        return result
    except _failures() as error:
        # without this formula's kernel the results are the same
        _failed.add(formula)
        if len(_failed) == 1:
            logger.warning(
                "torch.compile cannot compile %s, which runs operator by operator, slower: %s",
                formula.__name__,
                " ".join(str(error).split("\n\n")[0].split()),
            )
        return formula(*arguments)


def _compiles(formula: Callable[..., Any], tensor: Tensor) -> bool:
    # no kernel is needed for no numbers, such as the tokens of an expert that none chose
    return tensor.device.type in DEVICE_TYPES and formula not in _failed and tensor.numel() > 0


def _of_fixed_width(tensor: Tensor) -> Tensor:
    if tensor.dim() > 1:
        torch._dynamo.mark_static(tensor, tensor.dim() - 1)
    return tensor


@functools.cache
def _compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    # the kernels are small: processes that compile them side by side, on every rank, would cost more than they save;
    # the compiler reads this when it is imported
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # constants of a model, such as the eps of its norms, are part of the kernel
    torch._dynamo.config.specialize_float = True
    return torch.compile(formula, dynamic=True, fullgraph=True, options=_OPTIONS)


@functools.cache
def _failures() -> tuple[type[BaseException], ...]:
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)
