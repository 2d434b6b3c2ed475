"""The ranges of numeric keys in words, for help texts and documentation."""

from __future__ import annotations

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

_SIGNS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}


def describe_range(field: FieldInfo) -> str:
    """The values that a numeric key may take, such as ``>= 0, < 0.5``; empty where there is no bound."""
    return ", ".join(
        f"{sign} {getattr(item, attribute)}"
        for item in field.metadata
        for kind, (sign, attribute) in _SIGNS.items()
        if isinstance(item, kind)
    )
