"""Training steps of the engine on models of a given shape with random weights, for everything that is not compared."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.config.resolution import resolve
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.largest import largest_pass
from mindspeed_simpo.data.loader import PairLoader
from mindspeed_simpo.device import Device
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.studies.plan.run_lengths import assumed_lengths
from mindspeed_simpo.training.memory import MemoryEstimate, estimate_memory
from tests.hf import Pairs

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense model under the names that ``scripts.bench_inputs.useful_flops`` reads."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    extra: tuple[tuple[str, Any], ...] = ()
    """Further keys of config.json."""

    def write(self, folder: Path, layers: int | None = None) -> Path:
        """``config.json`` of the model, with so many layers."""
        values = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers or self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 32768,
            **dict(self.extra),
        }
        config = AutoConfig.for_model(self.family, **values)
        config.save_pretrained(folder)
        return folder

    def with_layers(self, layers: int) -> argparse.Namespace:
        """As :func:`scripts.bench_inputs.useful_flops` takes it."""
        return argparse.Namespace(**{**vars(self), "layers": layers})


@dataclass(frozen=True)
class Work:
    """Pairs of one global batch, which every step trains on."""

    pairs: Pairs

    @classmethod
    def drawn(cls, vocabulary: int, pairs: int, prompt: int, response: int, seq_length: int) -> Work:
        """Random tokens; lengths with these means (:func:`assumed_lengths`)."""
        lengths = assumed_lengths(prompt, response, response, seq_length, pairs)
        drawn = np.random.default_rng(1)
        rows = ([drawn.integers(vocabulary, size=size).tolist() for size in each] for each in lengths)
        return cls(Pairs(TokenizedPair(*row, source="drawn") for row in rows))

    @property
    def tokens(self) -> int:
        """Of both sequences of all pairs, without padding."""
        return int(sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in self.pairs.lengths))


class Model:
    """A model on the device, trained whole or by its adapters, whose steps may differ in every other option."""

    def __init__(self, folder: Path, device: Device, groups: Any, work: Work, **keys: Any) -> None:
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        from mindspeed_simpo.training.backends import open_backend

        self.folder, self.device, self.groups, self.work, self.keys = folder, device, groups, work, keys
        model_parallel_cuda_manual_seed(1)
        self.backend = open_backend(self.config(), groups, device)
        self.backend.build(starting_weights=False)
        for model in self.backend.models:
            _draw(model)
        self.wrapped = self.backend.for_training()
        self.stepper = self.backend.stepper(self.wrapped, 1000)

    def config(self, **keys: Any) -> Config:
        """With the defaults of this model and device."""
        values = {
            "model_name_or_path": str(self.folder),
            "init_from": "config",
            "data_path": "unused",
            "device": self.device.name,
            "global_batch_size": len(self.work.pairs),
            "lr": 1e-6,
            **self.keys,
            **keys,
        }
        return resolve(Config(**values), read_description(str(self.folder)), self.device.name)

    def step(self, **keys: Any) -> Callable[[], None]:
        """A training step: forward, backward, gradient norm and Adam, as in :mod:`mindspeed_simpo.training.trainer`."""
        from mindspeed_simpo.training.session import build_schedule

        config = self.config(**keys)
        pairs = len(self.work.pairs)
        schedule = build_schedule(config, self.backend, self.groups, self.device, None, self.wrapped, None)
        micro_batches = self.loader(config).train_step(0)

        def run() -> None:
            self.stepper.zero_grad()
            schedule.forward_backward(micro_batches, pairs)
            self.stepper.update(self.stepper.squared_norm())

        return run

    def loader(self, config: Config) -> PairLoader:
        """The micro-batches of a configuration."""
        return PairLoader(
            self.work.pairs,
            seed=config.seed,
            global_batch_size=len(self.work.pairs),
            batching=Batching.of(config),
            data_parallel_rank=self.groups.data.rank(),
            data_parallel_size=self.groups.data.size(),
        )

    def estimate(self, **keys: Any) -> MemoryEstimate:
        """What ``check`` expects of this step on one rank."""
        return estimate(self.folder, self.config(**keys), self.work, self.device)


def estimate(folder: Path, config: Config, work: Work, device: Device) -> MemoryEstimate:
    """Memory of a run on one rank that trains on these pairs again and again."""
    once = config.model_copy(update={"train_iters": 1})
    largest = largest_pass(work.pairs.lengths, once, Batching.of(once), Layout())
    [found] = estimate_memory(read_description(str(folder)), once, Layout(), largest, device.name)
    return found


@torch.no_grad()
def _draw(model: torch.nn.Module) -> None:
    """Weights on the device itself: drawing those of a large model on the host takes minutes."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02)
        else:
            parameter.fill_(1.0)


def seconds_of(device: Device, run: Callable[[], object], repeats: int, warm_ups: int = 2) -> list[float]:
    """Seconds of each of ``repeats`` calls, the device waited for before and after."""
    for _ in range(warm_ups):
        run()
    found = []
    for _ in range(repeats):
        device.synchronize()
        begin = time.perf_counter()
        run()
        device.synchronize()
        found.append(time.perf_counter() - begin)
    return found


def open_world(device: Device) -> Any:
    """Groups of one rank."""
    from mindspeed_simpo.parallel import initialize

    return initialize(Layout(), device)
