"""Estimate of the memory of a rank with ``backend: fsdp``, from shapes alone and without activations."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.model.fsdp.description import TransformersModel
from mindspeed_simpo.model.fsdp.quantized import BYTES

FP32, BF16 = 4, 2


@dataclass(frozen=True)
class ShardedState:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    """Whole parameters of the root and of two layers, of which the second is gathered while the first computes, and
    with several micro-batches a step the whole gradients, which are reduced at the end of the step."""

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.parameters + self.gradients + self.optimizer + self.gathered


def sharded_state(model: TransformersModel, config: Config, world: int, micro_batches: int) -> ShardedState:
    """Parameters, gradients, Adam's moments, and what FSDP2 gathers.

    With P parameters over s ranks, b bytes of the compute dtype: parameters ``4 P / s`` (with adapters ``b P / s``),
    gradients ``4 P / s``, optimizer ``8 P / s``, gathered ``b (root + 2 layers)`` and with several micro-batches
    ``4 P`` more. A vision tower that is not trained has neither gradients nor optimizer. Adapters are not counted.
    Quantized weights are whole on every rank.

    Args:
        model: The description.
        config: Precision, adapters and ``fsdp_shard_size``.
        world: Number of ranks.
        micro_batches: Number of a rank's micro-batches of a step.
    """
    shards = config.fsdp_shard_size or world
    width = BF16 if config.bf16_in_use else FP32
    frozen, held = config.lora_r > 0, -(-model.parameters // shards)
    if config.quantization is not None:
        rest = model.parameters - model.quantizable
        return ShardedState(
            parameters=round(BYTES * model.quantizable) + width * -(-rest // shards),
            gradients=0,
            optimizer=0,
            gathered=width * model.beside_layers,
        )
    trained = 0 if frozen else model.parameters - (model.vision_parameters if config.freeze_vision else 0)
    held_trained = -(-trained // shards)
    gathered = width * (model.beside_layers + 2 * model.largest_layer)
    return ShardedState(
        parameters=(width if frozen else FP32) * held,
        gradients=FP32 * held_trained,
        optimizer=2 * FP32 * held_trained,
        gathered=gathered + (FP32 * trained if micro_batches > 1 else 0),
    )
