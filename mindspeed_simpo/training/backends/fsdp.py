"""``backend: fsdp``: the models of transformers, sharded by PyTorch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mindspeed_simpo.batch_images import BatchImages
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.resolution import resolve
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.data.pixels import Positions
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.loss.head import ResponseHead
from mindspeed_simpo.model.export_folder import Companions
from mindspeed_simpo.model.folder import resolve_model
from mindspeed_simpo.model.fsdp.adapters import add_adapters, write_adapters
from mindspeed_simpo.model.fsdp.build import (
    Sharding,
    empty_model,
    load_model,
    local_part,
    parameters_of_text,
    random_model,
    recompute,
)
from mindspeed_simpo.model.fsdp.description import describe
from mindspeed_simpo.model.fsdp.dropout import ForwardTokens
from mindspeed_simpo.model.fsdp.export import export_model, gather, stored_tensors
from mindspeed_simpo.model.fsdp.images import rope_positions
from mindspeed_simpo.model.fsdp.policy import Policy
from mindspeed_simpo.model.fsdp.quantized import copy_weight
from mindspeed_simpo.model.fsdp.self_test import check_images, find_abilities
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.training.fsdp.engine import FsdpEngine
from mindspeed_simpo.training.fsdp.stepper import ShardStepper, build_shard_stepper


class FsdpBackend:
    """See :class:`~mindspeed_simpo.training.backends.interface.Backend`, which describes the methods."""

    def __init__(self, config: Config, groups: Groups, device: Device) -> None:
        self.description = describe(config.model_name_or_path)
        self.description.check_length(config.seq_length)
        self.description.check_freezing(config.freeze_vision, adapted=config.lora_r > 0)
        self.config = resolve(config, self.description, device.name)
        self.groups, self.device = groups, device
        make_layout(self.config, groups.world.size(), None, device.name)
        world, bf16 = groups.world.size(), self.config.bf16_in_use
        self.sharding = Sharding(
            self.description.layer_names,
            world=world,
            shards=config.fsdp_shard_size or world,
            bf16=bf16,
            # parameters on a CPU are in host memory anyway
            offload=config.fsdp_cpu_offload and not device.is_cpu,
            # frozen weights need no fp32 main parameters
            stored_dtype=torch.bfloat16 if bf16 and config.lora_r else torch.float32,
            device_type=device.torch_device.type,
            quantized=config.quantization is not None,
        )
        self.models: Sequence[Policy] = ()

    def build(self, *, starting_weights: bool) -> None:  # noqa: ARG002, D102 - they are read in any case
        causal, tokens = self._model(None), ForwardTokens()
        if self.config.freeze_vision and self.description.takes_images and not self.config.lora_r:
            kept = parameters_of_text(causal)
            for parameter in causal.parameters():
                parameter.requires_grad_(parameter in kept)
        adapted = add_adapters(causal, self.config, tokens) if self.config.lora_r else None
        if self.config.recompute_granularity == "full":
            recompute(causal, self._recomputed_layers(), tokens.recomputed)
        context = self.groups.context if self.groups.context.size() > 1 else None
        core = self.config.recompute_granularity == "selective"
        policy = Policy(
            causal,
            self.description.logits,
            context,
            tokens,
            adapted,
            recomputes_core=core,
            vision_frozen=self.config.freeze_vision,
            keeps_features=self.config.pair_schedule != "concat" or self.config.reference_is_base,
        )
        self.models = [policy.train()]
        self._fit_batching(policy)

    def _model(self, path: str | None) -> PreTrainedModel:
        """The sharded model with the weights of a folder or hub model, or the starting weights."""
        random = path is None and self.config.init_from == "config"
        folder = resolve_model(path or self.config.model_name_or_path, weights=not random)
        return random_model(folder, self.sharding, self.config.seed) if random else load_model(folder, self.sharding)

    def _recomputed_layers(self) -> Sequence[str]:
        names = self.description.decoder_layers
        chosen = names[: self.config.recompute_num_layers] if self.config.recompute_method == "block" else names
        if self.config.freeze_vision:  # nothing is kept of it for a backward
            return chosen
        return [name for name in self.description.layer_names if name in chosen or name not in names]

    def _fit_batching(self, policy: Policy) -> None:
        """Refuse a form of batches that the model cannot have; ``auto`` takes the best that is left."""
        vocab_size, layers = self.description.vocab_size, len(self.description.decoder_layers)
        found = find_abilities(policy, vocab_size, self.config.seq_length, layers)
        if found.softcaps and self.device.name == "npu":
            raise ConfigError(
                f"{self.config.model_name_or_path} caps its attention scores, for which torch_npu has no operator: "
                "set device: cuda or cpu, or choose another model"
            )
        if self.groups.context.size() > 1 and not found.packed:
            raise ConfigError(f"context_parallel_size: {found.reason}, which ranks could share: set it to 1")
        form = self.config.batching_in_use
        if getattr(found, form, True):
            return
        if self.config.batching != "auto":
            raise ConfigError(f"batching: {form}: {found.reason}: set batching: auto")
        self.config = self.config.model_copy(update={"batching": "packed" if found.packed else "padded"})

    @cached_property
    def image_positions(self) -> Positions | None:  # noqa: D102
        base: Any = empty_model(resolve_model(self.config.model_name_or_path, weights=False)).base_model
        if not hasattr(base, "get_rope_index"):
            return None
        return partial(rope_positions, base)

    def check_images(self, encoded: Mapping[str, torch.Tensor], images: BatchImages) -> None:  # noqa: D102
        check_images(self.models[0], encoded, images)

    def for_training(self) -> list[torch.nn.Module]:  # noqa: D102
        return list(self.models)

    def for_scoring(self) -> list[torch.nn.Module]:  # noqa: D102
        return list(self.models)

    def stepper(self, models: list[torch.nn.Module], train_iters: int) -> ShardStepper:  # noqa: D102
        [policy] = models
        assert isinstance(policy, Policy)
        return build_shard_stepper(policy, self.config, self.device, train_iters)

    def engine(self, models: list[torch.nn.Module], head: ResponseHead) -> FsdpEngine:  # noqa: D102
        [policy] = models
        assert isinstance(policy, Policy)
        return FsdpEngine(policy, head, self.groups, self.device.torch_device)

    def without_adapters(self) -> AbstractContextManager[None]:  # noqa: D102
        return self.models[0].without_adapters() if self.models else nullcontext()

    def difference_of(self, path: str) -> str | None:  # noqa: D102
        return self.description.difference(describe(path))

    @torch.no_grad()
    def load_weights(self, path: str | None) -> None:  # noqa: D102
        other = dict(self._model(path).named_parameters())
        for name, parameter in self.models[0].weights():
            copy_weight(local_part(parameter), local_part(other[name]))
        self.models[0].forget_images()

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:  # noqa: D102
        yield from stored_tensors(self.models[0], dict(gather(self.models[0]))).items()

    def export(  # noqa: D102
        self,
        output: Path,
        *,
        merge_adapters: bool,
        beside: Companions,
    ) -> None:
        policy = self.models[0]
        if policy.adapted is not None and not merge_adapters:
            write_adapters(policy.adapted, self.config.model_name_or_path, beside, output)
        else:
            export_model(policy, self.description, beside, output)
