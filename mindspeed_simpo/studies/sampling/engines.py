"""What a run generates and scores with, opened where it is needed, and the facts that its results depend on."""

from __future__ import annotations

import importlib.util
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.processor import load_processor
from mindspeed_simpo.data.tokenizer import load_tokenizer, tokenizer_digest
from mindspeed_simpo.device import Device, open_device
from mindspeed_simpo.errors import ConfigError, ModelError
from mindspeed_simpo.loss.reference import file_digests, model_fingerprint
from mindspeed_simpo.model.folder import resolve_model
from mindspeed_simpo.studies.sampling.generators.local import TransformersGenerator, takes_images
from mindspeed_simpo.studies.sampling.generators.server import ServerGenerator
from mindspeed_simpo.studies.sampling.generators.vllm import VllmGenerator
from mindspeed_simpo.studies.sampling.record import Draw, Generator, Scorer
from mindspeed_simpo.studies.sampling.scorers.classifier import Classifier, read_classifier
from mindspeed_simpo.studies.sampling.scorers.program import ScorerProgram
from mindspeed_simpo.studies.sampling.scorers.ranker import PairRanker
from mindspeed_simpo.studies.sampling.scorers.reward import RewardModel
from mindspeed_simpo.studies.sampling.settings import SamplingSettings


class Engines:
    """The generator and the scorer that the settings ask for.

    Args:
        config: Model, tokenizer and device.
        settings: Of the run.

    Raises:
        ConfigError: where the settings do not go together, or vLLM is asked for and not installed.
        ModelError: where the tokenizer or config.json of the model cannot be read.
    """

    def __init__(self, config: Config, settings: SamplingSettings) -> None:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._config, self._settings = config, settings
        self.kind = _kind(config, settings)
        """``transformers``, ``vllm`` or ``server``."""
        self._folder = resolve_model(config.model_name_or_path, weights=self.kind != "server")
        self.images = load_processor(config.model_name_or_path) if _takes_images(self._folder) else None
        """Processor of a model that takes images, whose chat template goes before the tokenizer's."""
        of_processor = None if self.images is None else self.images.chat_template
        self.tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template, of_processor)
        """Of the model, with the chat template of the configuration."""

    @cached_property
    def _device(self) -> Device:
        # opened where it is needed alone: vLLM has to be the first that uses an accelerator
        return open_device(self._config.device)

    @cached_property
    def _dtype(self) -> torch.dtype:
        bf16 = not self._device.is_cpu if self._config.bf16 is None else self._config.bf16
        return torch.bfloat16 if bf16 else torch.float32

    def generator(self, end_of_turn_id: int) -> Generator:
        """Open the generator.

        Args:
            end_of_turn_id: Token that ends an answer in training.
        """
        config, settings = self._config, self._settings
        ends = _end_ids(self._folder, self.tokenizer, end_of_turn_id)
        draw = Draw(self.tokenizer, settings.n, settings.temperature, settings.top_p, config.seed, ends)
        if self.kind == "server":
            assert settings.server is not None
            return ServerGenerator(
                settings.server,
                settings.server_model,
                settings.server_prompt,
                draw,
                settings.concurrency,
                settings.timeout,
                config.chat_template_kwargs,
                config.model_name_or_path,
            )
        if self.kind == "vllm":
            return VllmGenerator(self._folder, draw, config.seq_length, settings.vllm_options or {})
        return TransformersGenerator(
            self._folder, config.lora_load, draw, settings.batch_size, self._device.torch_device, self._dtype
        )

    def check_scorer(self) -> None:
        """Find out before the answers are generated what can be known of the scorer without its weights.

        Raises:
            SimpoError: where the scorer's program or model cannot serve.
        """
        settings = self._settings
        if settings.scorer is not None:
            ScorerProgram(settings.scorer, settings.timeout)
        elif settings.reward_model is not None:
            read_classifier(settings.reward_model, "--reward-model")
        elif settings.ranker is not None:
            read_classifier(settings.ranker, "--ranker")

    def scorer(self) -> Scorer:
        """Open the scorer."""
        settings = self._settings
        if settings.scorer is not None:
            return ScorerProgram(settings.scorer, settings.timeout)
        if settings.reward_model is not None:
            return RewardModel(self._classifier(settings.reward_model, "--reward-model"))
        assert settings.ranker is not None
        return PairRanker(self._classifier(settings.ranker, "--ranker"), settings.ranker_format)

    def _classifier(self, name: str, flag: str) -> Classifier:
        return Classifier(name, flag, self._device.torch_device, self._dtype, self._settings.batch_size)

    def generator_facts(self) -> dict[str, Any]:
        """What answers depend on, by names that a user knows."""
        config, settings = self._config, self._settings
        facts: dict[str, Any] = {"generator": self.kind, "seed": config.seed}
        facts |= {name: getattr(settings, name) for name in ("n", "temperature", "top_p", "shard")}
        facts["tokenizer (digest)"] = tokenizer_digest(self.tokenizer)[:32]
        if self.kind == "server":
            return facts | {"server_model": settings.server_model, "server_prompt": settings.server_prompt}
        facts["model (digest)"] = model_fingerprint(file_digests(self._folder, weights=True, rank=0, size=1), None)
        if self.kind == "vllm":
            return facts | {"vllm_options": settings.vllm_options}
        return facts | {"lora_load": config.lora_load, "bf16": config.bf16, "device": config.device}

    def scorer_facts(self) -> dict[str, Any]:
        """What scores depend on, by names that a user knows."""
        settings = self._settings
        facts = {name: getattr(settings, name) for name in ("reward_model", "ranker", "scorer")}
        facts = {name: value for name, value in facts.items() if value is not None}
        return facts | ({"ranker_format": settings.ranker_format} if settings.ranker is not None else {})


def _kind(config: Config, settings: SamplingSettings) -> str:
    kind: str = settings.generator
    installed = importlib.util.find_spec("vllm") is not None
    if kind == "auto":
        kind = "server" if settings.server is not None else "vllm" if installed else "transformers"
    if kind == "vllm" and not installed:
        raise ConfigError(
            "--generator vllm: vLLM is not installed (on Ascend: vllm and vllm-ascend); --server takes the address of "
            "one that runs elsewhere, --generator transformers needs neither"
        )
    if settings.vllm_options is not None and kind != "vllm":
        raise ConfigError(f"--vllm-options goes with vLLM in this process, and the answers come from {kind}")
    if config.lora_load is not None and kind != "transformers":
        raise ConfigError(
            f"lora_load goes with --generator transformers, and the answers come from {kind}: write whole weights "
            "(mindspeed-simpo export --merge-adapters) and give their folder as model_name_or_path"
        )
    return kind


def _takes_images(folder: Path) -> bool:
    try:
        return takes_images(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder}: not a configuration that transformers accepts: {reason}") from None


def _end_ids(folder: Path, tokenizer: PreTrainedTokenizerBase, end_of_turn_id: int) -> frozenset[int]:
    """The token ids that end an answer: the end of turn, the tokenizer's and the model's own."""
    ends = {end_of_turn_id, tokenizer.eos_token_id}
    if (folder / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(folder).eos_token_id
        ends |= set(own) if isinstance(own, list) else {own}
    return frozenset(int(token) for token in ends if token is not None)
