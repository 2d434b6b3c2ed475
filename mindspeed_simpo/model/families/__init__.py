"""The supported model families, one module each: ``config.json`` -> description, and the names of the tensors.

Every module of this package is a supported family; there is no other list.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from mindspeed_simpo.model.settings import Family


@functools.cache
def families() -> dict[str, Family]:
    """Every supported family by its ``model_type``."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    found: list[Family] = [module.FAMILY for module in modules]
    return {family.model_type: family for family in found}
