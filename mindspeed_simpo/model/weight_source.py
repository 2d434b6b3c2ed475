"""Sources of initial weights: safetensors files of a checkpoint, or a seeded random generator."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.mxfp4 import BLOCKS, GROUP, SCALES, dequantized, groups_of, stored_as
from mindspeed_simpo.model.naming import stored_shapes
from mindspeed_simpo.model.slots import Place, Span

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 3


@runtime_checkable
class WeightSource(Protocol):
    """A source of slices of the tensors that :func:`~mindspeed_simpo.model.naming.hf_tensors` lists."""

    def read(self, span: Span) -> Tensor:
        """The slice ``span`` in host memory, along the tensor's axis, or along axis 0 where the tensor has none."""


class SeededTensors(ABC):
    """Tensors with a constant initial value, or drawn at random; fp32.

    Each tensor has its own generator, seeded by ``seed`` and the tensor's name. A rank draws the complete tensor and
    takes its slice, so that the values do not depend on the layout.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @abstractmethod
    def draw(self, values: Tensor, generator: torch.Generator) -> None:
        """Overwrite ``values``, a complete tensor, with random values."""

    def read(self, span: Span) -> Tensor:
        """See :class:`WeightSource`; fp32."""
        tensor = span.tensor
        assert tensor is not None, "padding is not read"
        if tensor.initial is not None:
            whole = torch.full(tensor.shape, tensor.initial)
        else:
            whole = torch.empty(tensor.shape)
            digest = hashlib.sha256(f"{self.seed}:{tensor.name}".encode()).digest()
            self.draw(whole, torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
        return whole.narrow(tensor.axis or 0, span.start, span.length)


class RandomWeights(SeededTensors):
    """Weights from ``N(0, initializer_range^2)``, norms with the factor 1, zeros for biases but those of routers."""

    def __init__(self, model: ModelDescription, seed: int) -> None:
        super().__init__(seed)
        self.std = model.initializer_range

    def draw(self, values: Tensor, generator: torch.Generator) -> None:
        """See :meth:`SeededTensors.draw`."""
        values.normal_(0.0, self.std, generator=generator)


class SafetensorsFolder:
    """The safetensors files of a Hugging Face folder, checked on opening, then read slice by slice.

    Opening reads the headers only. The files must contain every tensor of the model, in its shape and in a
    floating-point dtype, and no other tensor; of weights in MXFP4, their blocks and scales. All ranks check the same
    files and fail with the same error.

    Args:
        folder: Hugging Face folder.
        model: Description of the model.

    Raises:
        ModelError: for absent, damaged or pickled weights, and for tensors that do not fit the description.
    """

    def __init__(self, folder: Path, model: ModelDescription) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in _shard_files(folder):
            self._files[file] = _open(folder / file)
            self._file_of.update(dict.fromkeys(self._files[file].keys(), file))
        self._kept: tuple[Any, Tensor] | None = None
        self._check_names(model)
        self.dtypes = {name: self._dtype(name, shape, model) for name, shape in stored_shapes(model).items()}
        """Name -> stored dtype of each tensor of the model, bf16 where it is quantized."""

    def read(self, span: Span) -> Tensor:
        """See :class:`WeightSource`; in the stored dtype, or in bf16 where the tensor is quantized."""
        assert span.tensor is not None, "padding is not read"
        if span.tensor.place is not None:
            return self._read_of_expert(span.tensor.place, span)
        part = self._slice(span.tensor.name)
        return part[:, span.start : span.stop] if span.tensor.axis == 1 else part[span.start : span.stop]  # type: ignore[no-any-return]

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)

    def _read_of_expert(self, place: Place, span: Span) -> Tensor:
        """Only what the span needs; gate and up, which lie in one slice, are read once if one after the other."""
        outputs, inputs = slice(0, place.shape[-1]), slice(0, place.shape[1])
        if span.tensor is not None and span.tensor.axis == 1:
            inputs = slice(span.start, span.stop)
        else:
            outputs = slice(span.start * place.step, span.stop * place.step)
        key = place.name, place.index, outputs, inputs
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._of_expert(place, outputs, inputs)
        return self._kept[1][place.first :: place.step]

    def _of_expert(self, place: Place, outputs: slice, inputs: slice) -> Tensor:
        """``[outputs, inputs]`` of the weight of one expert, or ``[outputs]`` of its bias."""
        if len(place.shape) == 2:
            return self._slice(place.name)[place.index, outputs]  # type: ignore[no-any-return]
        if place.name in self._file_of:
            return self._slice(place.name)[place.index, inputs, outputs].t()  # type: ignore[no-any-return]
        groups = groups_of(inputs.start, inputs.stop)
        blocks, scales = (self._slice(place.name + end)[place.index, outputs, groups] for end in (BLOCKS, SCALES))
        first = inputs.start - GROUP * groups.start
        return dequantized(blocks, scales)[:, first : first + inputs.stop - inputs.start]

    def _check_names(self, model: ModelDescription) -> None:
        names = {
            name + end
            for name, shape in stored_shapes(model).items()
            for end in (stored_as(shape) if _is_quantized(shape, model) else [""])
        }
        if missing := [name for name in names if name not in self._file_of]:
            raise ModelError(f"{self.folder}: the safetensors lack {_some(missing)}, which config.json calls for")
        # transformers ignores these too: the copy of a tied embedding, and rotary tables of old checkpoints
        tied = {"lm_head.weight"} if model.tied else set()
        unknown = [
            n
            for n in self._file_of
            if n not in names | tied and not n.endswith("rotary_emb.inv_freq") and not _is_beyond(n, model)
        ]
        if unknown:
            raise ModelError(
                f"{self.folder}: the safetensors hold {_some(unknown)}, which config.json does not describe "
                f"({model.family}, {model.num_layers} layers): the folder mixes two models, or the model is not "
                "supported"
            )

    def _dtype(self, name: str, shape: tuple[int, ...], model: ModelDescription) -> torch.dtype:
        if not _is_quantized(shape, model):
            return _DTYPES[self._checked(name, shape, _DTYPES)]
        for end, size in stored_as(shape).items():
            self._checked(name + end, size, ["U8"])
        return torch.bfloat16

    def _checked(self, name: str, shape: tuple[int, ...], dtypes: Iterable[str]) -> str:
        """The dtype of a stored tensor, whose shape and dtype are checked."""
        stored = self._slice(name)
        where = f"{self.folder / self._file_of[name]}: {name}"
        if tuple(stored.get_shape()) != shape:
            raise ModelError(f"{where} has shape {list(stored.get_shape())}; config.json gives {list(shape)}")
        if stored.get_dtype() not in dtypes:
            raise ModelError(f"{where} is stored as {stored.get_dtype()}; expected one of {', '.join(dtypes)}")
        return str(stored.get_dtype())


def _is_quantized(shape: tuple[int, ...], model: ModelDescription) -> bool:
    """Whether a tensor is the weight of all experts of a layer, in a checkpoint that has these in MXFP4."""
    return model.mxfp4 and len(shape) == 3


def _is_beyond(name: str, model: ModelDescription) -> bool:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return model.ignores_layers_beyond and layer is not None and int(layer[1]) >= model.num_layers


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
