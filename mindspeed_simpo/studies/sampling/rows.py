"""The rows of pairs, in columns that training reads under the same configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_simpo.data.column_names import ColumnNames
from mindspeed_simpo.data.conversations import ExampleReader
from mindspeed_simpo.data.problems import ExampleError
from mindspeed_simpo.studies.sampling.prompts import Rendering
from mindspeed_simpo.studies.sampling.record import SamplingPrompt


class PairRows:
    """Makes rows, and reads each of them back as training does.

    Args:
        map_keys: Column names of the configuration; rows have these names.
        rendering: Of the configuration.
    """

    def __init__(self, map_keys: Mapping[str, str | dict[str, str]] | None, rendering: Rendering) -> None:
        self._names = ColumnNames.of(map_keys)
        self._reader = ExampleReader(map_keys, takes_images=rendering.takes_images)
        self._rendering = rendering

    def row(
        self, prompt: SamplingPrompt, chosen: str, rejected: str, further: Mapping[str, Any]
    ) -> tuple[dict[str, Any], tuple[int, int]]:
        """The row of a pair, and the tokens of its two answers.

        Args:
            prompt: Of the pair.
            chosen: Text of the better answer.
            rejected: Text of the worse one.
            further: Columns that training does not read.

        Raises:
            ExampleError: where training would refuse the row, or would read another prompt than was sampled.
        """
        answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
        row = self._columns(prompt, *answers) | dict(further)
        encoded = self._rendering.pair(self._reader.read(row))
        if list(encoded.prompt_ids) != list(prompt.ids):
            raise ExampleError("malformed", "the prompt of the pair is not the one that the answers were sampled to")
        return row, (len(encoded.chosen_ids), len(encoded.rejected_ids))

    def _columns(self, prompt: SamplingPrompt, chosen: Any, rejected: Any) -> dict[str, Any]:
        columns = self._names.columns
        row: dict[str, Any] = dict.fromkeys(self._names.required.values())
        row[(columns["prompt"] or columns["messages"] or ("prompt",))[0]] = prompt.messages
        if prompt.prompt.tools is not None:
            row[(columns["tools"] or ("tools",))[0]] = prompt.prompt.tools
        if columns["chosen"] and columns["rejected"] and columns["chosen"] != columns["rejected"]:
            return row | {columns["chosen"][0]: chosen, columns["rejected"][0]: rejected}
        # one column that holds both
        return row | {(columns["chosen"] or columns["response"] or ("output",))[0]: [chosen, rejected]}
