"""Ascend NPUs: torch_npu and MindSpeed's adaptor of megatron-core, in versions that belong together."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mindspeed_simpo.errors import ConfigError

_BRANCHES = {
    "0.12": "a branch of MindSpeed that ends in core_r0.12.1 with megatron-core 0.12.1 (Megatron-LM core_v0.12.1)",
    "0.16": "MindSpeed's branch core_r0.16.0 with megatron-core 0.16.1",
}


def install_adaptor() -> None:
    """Import torch_npu and MindSpeed's adaptor of megatron-core; call before ``megatron`` is imported.

    The adaptor parses the command line when it is imported, and puts flags that it does not know on every
    ``TransformerConfig``; the engine's flags are hidden from it.

    Raises:
        ConfigError: where torch_npu, megatron-core or MindSpeed is not installed, or their versions do not belong
            together.
    """
    _import_torch_npu()
    core, mindspeed = core_version(), mindspeed_version()
    if core is None:
        raise ConfigError(f"device: npu needs megatron-core, which is not installed: install {_supported()}")
    line = _line(core)
    if line not in _BRANCHES or (mindspeed is not None and _line(mindspeed) != line):
        raise _unsupported(core, mindspeed, "these two do not belong together")
    with _without_command_line():
        try:
            importlib.import_module("mindspeed.megatron_adaptor")
        except ModuleNotFoundError as error:
            raise _not_found(error, core, mindspeed) from error
        except Exception as error:  # the adaptor patches whatever it finds, and fails in as many ways
            cause = f"MindSpeed's adaptor fails with {type(error).__name__}: {error}"
            raise _unsupported(core, mindspeed, cause) from error


def core_version() -> str | None:
    """Version of the megatron-core that would be imported; None where there is none. Imports nothing of it."""
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    return str(runpy.run_path(str(Path(spec.origin).with_name("package_info.py")))["__version__"])


def mindspeed_version() -> str | None:
    """Line of megatron-core that the MindSpeed in sight is written for, as its ``setup.py`` says; None if unknown."""
    spec = importlib.util.find_spec("mindspeed")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        setup = Path(folder).parent / "setup.py"
        found = re.search(r"^__version__ = '([\d.]+)'", setup.read_text(), re.MULTILINE) if setup.is_file() else None
        if found:
            return found[1]
    try:
        return importlib.metadata.version("mindspeed") if folders else None
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_torch_npu() -> None:
    try:
        importlib.import_module("torch_npu")
    except ImportError as error:
        raise ConfigError(
            f"device: npu needs torch_npu, which cannot be imported ({error}); install it for your CANN version, "
            "source CANN's set_env.sh, or set device: cpu"
        ) from error


def _not_found(error: ModuleNotFoundError, core: str, mindspeed: str | None) -> ConfigError:
    name = error.name or ""
    if name.split(".")[0] == "mindspeed":
        return ConfigError(
            f"device: npu needs MindSpeed, which cannot be imported ({error}); install {_supported()}, or set "
            "device: cpu"
        )
    if name.startswith("megatron.training"):
        return ConfigError(
            f"device: npu: this MindSpeed imports {name}, which the package megatron-core {core} does not contain: put "
            "a checkout of Megatron-LM, tag core_v0.12.1, on PYTHONPATH (docs/ascend.md)"
        )
    if name.split(".")[0] in ("megatron", "megatron_adaptor", "transformer_engine"):
        return _unsupported(core, mindspeed, f"MindSpeed's adaptor fails with {error}")
    return ConfigError(
        f"device: npu: MindSpeed needs the Python package {name}, which is not installed: pip install the packages "
        "that docs/ascend.md lists"
    )


def _unsupported(core: str, mindspeed: str | None, cause: str) -> ConfigError:
    written_for = f"written for megatron-core {mindspeed}" if mindspeed else "of an unknown version"
    return ConfigError(
        f"device: npu: found megatron-core {core} and a MindSpeed {written_for}: {cause}; install {_supported()}"
    )


def _supported() -> str:
    return ", or ".join(_BRANCHES.values())


def _line(version: str) -> str:
    return ".".join(version.split(".")[:2])


@contextmanager
def _without_command_line() -> Iterator[None]:
    kept = sys.argv[:]
    del sys.argv[1:]
    try:
        yield
    finally:
        sys.argv[:] = kept
