"""The ranges of numeric options as text, for help texts and documentation."""

from __future__ import annotations

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

_SIGNS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}


def describe_range(field: FieldInfo) -> str:
    """The range of a numeric option, such as ``>= 0, < 0.5``; an empty text where the option has no bound."""
    return ", ".join(
        f"{sign} {getattr(item, attribute)}"
        for item in field.metadata
        for kind, (sign, attribute) in _SIGNS.items()
        if isinstance(item, kind)
    )
