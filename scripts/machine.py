"""Description of the machine of a measurement."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from pathlib import Path


def processor() -> str:
    """What the machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """What it was taken with, and when."""
    found = {name: version(name) for name in ("torch", "megatron-core", "transformers", "mindspeed-simpo")}
    return found | {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
