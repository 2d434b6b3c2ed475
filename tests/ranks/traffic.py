"""Counts the communication of process groups through torch's dispatcher."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# operator -> position of the tensors whose bytes are what one rank brings in or, for a gather, takes out
_OPERATORS = {
    "allreduce_": 0,
    "_allgather_base_": 0,
    "allgather_": 0,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "send": 0,
    "broadcast_": 0,
    "alltoall_base_": 0,
    "alltoall_": 0,
}


class Traffic(TorchDispatchMode):
    """Collectives while it is entered: ``calls`` and ``bytes`` by ``(operator, name of the group)``.

    ``groups`` names process groups; a group that is not among them counts as ``other``.
    """

    def __init__(self, **groups):
        super().__init__()
        self.names = {group.group_name: name for name, group in groups.items()}
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name in _OPERATORS:
            tensors = args[_OPERATORS[name]]
            flat = [tensors] if isinstance(tensors, torch.Tensor) else _flatten(tensors)
            groups = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
            group = torch.distributed.ProcessGroup.unbox(groups[0]).group_name
            key = (name.strip("_"), self.names.get(group, "other"))
            self.calls[key] += 1
            self.bytes[key] += sum(tensor.numel() * tensor.element_size() for tensor in flat)
        return func(*args, **(kwargs or {}))


def _flatten(tensors):
    for item in tensors:
        if isinstance(item, torch.Tensor):
            yield item
        else:
            yield from _flatten(item)
