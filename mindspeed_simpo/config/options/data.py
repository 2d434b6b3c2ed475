"""The options of the data."""

from __future__ import annotations

import json
import re
from datetime import date
from typing import Any, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from mindspeed_simpo.config.options.base import DEFAULT_TEMPLATE_DATE, Options, option
from mindspeed_simpo.config.options.sources import DataSource, check_numbers, named, read_sources, split_weights

Paths = str | DataSource | list[str | DataSource]


class DataOptions(Options):
    """Data."""

    data_path: Paths | None = option(
        None,
        effect="result",
        description="Training pairs: a file, a folder, a hub id, or a list of these; an entry may be a mapping (path, "
        "split, weight or pairs, map_keys, name). `evaluate` with eval_data_path needs none.",
    )
    eval_data_path: Paths | None = option(
        None,
        effect="result",
        description="Evaluation pairs, in the same forms as data_path, without weight. Default: the eval part of "
        "split, if any.",
    )
    eval_decontaminate: bool = option(
        False,
        effect="result",
        description="Leave the held-out pairs out whose prompt is the prompt of a training pair.",
    )
    split: str = option(
        "100,0",
        effect="result",
        description="Relative sizes of the train and eval parts of data_path, in the order of the data, such as "
        "95,5; a "
        "third part, as in 969,30,1, is not used.",
    )
    map_keys: dict[str, str | dict[str, str]] | None = option(
        None,
        effect="result",
        description="Column names of the data: {canonical name: column}, as in MindSpeed-LLM's --map-keys.",
    )
    chat_template_kwargs: dict[str, Any] | None = option(
        None,
        effect="result",
        description="Variables for the chat template, such as {enable_thinking: false}; the template must read them.",
    )
    chat_template_date: str = option(
        DEFAULT_TEMPLATE_DATE,
        effect="result",
        description="Day, YYYY-MM-DD, that a chat template which prints today's date takes for today.",
    )
    seq_length: int = option(
        2048, ge=8, effect="result", description="Largest length of a sequence (prompt and one response), tokens."
    )
    max_prompt_length: int | None = option(
        None,
        ge=1,
        effect="result",
        description="Length below which truncation does not cut a prompt, tokens. Default: half of seq_length.",
    )
    truncation: Literal["error", "drop", "keep_end", "keep_start"] = option(
        "error",
        effect="result",
        description="Pairs longer than seq_length: error ends the run, drop leaves them out, keep_end and "
        "keep_start cut the "
        "prompt and keep its end or its start.",
    )
    data_errors: Literal["fail", "drop"] = option(
        "fail",
        effect="result",
        description="Malformed examples, empty responses and identical responses: fail ends the run, drop leaves these "
        "examples out and reports their number.",
    )
    data_cache_dir: str | None = option(
        None,
        effect="none",
        description="Folder for cached token ids and reference log-probabilities. Default: ~/.cache/mindspeed_simpo.",
    )
    num_workers: int = option(
        0, ge=0, le=256, effect="none", description="Worker processes for tokenisation; 0 means one per CPU core."
    )

    @field_validator("split")
    @classmethod
    def _split_is_weights(cls, value: str) -> str:
        split_weights(value)
        return value

    @field_validator("chat_template_date")
    @classmethod
    def _is_a_day(cls, value: str) -> str:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", value) is None:
            raise ValueError("expected a day as YYYY-MM-DD")
        try:
            date.fromisoformat(value)
        except ValueError as error:
            raise ValueError(f"expected a day as YYYY-MM-DD; {error}") from None
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _is_plain(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected values that JSON has (texts, numbers, true, false, lists); {error}") from None
        return value

    @field_validator("data_path", "eval_data_path", mode="before")
    @classmethod
    def _entries_are_sources(cls, value: Any) -> Any:
        if value is not None and value in ("", []):
            raise ValueError("expected a path, or a list of at least one path")
        return None if value is None else read_sources(value)

    @field_validator("data_path", "eval_data_path")
    @classmethod
    def _numbers_agree(cls, value: Paths | None, info: ValidationInfo) -> Paths | None:
        if value is not None:
            check_numbers(_as_sources(value), evaluated=info.field_name == "eval_data_path")
        return value

    @model_validator(mode="after")
    def _lengths_agree(self) -> DataOptions:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.seq_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below seq_length ({self.seq_length}): "
                "the response needs room"
            )
        return self

    @model_validator(mode="after")
    def _prompts_can_be_compared(self) -> DataOptions:
        if self.eval_decontaminate and self.data_path is None:
            raise ValueError("eval_decontaminate compares held-out prompts with training prompts: set data_path")
        if self.eval_decontaminate and not self.has_held_out:
            raise ValueError(
                "eval_decontaminate: no pairs are held out: set eval_data_path, or give split a second weight"
            )
        return self

    @property
    def has_held_out(self) -> bool:
        """Whether there are held-out pairs: ``eval_data_path``, or a second weight of a source's ``split``."""
        return self.eval_data_path is not None or any(
            split_weights(source.sizes or self.split)[1] > 0 for source in self.sources
        )

    @property
    def prompt_limit(self) -> int:
        """``max_prompt_length`` with its default, tokens."""
        return self.max_prompt_length if self.max_prompt_length is not None else self.seq_length // 2

    @property
    def sources(self) -> list[DataSource]:
        """The sources of ``data_path``, each with its name."""
        return named(_as_sources(self.data_path))

    @property
    def eval_sources(self) -> list[DataSource]:
        """The sources of ``eval_data_path``, each with its name."""
        return named(_as_sources(self.eval_data_path))


def _as_sources(paths: Paths | None) -> list[DataSource]:
    entries = paths if isinstance(paths, list) else [] if paths is None else [paths]
    return [DataSource(path=entry) if isinstance(entry, str) else entry for entry in entries]
