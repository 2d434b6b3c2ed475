"""Answers to held-out prompts by transformers' generation, with the current weights of the run.

Rank 0 puts the whole weights together, on any layout, in a model of transformers beside the one that is trained, which
is not touched. The other ranks wait without the time limit of training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mindspeed_simpo.data.dataset import PairDataset
from mindspeed_simpo.data.template import ChatFormat, TemplateSettings
from mindspeed_simpo.model.folder import resolve_model
from mindspeed_simpo.parallel.collectives import of_first_rank
from mindspeed_simpo.training.session import Session

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A generated answer."""

    index: int
    """Of the held-out pair, from 0."""
    prompt: str
    """The rendered prompt, as the model reads it."""
    answer: str
    """The answer, without special tokens."""
    tokens: int
    """Tokens of the answer, the end of the turn included."""
    ended: bool
    """Whether the answer ended by itself, not at ``eval_generate_max_new_tokens``."""


class AnswerGenerator:
    """Generates the answers of each evaluation.

    Args:
        session: The run's session.
        data: The held-out pairs.
    """

    def __init__(self, session: Session, data: PairDataset) -> None:
        self._session, self._data = session, data
        config = session.config
        self._indices = range(min(config.eval_generate, len(data)))
        self._dtype = torch.bfloat16 if config.bf16_in_use else torch.float32
        self._skip(self._obstacle() if session.is_main else None)

    def generate(self) -> list[Answer]:
        """The answers, on rank 0; none on the others, and where generation is impossible. A collective."""
        if self._skipped is not None:
            return []
        # the copies are in host memory: a gathered tensor may share memory with a parameter
        weights = {
            name: tensor.to(device="cpu", dtype=self._dtype, copy=True)
            for name, tensor in self._session.backend.whole_weights()
        }
        answers: list[Answer] = []
        problem = None
        if self._session.is_main:
            try:
                answers = self._generate(weights)
            except Exception as error:  # a run does not end because an answer cannot be generated
                problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self._session.device.release_memory()
        self._skip(problem)
        return answers

    def _skip(self, problem: str | None) -> None:
        """Generate nothing from now on where rank 0 has a problem, which it says once; a collective."""
        self._skipped = of_first_rank(problem, self._session.groups.control)
        if self._skipped is not None and self._session.is_main:
            logger.warning("eval_generate: no answers are generated: %s", self._skipped)

    def _obstacle(self) -> str | None:
        if self._data.has_images:
            return "the held-out prompts have images"
        memory = self._session.device.memory_bytes()
        try:
            with torch.device("meta"):
                model = self._model_class().from_config(self._model_config())
        except Exception as error:  # as in generate
            return f"transformers cannot build the model: {type(error).__name__}: {' '.join(str(error).split())}"
        needed = sum(parameter.numel() for parameter in model.parameters()) * self._dtype.itemsize
        if memory is not None and needed > memory:
            return (
                f"a copy of the whole model has {needed / 2**30:.3g} GiB, and the device of rank 0 has "
                f"{memory / 2**30:.3g} GiB"
            )
        return None

    def _model_class(self) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        images = self._session.backend.description.takes_images
        return AutoModelForImageTextToText if images else AutoModelForCausalLM

    def _model_config(self) -> Any:
        from transformers import AutoConfig

        folder = resolve_model(self._session.config.model_name_or_path, weights=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):  # the current weights are not quantized
            del config.quantization_config
        return config

    def _generate(self, weights: dict[str, torch.Tensor]) -> list[Answer]:
        session, config = self._session, self._model_config()
        with _undisturbed(session):
            model = (
                self._model_class()
                ._model_mapping[type(config)]
                .from_pretrained(None, config=config, state_dict=weights, dtype=self._dtype)
            )
            weights.clear()
            model = model.to(session.device.torch_device).eval()
            ends = self._ends()
            return [self._answer(model, index, ends) for index in self._indices]

    def _ends(self) -> list[int]:
        """Tokens that end an answer: the end of the turn, as in the pairs, and the tokenizer's end of text."""
        tokenizer, images = self._session.tokenizer, self._session.backend.description.takes_images
        end = ChatFormat(tokenizer, TemplateSettings.of(self._session.config), images=images).end_of_turn_id
        return list(dict.fromkeys([end] if tokenizer.eos_token_id is None else [end, tokenizer.eos_token_id]))

    def _answer(self, model: Any, index: int, ends: list[int]) -> Answer:
        session, tokenizer = self._session, self._session.tokenizer
        prompt = self._data[index].prompt_ids
        ids = torch.tensor([prompt], device=session.device.torch_device)
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=session.config.eval_generate_max_new_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        answer = generated[0, len(prompt) :].tolist()
        keeping: dict[str, Any] = {"clean_up_tokenization_spaces": False}
        return Answer(
            index,
            str(tokenizer.decode(prompt, skip_special_tokens=False, **keeping)),
            str(tokenizer.decode(answer, skip_special_tokens=True, **keeping)),
            len(answer),
            bool(answer) and answer[-1] in ends,
        )


@contextmanager
def _undisturbed(session: Session) -> Iterator[None]:
    """Keep the random state, and what transformers would print beside the progress of the run."""
    from transformers.utils import logging

    printed: Any = logging  # without types
    state = session.device.rng_state()
    verbosity, bar = printed.get_verbosity(), printed.is_progress_bar_enabled()
    printed.set_verbosity_error()
    printed.disable_progress_bar()
    try:
        with torch.no_grad():
            yield
    finally:
        printed.set_verbosity(verbosity)
        if bar:
            printed.enable_progress_bar()
        session.device.set_rng_state(state)
