"""Import hooks that add the flags and the trainers to MindSpeed-LLM. This module imports neither torch nor megatron.

MindSpeed-LLM parses the command line while ``mindspeed_llm`` is being imported, so the flags must be added during that
import. Its trainers must not be imported before MindSpeed-LLM imports them, because they would lack its patches.
Therefore the hooks run immediately after two modules of MindSpeed-LLM have been executed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from mindspeed_simpo.errors import ConfigError

FEATURES_MODULE = "mindspeed_llm.features_manager"
LAUNCHER_MODULE = "mindspeed_llm.tasks.posttrain.launcher"


class _AfterImport(MetaPathFinder):
    """Calls each module's action once the module has been executed."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]) -> None:
        self._actions = actions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        action = self._actions.get(fullname)
        spec = PathFinder.find_spec(fullname, path, target) if action else None
        if action is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            action(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Install the import hooks; call before ``mindspeed_llm`` is imported. A second call has no effect.

    Raises:
        ConfigError: where ``mindspeed_llm`` has already been imported, or its backend is not Megatron.
    """
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    if FEATURES_MODULE in sys.modules:
        raise ConfigError("mindspeed_llm was imported before mindspeed_simpo: its command line is parsed already")
    backend = os.environ.get("TRAINING_BACKEND", "mcore")
    if backend.lower() != "mcore":
        raise ConfigError(
            f"TRAINING_BACKEND={backend}: mindspeed_simpo runs on MindSpeed-LLM's Megatron backend only; unset it"
        )
    sys.meta_path.insert(0, _AfterImport({FEATURES_MODULE: _add_features, LAUNCHER_MODULE: _add_trainers}))


def _add_features(_: ModuleType) -> None:
    from mindspeed_simpo.integrations.mindspeed_llm import compat

    compat.check()
    from mindspeed_simpo.integrations.mindspeed_llm import features

    features.insert()


def _add_trainers(launcher: ModuleType) -> None:
    if FEATURES_MODULE not in sys.modules:
        raise ConfigError(
            "this MindSpeed-LLM has no mindspeed_llm.features_manager (2.1.0 or older): "
            "mindspeed_simpo needs 2.2.0, 2.3.0 or 26.x"
        )
    upstream = launcher.get_trainer

    def get_trainer(stage: str) -> object:
        from mindspeed_simpo.integrations.mindspeed_llm import select

        return select.trainer() or upstream(stage)

    launcher.get_trainer = get_trainer  # type: ignore[attr-defined]
