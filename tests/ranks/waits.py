"""Counts host synchronisations with the device through torch's dispatcher."""

import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2", "item")
"""Operators whose result, or its size, an accelerator has to compute before the host can go on."""


class Waits(TorchDispatchMode):
    """Records the operators of ``WAITS``; the backward of the thread that enters it is seen too.

    ``on_host`` names a function of the package whose tensors lie in host memory, whatever the device.
    """

    def __init__(self, on_host=None):
        super().__init__()
        self.on_host = on_host
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if (name in WAITS and not _of_the_host(self.on_host)) or _searches_a_mask(name, args):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def _searches_a_mask(name, args):
    if name not in ("index", "index_put", "index_put_"):
        return False
    # one number put where a mask is true, as megatron-core's embedding does, is a masked fill, which searches nothing
    fills = name != "index" and args[2].numel() == 1
    return not fills and any(index is not None and index.dtype == torch.bool for index in args[1])


def _of_the_host(function):
    # the CPU generators that stand in for an accelerator's are compared when megatron-core switches between them; the
    # number of Adam's updates is a tensor in host memory, whatever the device of the parameters
    stack = traceback.extract_stack(limit=40)
    files = [frame.filename for frame in stack]
    if any("mindspeed_simpo/" in frame.filename and frame.name == function for frame in stack):
        return True
    return any(file.endswith("tensor_parallel/random.py") or "/torch/optim/" in file for file in files)
