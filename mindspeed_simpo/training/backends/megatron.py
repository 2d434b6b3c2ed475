"""``backend: megatron``: models of this package's own description, on megatron-core."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from mindspeed_simpo.batch_images import BatchImages
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.resolution import resolve
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.loss.head import ResponseHead
from mindspeed_simpo.model.export_folder import Companions
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.model.megatron.adapters import without_adapters
from mindspeed_simpo.model.megatron.export import export_adapters, export_hf, whole_tensors
from mindspeed_simpo.model.megatron.gpt import build_model
from mindspeed_simpo.model.megatron.weights import fill_adapters, fill_weights, load_hf_weights
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.training.optimizer import MegatronStepper, build_stepper, wrap_for_training, wrap_precision
from mindspeed_simpo.training.schedule.megatron import MegatronEngine


class MegatronBackend:
    """See :class:`~mindspeed_simpo.training.backends.interface.Backend`, which describes the methods."""

    def __init__(self, config: Config, groups: Groups, device: Device) -> None:
        self.description = read_description(config.model_name_or_path)
        self.config = resolve(config, self.description, device.name)
        self.groups, self.device = groups, device
        make_layout(self.config, groups.world.size(), self.description, device.name)
        self.models: Sequence[torch.nn.Module] = ()

    def build(self, *, starting_weights: bool) -> None:  # noqa: D102
        models = build_model(self.description, self.config, self.groups, self.device)
        if starting_weights:
            fill_weights(models, self.description, self.config, self.groups, self.config.seed)
            fill_adapters(models, self.description, self.config, self.groups, self.config.seed)
        self.models = models

    @property
    def image_positions(self) -> None:  # noqa: D102
        return None

    def check_images(self, encoded: Mapping[str, torch.Tensor], images: BatchImages) -> None:  # noqa: ARG002, D102
        raise ModelError("backend: megatron trains on text only: set backend: fsdp for data with images")

    def for_training(self) -> list[torch.nn.Module]:  # noqa: D102
        return wrap_for_training(self.models, self.config, bf16=self.config.bf16_in_use)

    def for_scoring(self) -> list[torch.nn.Module]:  # noqa: D102
        return wrap_precision(self.models, bf16=self.config.bf16_in_use)

    def stepper(self, models: list[torch.nn.Module], train_iters: int) -> MegatronStepper:  # noqa: D102
        return build_stepper(models, self.config, self.config, self.device, train_iters)

    def engine(self, models: list[torch.nn.Module], head: ResponseHead) -> MegatronEngine:  # noqa: D102
        return MegatronEngine(models, head, self.groups, self.device.torch_device)

    def without_adapters(self) -> AbstractContextManager[None]:  # noqa: D102
        return without_adapters(self.models)

    def difference_of(self, path: str) -> str | None:  # noqa: D102
        return self.description.difference(read_description(path))

    def load_weights(self, path: str | None) -> None:  # noqa: D102
        if path is None:
            fill_weights(self.models, self.description, self.config, self.groups, self.config.seed)
        else:
            load_hf_weights(self.models, self.description, path, self.groups)

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:  # noqa: D102
        return whole_tensors(self.models, self.description, self.groups)

    def export(  # noqa: D102
        self,
        output: Path,
        *,
        merge_adapters: bool,
        beside: Companions,
    ) -> None:
        model = self.models, self.description, self.groups
        if self.config.lora_r and not merge_adapters:
            export_adapters(*model, beside=beside, base=self.config.model_name_or_path, output=output)
        else:
            export_hf(*model, beside=beside, output=output)
