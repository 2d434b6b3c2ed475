"""Answers by vLLM in this process; on Ascend NPUs vLLM-Ascend, a plug-in of the same package."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_simpo.data.problems import first_line
from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.studies.sampling.record import Answer, Draw, SamplingPrompt

_PROMPTS_A_CALL = 256
"""Prompts whose answers are lost at most where the run is killed; enough to keep an engine busy."""


class VllmGenerator:
    """vLLM's offline engine, which is given token ids.

    Each prompt has its own seed. vLLM does not promise the same answers for the same seed in another batch.

    Args:
        folder: Hugging Face folder.
        draw: How answers are drawn.
        seq_length: Longest sequence, tokens.
        options: Further arguments of ``LLM``; they go before those given here.

    Raises:
        ModelError: where vLLM refuses the model or an option.
    """

    def __init__(self, folder: Path, draw: Draw, seq_length: int, options: Mapping[str, Any]) -> None:
        from vllm import LLM, SamplingParams

        self._draw, self._params = draw, SamplingParams
        arguments = {"model": str(folder), "seed": draw.seed, "max_model_len": seq_length} | dict(options)
        try:
            self._engine: Any = LLM(**arguments)
        except Exception as error:
            raise ModelError(f"{folder}: vLLM cannot load the model: {first_line(error)}") from None

    def answers(self, prompts: Sequence[SamplingPrompt], missing: frozenset[int]) -> Iterator[tuple[int, list[Answer]]]:
        """See :class:`~mindspeed_simpo.studies.sampling.record.Generator`."""
        wanted = [prompt for prompt in prompts if prompt.index in missing]
        for start in range(0, len(wanted), _PROMPTS_A_CALL):
            part = wanted[start : start + _PROMPTS_A_CALL]
            outputs = self._engine.generate(
                [{"prompt_token_ids": list(prompt.ids)} for prompt in part],
                [self._params_of(prompt) for prompt in part],
                use_tqdm=False,
            )
            for prompt, output in zip(part, outputs, strict=True):
                yield prompt.index, [self._answer(each, prompt.limit) for each in output.outputs]

    def close(self) -> None:
        """Give the engine's memory back, as far as vLLM does so."""
        del self._engine
        gc.collect()

    def _answer(self, output: Any, limit: int) -> Answer:
        return self._draw.answer(output.token_ids, limit, ended=output.finish_reason == "stop")

    def _params_of(self, prompt: SamplingPrompt) -> Any:
        draw = self._draw
        return self._params(
            n=draw.n,
            temperature=draw.temperature,
            top_p=draw.top_p,
            max_tokens=prompt.limit,
            seed=draw.seed_of(prompt),
            stop_token_ids=sorted(draw.end_ids),
            detokenize=False,
        )
