"""What ``sample`` is asked for beside the configuration: its flags, with ranges and defaults. Imports nothing heavy."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mindspeed_simpo.errors import ConfigError

PAIRRM_FORMAT = "<|source|>{prompt}<|candidate1|>{first}<|candidate2|>{second}"
"""The text that PairRM, the ranker of SimPO's authors, reads."""


class SamplingSettings(BaseModel):
    """Sampling."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompts: str = Field(
        description="Rows with the prompts: a file, a folder or a hub id, in any form that data_path takes; answers "
        "in the rows are not read."
    )
    output: str = Field(description="JSONL file of pairs to write; what is done so far is kept in OUTPUT.work.")
    n: int = Field(5, ge=2, le=1024, description="Answers to each prompt.")
    temperature: float = Field(0.8, gt=0, description="Divisor of the logits before an answer's next token is drawn.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw from the most likely tokens that together have this probability."
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="Largest length of an answer, tokens. Default: what seq_length leaves after the prompt."
    )
    shard: str | None = Field(
        None, description="Take every N-th prompt from the I-th on, as I/N: for several hosts or rounds."
    )
    generator: Literal["auto", "vllm", "server", "transformers"] = Field(
        "auto",
        description="What generates the answers; auto: the server if one is named, else vLLM (on Ascend vLLM-Ascend) "
        "where it is installed, else transformers.",
    )
    vllm_options: dict[str, Any] | None = Field(
        None, description='Arguments of vLLM\'s LLM class, such as {"tensor_parallel_size": 8}.'
    )
    server: str | None = Field(
        None,
        description="Address of an OpenAI-compatible server that serves the model, such as http://host:8000/v1; the "
        "key, if it needs one, is read from the environment: OPENAI_API_KEY.",
    )
    server_model: str | None = Field(
        None, description="Name of the model on the server. Default: the only one that the server lists."
    )
    server_prompt: Literal["ids", "text", "chat"] = Field(
        "ids",
        description="What the server is sent: the prompt's token ids or rendered text (completions), or messages "
        "that the server renders itself (chat).",
    )
    concurrency: int = Field(32, ge=1, le=4096, description="Requests to the server at the same time.")
    batch_size: int = Field(
        32, ge=1, description="Sequences at the same time in this program's own models: transformers, reward, ranker."
    )
    reward_model: str | None = Field(
        None, description="Scores by a sequence classifier with one output: a Hugging Face folder or hub id."
    )
    ranker: str | None = Field(
        None,
        description="Scores by a pairwise ranker: a sequence classifier with one output that compares two answers.",
    )
    ranker_format: str = Field(
        PAIRRM_FORMAT, description="Text that the ranker reads, with {prompt}, {first} and {second}, as PairRM's."
    )
    scorer: str | None = Field(
        None, description="Scores by a program: a command that reads JSON lines on stdin and writes JSON lines."
    )
    scorer_columns: str | list[str] = Field(
        [], description="Columns of the prompts' rows that the program is given too, such as the right answer."
    )
    min_gap: float = Field(0.0, ge=0, description="Smallest gap between the scores of chosen and rejected.")
    max_length_ratio: float | None = Field(
        None,
        ge=1,
        description="Length control: chosen and rejected differ in tokens by this factor at most. Default: none.",
    )
    cut_answers: Literal["reject", "drop", "keep"] = Field(
        "reject",
        description="Answers that reach the largest length without an end: reject lets them be rejected but never "
        "chosen, drop leaves them out, keep treats them like the others.",
    )
    keep_answers: bool = Field(False, description="Write all answers of a prompt with their scores into its row.")
    timeout: float = Field(600.0, gt=0, description="Longest silence of the server or the scorer's program, seconds.")

    @classmethod
    def of(cls, values: dict[str, Any]) -> SamplingSettings:
        """Check the values that flags give.

        Raises:
            ConfigError: naming every wrong flag, what was found and what was expected.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            lines = [_explain(item) for item in error.errors(include_url=False)]
            raise ConfigError("\n".join(dict.fromkeys(lines))) from None

    @field_validator("shard")
    @classmethod
    def _shard_is_a_part(cls, value: str | None) -> str | None:
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", value) if value is not None else None
        if value is not None and not (match and 1 <= int(match[1]) <= int(match[2])):
            raise ValueError("expected I/N with I from 1 to N, such as 1/8")
        return value

    @field_validator("ranker_format")
    @classmethod
    def _format_has_all_parts(cls, value: str) -> str:
        missing = [part for part in ("{prompt}", "{first}", "{second}") if part not in value]
        if missing:
            raise ValueError(f"expected a text with {', '.join(missing)}")
        return value

    @field_validator("server")
    @classmethod
    def _server_is_an_address(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"https?://[^/\s]+", value):
            raise ValueError("expected an address such as http://host:8000/v1")
        if value is None:
            return None
        return value.rstrip("/") if re.match(r"https?://[^/]+/[^/]", value) else value.rstrip("/") + "/v1"

    @model_validator(mode="after")
    def _choices_agree(self) -> SamplingSettings:
        scorers = [name for name in ("reward_model", "ranker", "scorer") if getattr(self, name) is not None]
        if len(scorers) != 1:
            found = " and ".join(f"--{name.replace('_', '-')}" for name in scorers) or "none of them"
            raise ValueError(f"expected one of --reward-model, --ranker and --scorer, found {found}")
        if self.generator == "server" and self.server is None:
            raise ValueError("--generator server needs --server with an address such as http://host:8000/v1")
        if self.server is not None and self.generator not in ("auto", "server"):
            raise ValueError(f"--server goes with --generator server, found {self.generator}")
        if not self.output.endswith(".jsonl"):
            raise ValueError(f"--output: expected the name of a .jsonl file, which training reads, found {self.output}")
        return self

    @property
    def part(self) -> tuple[int, int]:
        """``shard`` as the index of the part, from 0, and the number of parts."""
        index, _, parts = (self.shard or "1/1").partition("/")
        return int(index) - 1, int(parts)

    @property
    def row_columns(self) -> list[str]:
        """``scorer_columns`` as a list."""
        return [self.scorer_columns] if isinstance(self.scorer_columns, str) else self.scorer_columns


def _explain(item: Any) -> str:
    message: str = item["msg"].removeprefix("Value error, ")
    if not item["loc"]:
        return message
    flag = f"--{str(item['loc'][0]).replace('_', '-')}"
    if item["type"] == "missing":
        return f"{flag} is required: {SamplingSettings.model_fields[item['loc'][0]].description}"
    found = item["input"] if isinstance(item["input"], str) else json.dumps(item["input"], default=str)
    return f"{flag}: {message[0].lower()}{message[1:]}, found {found[:200]}"
