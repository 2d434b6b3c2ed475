"""What pyproject.toml cannot say: an editable installation gets the start-up hook too."""

import shutil
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

HOOK = Path(__file__).parent / "mindspeed_simpo" / "integrations" / "mindspeed_llm" / "mindspeed_simpo.pth"


class EditableWheelWithHook(editable_wheel):
    """Adds ``mindspeed_simpo.pth``, which ``[tool.setuptools.data-files]`` brings into ordinary wheels only."""

    def _run_build_commands(self, dist_name: str, unpacked_wheel: Any, *args: Any) -> Any:
        shutil.copy(HOOK, Path(unpacked_wheel))
        return super()._run_build_commands(dist_name, unpacked_wheel, *args)


setup(cmdclass={"editable_wheel": EditableWheelWithHook})
