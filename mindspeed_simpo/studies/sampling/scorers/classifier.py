"""Sequence classifiers with one output, of which both reward models and pairwise rankers are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from mindspeed_simpo.errors import ModelError

_UNBOUNDED = 1 << 20
"""``model_max_length`` of tokenizers that have none is larger."""


class Classifier:
    """A model of ``AutoModelForSequenceClassification`` with ``num_labels`` 1, and its tokenizer.

    Code in its folder is never run.

    Args:
        name: Hugging Face folder or hub id.
        flag: That names it, for messages.
        device: Of the model.
        dtype: Of the weights.
        batch_size: Sequences of a batch.

    Raises:
        ModelError: where it cannot be loaded, has several outputs, or lacks weights, as a language model without a head
            for scores does.
    """

    def __init__(self, name: str, flag: str, device: torch.device, dtype: torch.dtype, batch_size: int) -> None:
        self._name, self._device, self._batch_size = f"{flag}: {name}", device, batch_size
        config, self.tokenizer = read_classifier(name, flag)
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:
            raise _not_loaded(name, flag, error) from None
        if missing := sorted(found["missing_keys"]):
            raise ModelError(
                f"{self._name}: the folder has no weights for {', '.join(missing[:5])}: it is no model that scores"
            )
        self._model: Any = model.to(device).eval()
        text = config.get_text_config()
        bounds = [self.tokenizer.model_max_length, getattr(text, "max_position_embeddings", None) or _UNBOUNDED]
        self.longest: int = min(bound for bound in (*bounds, _UNBOUNDED) if bound > 0)
        """Longest sequence that the model takes, tokens."""
        self._pads = text.pad_token_id is not None and self.tokenizer.pad_token_id is not None

    @torch.inference_mode()
    def logits(self, inputs: Sequence[tuple[str, str] | str], *, special: bool) -> list[float | None]:
        """The output for each text or pair of texts; None for one that is longer than the model takes.

        Args:
            inputs: Texts.
            special: Whether the tokenizer adds its special tokens, which a text by a chat template has already.

        Raises:
            ModelError: where an output is not finite.
        """
        encoded = [self._encode(each, special=special) for each in inputs]
        fitting = [place for place, each in enumerate(encoded) if len(each["input_ids"]) <= self.longest]
        values: list[float | None] = [None] * len(inputs)
        # the model finds a row's last token by its padding token, if it has one
        size = self._batch_size if self._pads else 1
        for start in range(0, len(fitting), size):
            places = fitting[start : start + size]
            rows = [encoded[place] for place in places]
            found = self._model(**self._batch(rows)).logits.float().reshape(len(rows), -1)[:, 0].tolist()
            for place, value in zip(places, found, strict=True):
                if value != value or abs(value) == float("inf"):
                    raise ModelError(f"{self._name}: the score of an answer is {value}")
                values[place] = value
        return values

    def _encode(self, each: tuple[str, str] | str, *, special: bool) -> Any:
        texts = (each,) if isinstance(each, str) else each
        return self.tokenizer(*texts, add_special_tokens=special, truncation=False, verbose=False)

    def _batch(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        padding = {"input_ids": self.tokenizer.pad_token_id if self._pads else 0}
        return {
            name: torch.tensor(
                [[*row[name], *[padding.get(name, 0)] * (longest - len(row[name]))] for row in rows],
                device=self._device,
            )
            for name in rows[0]
        }


def read_classifier(name: str, flag: str) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of a classifier, without its weights.

    Args:
        name: Hugging Face folder or hub id.
        flag: That names it, for messages.

    Raises:
        ModelError: where it is no classifier with one output that transformers knows.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise _not_loaded(name, flag, error) from None
    own = config.architectures or ["ForSequenceClassification"]
    if not any("SequenceClassification" in architecture for architecture in own):
        raise ModelError(f"{flag}: {name}: {', '.join(own)} is no model that scores: expected a sequence classifier")
    if config.num_labels != 1:
        raise ModelError(f"{flag}: {name}: {config.num_labels} outputs; expected a model with one (num_labels: 1)")
    return config, tokenizer


def _not_loaded(name: str, flag: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ModelError(
        f"{flag}: {name}: not a sequence classifier that transformers loads (code in a model's folder is not run; "
        f"--scorer takes a program that loads it): {reason}"
    )
