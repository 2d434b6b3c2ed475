"""The base of the option groups: how an option declares its effect, and the checks that all options share."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

ContextParallelAlgo = Literal["gathered", "megatron_cp_algo", "ulysses_cp_algo"]
BackendName = Literal["megatron", "fsdp"]
BatchingForm = Literal["padded", "packed", "prefix_shared"]
BatchingName = Literal["auto", BatchingForm]
DEFAULT_TEMPLATE_DATE = "2024-07-26"
CPU_CHUNK_TOKENS = 512

Effect = Literal["result", "arithmetic", "layout", "none"]
"""What a change of the option's value affects.

``result``: the result of training, by definition. ``arithmetic``: the operations that compute the same result;
``config.supported`` must claim each value. ``layout``: the division of the work over ranks. ``none``: nothing that
training computes."""


def option(default: Any = ..., *, effect: Effect, **facts: Any) -> Any:
    """A field of an option group: pydantic's ``Field``, with the declared effect."""
    return Field(default, json_schema_extra={"effect": effect}, **facts)


def effect_of(field: FieldInfo) -> Effect:
    """The declared effect of an option.

    Raises:
        TypeError: where the option declares no effect or an unknown one.
    """
    extra = field.json_schema_extra
    effect = extra.get("effect") if isinstance(extra, dict) else None
    if effect not in get_args(Effect):
        raise TypeError(f"an option must declare its effect, one of {', '.join(get_args(Effect))}; found {effect!r}")
    return effect  # type: ignore[return-value]


def takes_bool(field: FieldInfo) -> bool:
    """Whether an option's values are true and false."""
    return bool in (field.annotation, *get_args(field.annotation))


class Options(BaseModel):
    """Base of the option groups; creating a subclass raises TypeError where a field declares no effect."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for name, field in cls.model_fields.items():
            try:
                effect_of(field)
            except TypeError as error:
                raise TypeError(f"{cls.__name__}.{name}: {error}") from None

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _no_path_has_a_null(cls, value: Any) -> Any:
        if "\0" in str(value):
            raise ValueError("expected a text without null characters")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _flags_are_not_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not takes_bool(cls.model_fields[str(info.field_name)]):
            raise ValueError("expected a value, not true or false")
        return value
