"""Where a model's tensors come from: safetensors shards, or a seeded generator."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.description import ModelSpec
from mindspeed_simpo.model.naming import HFTensor, hf_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 3


@runtime_checkable
class WeightSource(Protocol):
    """Gives slices of the tensors that :func:`~mindspeed_simpo.model.naming.hf_tensors` lists."""

    def read(self, tensor: HFTensor, rank: int, size: int) -> Tensor:
        """The slice of tensor-parallel rank ``rank`` of ``size``, in host memory."""


class RandomWeights:
    """Normal weights of the model's ``initializer_range``, ones for norms, zeros for biases.

    Each tensor has a generator of its own, seeded by the seed and the tensor's name: a rank builds the whole tensor and
    takes its slice, so the weights are the same whatever the layout.
    """

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self.std = spec.initializer_range
        self.seed = seed

    def read(self, tensor: HFTensor, rank: int, size: int) -> Tensor:
        """See :class:`WeightSource`; fp32."""
        if len(tensor.shape) == 1:
            whole = torch.zeros(tensor.shape) if tensor.name.endswith(".bias") else torch.ones(tensor.shape)
        else:
            digest = hashlib.sha256(f"{self.seed}:{tensor.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            whole = torch.empty(tensor.shape).normal_(0.0, self.std, generator=generator)
        if tensor.axis is None:
            return whole
        start, stop = tensor.range(rank, size)
        return whole.narrow(tensor.axis, start, stop - start)


class SafetensorsFolder:
    """The safetensors of a Hugging Face folder, checked whole when opened, then read slice by slice.

    Opening reads only headers: every tensor of the model must be there once, in its shape and in a floating-point
    dtype, and no tensor may be left over. All ranks check the same files, so all fail alike.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in _shard_files(folder):
            self._files[file] = _open(folder / file)
            self._file_of.update(dict.fromkeys(self._files[file].keys(), file))
        self.dtypes = {tensor.name: self._check(tensor) for tensor in self._expected(spec)}
        """Stored dtype of each tensor of the model."""

    def read(self, tensor: HFTensor, rank: int, size: int) -> Tensor:
        """See :class:`WeightSource`; in the stored dtype."""
        part = self._slice(tensor.name)
        if tensor.axis is None:
            return part[:]  # type: ignore[no-any-return]
        start, stop = tensor.range(rank, size)
        return part[start:stop] if tensor.axis == 0 else part[:, start:stop]  # type: ignore[no-any-return]

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)

    def _expected(self, spec: ModelSpec) -> list[HFTensor]:
        expected = hf_tensors(spec)
        names = {tensor.name for tensor in expected}
        if missing := [name for name in names if name not in self._file_of]:
            raise ModelError(f"{self.folder}: the safetensors lack {_some(missing)}, which config.json calls for")
        # transformers drops these too: a tied head's copy of the embedding, and rotary tables of old checkpoints
        tied = {"lm_head.weight"} if spec.tied else set()
        unknown = [n for n in self._file_of if n not in names | tied and not n.endswith("rotary_emb.inv_freq")]
        if unknown:
            raise ModelError(
                f"{self.folder}: the safetensors hold {_some(unknown)}, which config.json does not describe "
                f"({spec.family}, {spec.num_layers} layers): the folder mixes two models, or the model is not supported"
            )
        return expected

    def _check(self, tensor: HFTensor) -> torch.dtype:
        stored = self._slice(tensor.name)
        where = f"{self.folder / self._file_of[tensor.name]}: {tensor.name}"
        if tuple(stored.get_shape()) != tensor.shape:
            raise ModelError(f"{where} has shape {list(stored.get_shape())}; config.json gives {list(tensor.shape)}")
        if stored.get_dtype() not in _DTYPES:
            raise ModelError(f"{where} is stored as {stored.get_dtype()}; expected one of {', '.join(_DTYPES)}")
        return _DTYPES[stored.get_dtype()]


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _shard_files(folder: Path) -> list[str]:
    index = folder / INDEX_FILE
    if not index.is_file():
        if (folder / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {_some(pickles)} is pickle, which is never read: save the model as safetensors" if pickles else ""
        raise ModelError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} exists{hint}")
    try:
        files = sorted({str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a safetensors index: {error!r}") from None
    if missing := [file for file in files if Path(file).name != file or not (folder / file).is_file()]:
        raise ModelError(f"{folder}: {INDEX_FILE} names {_some(missing)}, which the folder does not hold")
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is truncated or not a safetensors file: {error}; fetch it again") from None
