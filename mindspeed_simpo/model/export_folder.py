"""The folder of an export: written beside its place and renamed at the end, by rank 0."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.adapter_folder import CONFIG_FILE
from mindspeed_simpo.model.tokenizer_files import write_tokenizer
from mindspeed_simpo.model.weight_source import INDEX_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SHARD_BYTES = 5_000_000_000
CARD_FILE = "README.md"
_COPIED = ("generation_config.json",)


@dataclass(frozen=True)
class Companions:
    """What stands beside the weights of an export: tokenizer, chat template and model card."""

    source: Path
    """Hugging Face folder that the model was built from."""
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    """The template that takes the place of the tokenizer's own; None keeps that."""
    card: str | None = None
    """Content of ``README.md``; None writes none."""

    def write(self, folder: Path) -> None:
        """Write the files into an existing folder."""
        write_tokenizer(self.source, folder, self.tokenizer, self.chat_template)
        if self.card is not None:
            (folder / CARD_FILE).write_text(self.card, encoding="utf-8")


def write_on_first_rank(output: Path, tensors: Iterator[tuple[str, Tensor]], write: Callable[[Path], None]) -> None:
    """Call ``write`` on global rank 0 with a new folder, which then takes the place of ``output``; a collective.

    Args:
        output: Folder to write; an earlier export is replaced.
        tensors: What ``write`` reads; exhausting it is a collective, and on other ranks it yields nothing.
        write: Writes the files.

    Raises:
        ModelError: where ``output`` exists and is no earlier export, or cannot be written.
    """
    if torch.distributed.get_rank() != 0:
        for _ in tensors:
            raise AssertionError("only rank 0 gathers tensors")
        return
    try:
        _check_replaceable(output)
        with _replacing(output) as folder:
            write(folder)
    except Exception as error:
        for _ in tensors:  # take part in the remaining collectives, or the other ranks hang
            pass
        if isinstance(error, OSError):
            raise ModelError(f"{output} cannot be written: {error}") from None
        raise


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``output`` at the end of the context."""
    new, old = (output.with_name(f".{output.name}.{suffix}") for suffix in ("incomplete", "replaced"))
    try:
        for left_over in (new, old):
            shutil.rmtree(left_over, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        if output.exists():
            output.rename(old)
        new.rename(output)
    finally:
        for left_over in (new, old):
            shutil.rmtree(left_over, ignore_errors=True)


def _check_replaceable(output: Path) -> None:
    if output.is_dir():
        names = {path.name for path in output.iterdir()}
        exported = not names.isdisjoint(("config.json", CONFIG_FILE))
        if not names or (exported and not any(path.is_dir() for path in output.iterdir())):
            return
    elif not output.exists():
        return
    raise ModelError(f"{output} exists and is not an earlier export: choose a new folder, or remove it")


def write_weights(
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write safetensors files, and their index where there are several.

    Args:
        folder: Folder to write in.
        tensors: Name and values of each tensor.
        shapes: Of every tensor.
        dtypes: Of every tensor in the files.
        max_shard_bytes: Largest size of a file; this much host memory is needed.
    """
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        get_storage_id=lambda size: None,  # noqa: ARG005
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    pending: dict[str, dict[str, Tensor]] = {file: {} for file in plan.filename_to_tensors}
    for name, tensor in tensors:
        file = plan.tensor_to_filename[name]
        # copy=True: a gathered tensor may share memory with a parameter
        pending[file][name] = tensor.to(device="cpu", dtype=dtypes[name], copy=True).contiguous()
        if len(pending[file]) == len(plan.filename_to_tensors[file]):
            save_file(pending.pop(file), folder / file, metadata={"format": "pt"})
    assert not pending, f"tensors are missing from {sorted(pending)}"
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / INDEX_FILE, index)


def write_config(
    folder: Path,
    source: Path,
    architecture: str,
    dtypes: Mapping[str, torch.dtype],
    removed: Sequence[str] = (),
) -> None:
    """Write config.json and generation_config.json as in ``source``, with the architecture and the commonest dtype.

    Args:
        folder: Folder to write in.
        source: Hugging Face folder that the model was built from.
        architecture: Class of transformers.
        dtypes: Of the written tensors.
        removed: Keys that the written config.json does not have.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    used = list(dtypes.values())
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(max(set(used), key=used.count)).removeprefix("torch.")
    config["architectures"] = [architecture]
    for name in removed:
        del config[name]
    _write_json(folder / "config.json", config)
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
