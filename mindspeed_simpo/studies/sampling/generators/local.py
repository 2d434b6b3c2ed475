"""Answers by transformers' own generation, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.studies.sampling.record import Answer, Draw, SamplingPrompt

_BELOW_ONE = 1 - 2**-20


class TransformersGenerator:
    """Batches of prompts, padded on the left, each prompt ``n`` times.

    A token is drawn by inverting the distribution function at a uniform number, of which each answer has a sequence of
    its own that follows from its seed: what else is in the batch does not matter. Which prompts share a batch follows
    from all prompts of the run, not from those that are left.

    Args:
        folder: Hugging Face folder.
        adapters: Folder of peft whose adapters are merged into the weights, or None.
        draw: How answers are drawn.
        batch_size: Sequences of a batch; at least ``n``.
        device: Of the model.
        dtype: Of the weights.

    Raises:
        ModelError: where transformers cannot load the model.
    """

    def __init__(
        self,
        folder: Path,
        adapters: str | None,
        draw: Draw,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._draw, self._device = draw, device
        self._prompts_a_batch = max(1, batch_size // draw.n)
        self._model = _load(folder, adapters, dtype).to(device).eval()
        # repetition penalties and the like of the model's folder are no part of the distribution that is trained
        self._model.generation_config = _configured()

    def answers(self, prompts: Sequence[SamplingPrompt], missing: frozenset[int]) -> Iterator[tuple[int, list[Answer]]]:
        """See :class:`~mindspeed_simpo.studies.sampling.record.Generator`."""
        ordered = sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.index))
        for start in range(0, len(ordered), self._prompts_a_batch):
            batch = ordered[start : start + self._prompts_a_batch]
            if any(prompt.index in missing for prompt in batch):
                yield from self._batch(batch)

    @torch.inference_mode()
    def _batch(self, batch: Sequence[SamplingPrompt]) -> Iterator[tuple[int, list[Answer]]]:
        draw = self._draw
        longest, limit = max(len(prompt.ids) for prompt in batch), max(prompt.limit for prompt in batch)
        padding = min(draw.end_ids)
        rows = [[padding] * (longest - len(prompt.ids)) + list(prompt.ids) for prompt in batch for _ in range(draw.n)]
        mask = [[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch for _ in range(draw.n)]
        seeds = [draw.seed_of(prompt, answer) for prompt in batch for answer in range(draw.n)]
        processors = LogitsProcessorList([TemperatureLogitsWarper(draw.temperature)])
        if draw.top_p < 1:
            processors.append(TopPLogitsWarper(draw.top_p))
        processors.append(_Drawn(seeds, limit, longest, self._device))
        ids: Tensor = self._model.generate(
            input_ids=torch.tensor(rows, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            logits_processor=processors,
            generation_config=_configured(
                do_sample=False, max_new_tokens=limit, eos_token_id=sorted(draw.end_ids), pad_token_id=padding
            ),
        )
        generated = ids[:, longest:].tolist()
        for place, prompt in enumerate(batch):
            own = generated[place * draw.n : (place + 1) * draw.n]
            yield prompt.index, [draw.answer(answer, prompt.limit) for answer in own]


class _Drawn(LogitsProcessor):
    """Leave one token of each row: that of the first ``v`` with ``P(token <= v) > u``, u uniform in [0, 1)."""

    def __init__(self, seeds: Sequence[int], limit: int, start: int, device: torch.device) -> None:
        rows = [torch.rand(limit, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        # rounding must not carry the product with the total probability up to the total
        self._uniform = (torch.stack(rows) * _BELOW_ONE).to(device)
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._start
        cumulative = torch.softmax(scores.float(), dim=-1).cumsum(dim=-1)
        threshold = self._uniform[:, step : step + 1] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def _configured(**values: Any) -> GenerationConfig:
    return GenerationConfig(**values)  # type: ignore[no-untyped-call]


def takes_images(config: PreTrainedConfig) -> bool:
    """Whether transformers has a class for images and text with this configuration."""
    return type(config) in AutoModelForImageTextToText._model_mapping


def _auto_class(config: PreTrainedConfig) -> Any:
    return AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM


def _load(folder: Path, adapters: str | None, dtype: torch.dtype) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = _auto_class(config).from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True)
        if adapters is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapters).merge_and_unload()
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{folder}: transformers cannot load the model: {reason}") from None
    return model
