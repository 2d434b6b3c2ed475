"""Shapes and types in the package's annotations, checked at run time in every process of the tests."""

from pathlib import Path

from jaxtyping import install_import_hook

_PACKAGE = Path(__file__).parents[1] / "mindspeed_simpo"


def check_shapes() -> None:
    """Call before the package is imported."""
    install_import_hook(_modules_with_shapes(), "beartype.beartype")


def _modules_with_shapes() -> list[str]:
    """The modules whose annotations have shapes, apart from the plug-in's, which run inside MindSpeed-LLM.

    The other modules have small functions that are called often, and a check of each call costs time.
    """
    files = [path for path in _PACKAGE.rglob("*.py") if "integrations" not in path.parts]
    named = [path.relative_to(_PACKAGE.parent).with_suffix("") for path in files if "jaxtyping" in path.read_text()]
    return [".".join(path.parts) for path in named]
