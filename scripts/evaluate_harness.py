"""Score an exported folder on benchmarks by EleutherAI's lm-evaluation-harness, beside the model that it began from.

    python -m scripts.evaluate_harness HF_DIR --base MODEL --tasks gsm8k,ifeval --output results.json

HF_DIR is what `export_hf: true` or `mindspeed-simpo export` wrote: a model, or adapters for peft. Prompts are rendered
by the chat template of the folder, without a system turn. Tasks are those of the harness, and those in the YAML files
of --include-path. The harness is not a dependency: pip install "lm_eval[hf]==0.4.13".
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mindspeed_simpo.device import find_device
from mindspeed_simpo.errors import ConfigError, ModelError, SimpoError
from mindspeed_simpo.model.folder import read_json, resolve_model

INSTALL = 'lm-evaluation-harness is not installed: pip install "lm_eval[hf]==0.4.13"'
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Folder:
    """A folder that transformers or peft loads."""

    path: Path
    base: str | None = None
    """The model that the adapters in the folder belong to; None where the folder holds a whole model."""

    def model_args(self, dtype: str) -> dict[str, Any]:
        """Arguments of the harness's Hugging Face model."""
        if self.base is None:
            return {"pretrained": str(self.path), "dtype": dtype}
        return {"pretrained": self.base, "peft": str(self.path), "tokenizer": str(self.path), "dtype": dtype}


def open_folder(path: Path) -> Folder:
    """Check that a folder holds what an export writes.

    Raises:
        ModelError: naming what is missing.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is no folder: give what `export_hf: true` or `mindspeed-simpo export` wrote")
    adapters = (path / "adapter_config.json").is_file()
    needed = ["adapter_model.safetensors"] if adapters else ["config.json", *_weight_files(path)]
    missing = [name for name in needed if not (path / name).is_file()]
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        missing.append("tokenizer.json")
    if missing:
        raise ModelError(
            f"{path} is no exported model: it lacks {', '.join(missing)}. A folder of checkpoints is exported by "
            "`mindspeed-simpo export --checkpoint DIR --output HF_DIR`"
        )
    if not adapters:
        return Folder(path)
    base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    try:
        return Folder(path, str(resolve_model(str(base), weights=True)))
    except ModelError as error:
        raise ModelError(
            f"{path / 'adapter_config.json'}: the adapters belong to base_model_name_or_path {base}, which is not "
            f"there: {error}"
        ) from None


def _weight_files(path: Path) -> list[str]:
    if not (path / INDEX).is_file():
        return ["model.safetensors"]
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{path / INDEX} has no weight_map")
    return sorted(set(weight_map.values()))


def task_manager(names: list[str], include_path: Path | None) -> Any:
    """The harness's register of tasks. Its own fifteen thousand are read only where a name asks for them.

    Raises:
        ConfigError: naming a task that does not exist.
    """
    from lm_eval.tasks import TaskManager

    folder = str(include_path) if include_path is not None else None
    manager = TaskManager(include_path=folder, include_defaults=False)
    if set(names) - set(manager.all_tasks):
        manager = TaskManager(include_path=folder)
    for name in names:
        if not manager.match_tasks([name]):
            raise ConfigError(f"--tasks: there is no task {name}; `lm_eval ls tasks` lists those of the harness")
    return manager


def score(folder: Folder, arguments: argparse.Namespace, manager: Any) -> dict[str, Any]:
    """The harness's results of one model, task by task.

    Raises:
        ModelError: where the tokenizer has no chat template and one is asked for.
        ConfigError: where the data of a task cannot be read.
    """
    import lm_eval
    from datasets.exceptions import DatasetsError
    from lm_eval.models.huggingface import HFLM

    model = HFLM(**folder.model_args(arguments.dtype), device=arguments.device, batch_size=arguments.batch_size)
    if model.device.type != arguments.device.partition(":")[0]:  # the harness takes another one without a word
        raise ConfigError(f"--device: {arguments.device} is not there; the harness would take {model.device}")
    if arguments.chat_template and model.tokenizer.chat_template is None:
        raise ModelError(
            f"{folder.path} has no chat template, which its training used: give --no-chat-template for plain prompts"
        )
    try:
        found = lm_eval.simple_evaluate(
            model,
            tasks=list(arguments.tasks),
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            apply_chat_template=arguments.chat_template,
            fewshot_as_multiturn=arguments.chat_template,
            task_manager=manager,
            log_samples=False,
        )
    except (DatasetsError, FileNotFoundError, ConnectionError) as error:
        raise ConfigError(f"--tasks: the data of a task cannot be read: {error}") from None
    assert found is not None, "one process runs the harness"
    del model
    gc.collect()
    return {name: _metrics(values) for name, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of a task, by ``metric,filter``; an error that the harness does not estimate is None."""
    return {name: value if isinstance(value, int | float) else None for name, value in values.items() if "," in name}


def table(results: dict[str, dict[str, Any]]) -> Table:
    """A row for each number of each task: of the model, of its base, and the difference."""
    names = list(results)
    shown = Table("task", "metric", *names, *(["difference"] if len(names) == 2 else []))
    for task, metrics in results[names[0]].items():
        for metric, value in metrics.items():
            name, _, kind = metric.partition(",")
            if name.endswith("_stderr") or value is None:
                continue
            cells = [_cell(results[of].get(task, {}), name, kind) for of in names]
            if len(names) == 2:
                other = results[names[1]].get(task, {}).get(metric)
                cells.append("-" if other is None else f"{value - other:+.4f}")
            shown.add_row(escape(task), escape(name if kind == "none" else f"{name} ({kind})"), *cells)
    return shown


def _cell(metrics: dict[str, Any], name: str, kind: str) -> str:
    value, error = (metrics.get(f"{each},{kind}") for each in (name, f"{name}_stderr"))
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.incomplete")
    new.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)


def run(arguments: argparse.Namespace) -> None:
    """Score the folders, print the table and write the file."""
    folders = {"model": open_folder(arguments.folder)}
    if arguments.base is not None:
        folders["base"] = open_folder(resolve_model(arguments.base, weights=True))
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ConfigError(INSTALL) from None
    manager = task_manager(arguments.tasks, arguments.include_path)
    results = {name: score(folder, arguments, manager) for name, folder in folders.items()}
    settings = ("tasks", "num_fewshot", "limit", "chat_template", "device", "dtype")
    if arguments.output is not None:
        content = {
            "folders": {name: str(folder.path) for name, folder in folders.items()},
            "settings": {name: getattr(arguments, name) for name in settings},
            "versions": {name: version(name) for name in ("lm_eval", "transformers", "torch")},
            "results": results,
        }
        write(arguments.output, content)
    Console(width=None if sys.stdout.isatty() else 200).print(table(results))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m scripts.evaluate_harness", description=__doc__.split("\n\n")[0])
    made.add_argument("folder", type=Path, metavar="HF_DIR", help="exported model, or adapters for peft")
    made.add_argument("--base", metavar="MODEL", help="model to compare with, such as the one before: folder or hub id")
    made.add_argument(
        "--tasks", type=lambda text: text.split(","), default=["gsm8k"], metavar="A,B", help="default: gsm8k"
    )
    made.add_argument("--include-path", type=Path, metavar="DIR", help="folder with YAML files of further tasks")
    made.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question; default: the task's")
    made.add_argument("--limit", type=int, metavar="N", help="first N questions of each task, to try it out")
    made.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: 8")
    made.add_argument("--device", default=None, help="such as cuda:1; default: the first of npu, cuda and cpu")
    made.add_argument("--dtype", default="auto", help="such as bfloat16; default: that of the weights")
    made.add_argument("--output", type=Path, metavar="FILE", help="JSON file of the results")
    made.add_argument("--no-chat-template", dest="chat_template", action="store_false", help="prompts as plain text")
    return made


def main() -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args()
    arguments.device = arguments.device or {"npu": "npu:0"}.get(name := find_device(), name)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        run(arguments)
    except SimpoError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
