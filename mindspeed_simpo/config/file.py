"""Configuration files: strict YAML and flags -> :class:`Config`, or one error message with every wrong key."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.options.sources import ENTRY_ERROR
from mindspeed_simpo.config.recipes import configuration_path
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.objectives import DEFAULT_STAGE


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a YAML file, override its keys by ``overrides`` (from flags) and validate the result.

    ``path`` may be the name of a recipe. A ``chat_template`` that lies beside the file is that one.

    Raises:
        ConfigError: one message that names the file, every wrong key, what was found and what was expected.
    """
    path = configuration_path(str(path))
    overrides = overrides or {}
    return validate(read_configuration(path) | overrides, where=str(path), flags=overrides)


def read_configuration(path: Path) -> dict[str, Any]:
    """The keys of a configuration file, unvalidated; a ``chat_template`` that lies beside the file is that one.

    Raises:
        ConfigError: as :func:`read_mapping`.
    """
    raw = read_mapping(path)
    template = raw.get("chat_template")
    if isinstance(template, str) and (path.parent / template).is_file():
        raw["chat_template"] = str(path.parent / template)
    return raw


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file of ``key: value`` lines.

    Raises:
        ConfigError: where the file cannot be read or is something else; the message names file and line.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        # values that YAML allows and Python does not: a 13th month, too many digits, lists nested too deeply
        raise ConfigError(f"{path}: not a readable value: {str(error).splitlines()[0]}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(raw).__name__}")
    return raw


def validate(values: dict[str, Any], where: str, flags: Iterable[str] = ()) -> Config:
    """Build a :class:`Config` from plain values.

    Args:
        values: Keys and their values, unvalidated.
        where: Source of the values, such as the file; prefix of messages about keys that are not in ``flags``.
        flags: Keys that command-line flags have set.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    lines: list[str] = []
    config = None
    try:
        config = Config(**values)
    except ValidationError as error:
        stage = str(values.get("stage", DEFAULT_STAGE))
        lines = [_explain(item, where, set(flags), stage) for item in error.errors(include_url=False)]
    if values.get("data_path") is None and values.get("eval_data_path") is None:
        lines.append(_required("data_path", where))
    if config is None or lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    return config


def require_training_data(config: Config, where: str) -> None:
    """Refuse a configuration that names only evaluation data.

    Raises:
        ConfigError: naming the key.
    """
    if config.data_path is None:
        raise ConfigError(_required("data_path", where))


_OTHER_NAMES = {
    "gamma": "gamma_beta_ratio",
    "simpo_gamma": "gamma_beta_ratio",
    "learning_rate": "lr",
    "max_length": "seq_length",
    "max_steps": "train_iters",
    "epochs": "num_train_epochs",
    "packing": "batching",
    "load_best_model_at_end": "metric_for_best_model",
    "train_file": "data_path",
    "per_device_train_batch_size": "micro_batch_size",
}
"""Names of keys in other trainers -> names here. Another unknown key is tried with the stage as prefix: `beta` ->
`simpo_beta`."""


class _StrictLoader(yaml.SafeLoader):
    """YAML without aliases and without duplicate keys.

    Nested aliases can expand a few lines to gigabytes. PyYAML would silently drop all but the last duplicate.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported here", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key `{key_node.value}` appears twice", problem_mark=key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def unknown_key(key: str, where: str, stage: str) -> str:
    """The message about a key that does not exist, with the nearest one that does."""
    other = _OTHER_NAMES.get(key, f"{stage}_{key}")
    known = [other] if other in Config.model_fields else list(Config.model_fields)
    nearest = known if len(known) == 1 else difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean `{nearest[0]}`?" if nearest else "`mindspeed-simpo train --help` lists all keys"
    return f"{where}: unknown key `{key}`; {hint}"


def _explain(item: Any, where: str, flags: set[str], stage: str) -> str:
    key = str(item["loc"][0]) if item["loc"] else ""
    if item["type"] == "extra_forbidden":
        return unknown_key(key, where, stage)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == ENTRY_ERROR:
        name = f"--{key.replace('_', '-')}" if key in flags else f"{where}: {key}"
        return "\n".join(f"{name}{place}: {_shortened(text)}" for place, text in item["ctx"]["problems"])
    if item["type"] == "missing":
        return _required(key, where)
    if not key:
        return f"{where}: {message}"
    place = f"--{key.replace('_', '-')}" if key in flags else f"{where}: `{key}`"
    return f"{place}: {message[0].lower()}{message[1:]}, found {_brief(item['input'])}"


def _required(key: str, where: str) -> str:
    return f"{where}: `{key}` is required: {Config.model_fields[key].description}"


def _brief(value: Any) -> str:
    return _shortened(repr(value))


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
