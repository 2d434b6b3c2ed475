"""Counted bytes of tensors: those that autograd saves for a backward, and the peak of a computation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StoredBytes(saved_tensors_hooks):
    """Within this context, storages that autograd holds for a backward; each counts once, however often it is saved."""

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        """Leave out the storages of ``excluded``: parameters are there anyway."""
        self.now = 0
        self.peak = 0
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        self._holders: Counter[int] = Counter()
        super().__init__(lambda tensor: _Held(self, tensor), lambda held: held.tensor)

    def __enter__(self) -> StoredBytes:
        super().__enter__()
        return self

    def add(self, storage: int, num_bytes: int) -> None:
        """One more saved tensor has this storage."""
        if storage in self._excluded:
            return
        self._holders[storage] += 1
        if self._holders[storage] == 1:
            self.now += num_bytes
            self.peak = max(self.peak, self.now)

    def remove(self, storage: int, num_bytes: int) -> None:
        """One saved tensor less has this storage."""
        if storage in self._excluded:
            return
        self._holders[storage] -= 1
        if self._holders[storage] == 0:
            self.now -= num_bytes


class _Held:
    def __init__(self, counter: StoredBytes, tensor: Tensor) -> None:
        self.counter, self.tensor = counter, tensor
        storage = tensor.untyped_storage()
        self.storage, self.num_bytes = storage.data_ptr(), storage.nbytes()
        counter.add(self.storage, self.num_bytes)

    def __del__(self) -> None:
        self.counter.remove(self.storage, self.num_bytes)


class PeakBytes(TorchDispatchMode):
    """Within this context, storages that operators return: the most bytes alive at once, and the largest one.

    What was there before, and what an operator makes and frees inside of itself, is not seen.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        """Leave out the storages of ``existing``."""
        super().__init__()
        self.peak = 0
        self.largest = 0
        self._existing = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._existing:
            return
        self._alive = {key: item for key, item in self._alive.items() if not item[0].expired()}
        self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._alive.values()))
