"""Shapes and types in the package's annotations, checked at run time in every process of the tests."""

from jaxtyping import install_import_hook

# rooms of tensors: pydantic checks the options itself
_ROOMS = ("batch", "objectives", "loss", "data", "model", "training", "parallel", "device")


def check_shapes() -> None:
    """Call before the package is imported."""
    install_import_hook([f"mindspeed_simpo.{room}" for room in _ROOMS], "beartype.beartype")
