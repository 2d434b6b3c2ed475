"""Export of the trained model as a folder for ``AutoModelForCausalLM.from_pretrained``, or of its adapters for peft."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.adapter_folder import CONFIG_FILE, write_adapter
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.megatron.weights import gather_hf_tensors, gather_merged, unwrap
from mindspeed_simpo.model.naming import stored_shapes
from mindspeed_simpo.model.tokenizer_files import write_tokenizer
from mindspeed_simpo.model.weight_source import INDEX_FILE, SafetensorsFolder
from mindspeed_simpo.parallel import Groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SHARD_BYTES = 5_000_000_000
_COPIED = ("generation_config.json",)


def export_hf(
    models: Sequence[torch.nn.Module],
    description: ModelDescription,
    groups: Groups,
    *,
    source: Path,
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json, safetensors and the tokenizer with its chat template.

    A collective of all ranks; only global rank 0 writes. Each weight has its dtype in ``source``, or the dtype of
    config.json where ``source`` has no weights, so that an export directly after import is bit-identical; weights in
    MXFP4 are written in bf16. Adapters are merged into the weights in fp32. All files are written to a temporary hidden
    folder beside ``output`` and renamed at the end; an earlier export is replaced.

    Args:
        models: This rank's model chunks, with or without wrappers.
        description: Description of the model.
        groups: Process groups that the models were built with.
        source: Hugging Face folder that the model was built from; config.json is copied with the dtype and
            architecture.
        output: Folder to write.
        tokenizer: See :func:`~mindspeed_simpo.model.tokenizer_files.write_tokenizer`.
        chat_template: The template that takes the place of the tokenizer's own; None keeps that.
        max_shard_bytes: Largest size of a safetensors file; rank 0 needs this much host memory.

    Raises:
        ModelError: where ``output`` exists and is no earlier export, or cannot be written.
    """
    adapters = unwrap(models[0]).adapters
    if adapters is None:
        tensors = gather_hf_tensors(models, description, groups)
    else:
        tensors = gather_merged(models, description, adapters, groups)

    def write(folder: Path) -> None:
        dtypes = _stored_dtypes(source, description)
        _write_weights(folder, tensors, description, dtypes, max_shard_bytes)
        _write_config(folder, source, description, dtypes)
        write_tokenizer(source, folder, tokenizer, chat_template)

    _write_on_first_rank(output, tensors, write)


def export_adapters(
    models: Sequence[torch.nn.Module],
    description: ModelDescription,
    groups: Groups,
    *,
    source: Path,
    base: str,
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
) -> None:
    """Write the adapters as a folder for peft, in fp32, with the tokenizer and its chat template.

    A collective of all ranks; see :func:`export_hf`.

    Args:
        models: This rank's model chunks, with or without wrappers; they have adapters.
        description: Description of the model.
        groups: Process groups that the models were built with.
        source: Hugging Face folder that the model was built from.
        base: What the adapters name as their model: a folder or a hub id.
        output: Folder to write.
        tokenizer: See :func:`~mindspeed_simpo.model.tokenizer_files.write_tokenizer`.
        chat_template: See :func:`export_hf`.

    Raises:
        ModelError: where ``output`` exists and is no earlier export, or cannot be written.
    """
    adapters = unwrap(models[0]).adapters
    assert adapters is not None, "the models have adapters"
    tensors = gather_hf_tensors(models, description, groups, slots_of=adapters.slots_of)

    def write(folder: Path) -> None:
        write_adapter(folder, dict(tensors), adapters, description, base)
        write_tokenizer(source, folder, tokenizer, chat_template)

    _write_on_first_rank(output, tensors, write)


def _write_on_first_rank(output: Path, tensors: Iterator[tuple[str, Tensor]], write: Callable[[Path], None]) -> None:
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


def _stored_dtypes(source: Path, description: ModelDescription) -> dict[str, torch.dtype]:
    try:
        return SafetensorsFolder(source, description).dtypes
    except ModelError:
        return dict.fromkeys(stored_shapes(description), getattr(torch, description.dtype))


def _write_weights(
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    description: ModelDescription,
    dtypes: dict[str, torch.dtype],
    max_shard_bytes: int,
) -> None:
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in stored_shapes(description).items()}
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


def _write_config(folder: Path, source: Path, description: ModelDescription, dtypes: dict[str, torch.dtype]) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    used = list(dtypes.values())
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(max(set(used), key=used.count)).removeprefix("torch.")
    config["architectures"] = [description.architecture]
    if description.mxfp4:
        del config["quantization_config"]
    _write_json(folder / "config.json", config)
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
