"""The trained model: megatron-core's ``GPTModel`` with a forward of its own, and its construction for this rank."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mindspeed_simpo.batch import ONE_A_ROW, Documents
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.options import ContextParallelAlgo
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.model.description import ModelSpec
from mindspeed_simpo.model.megatron.layers import block_spec, transformer_config
from mindspeed_simpo.model.naming import Chunk, pipeline_chunks
from mindspeed_simpo.model.rotary import inverse_frequencies, rotation_angles
from mindspeed_simpo.parallel import Groups

Head = Callable[[Tensor, Tensor], Tensor]
"""``head(hidden [seq, row, hidden], weight [vocabulary shard, hidden])``: what the last stage returns."""

# Older lines of megatron-core number the layers by the virtual stage that parallel_state holds at that moment
_TAKES_VIRTUAL_STAGE = "vp_stage" in inspect.signature(GPTModel.__init__).parameters


class PolicyModel(GPTModel):  # type: ignore[misc]
    """One rank's share of a decoder: some layers, the embedding on the first pipeline stage, the head on the last.

    The forward is this package's own: rotary angles come from the positions, and a ``head`` may take the place of the
    output layer, so that log-probabilities need no logits. The wrappers and schedules of megatron-core (DDP,
    ``Float16Module``, pipelines) see an ordinary ``GPTModel``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: TransformerConfig,
        chunks: list[Chunk],
        chunk: Chunk,
        groups: Groups,
        context_parallel_algo: ContextParallelAlgo,
    ) -> None:
        ranks = groups.tensor.size()
        self.chunk = chunk
        self._interleaved = config.virtual_pipeline_model_parallel_size is not None
        self._enter_virtual_stage()
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(spec, chunk.num_layers, groups, context_parallel_algo),
            vocab_size=spec.padded_vocab_size(ranks),
            max_sequence_length=spec.max_position_embeddings,
            pre_process=chunk.has_embedding,
            post_process=chunk.has_head,
            share_embeddings_and_output_weights=spec.tied,
            position_embedding_type="none",
            **({"vp_stage": chunk.virtual_stage} if self._interleaved and _TAKES_VIRTUAL_STAGE else {}),
        )
        self.spec = spec
        self.chunks = chunks
        """The chunks of all ranks, in the order of the layers."""
        self.slots = list(chunk.slots(spec))
        rows = self.vocab_size // ranks
        self._existing_rows = max(0, min(rows, spec.vocab_size - groups.tensor.rank() * rows))
        # Not a buffer: Float16Module would round it to bfloat16
        self._frequencies = inverse_frequencies(spec.rope, spec.head_dim)
        self._mark_sharded_parameters()

    def _enter_virtual_stage(self) -> None:
        if self._interleaved and not _TAKES_VIRTUAL_STAGE:
            parallel_state.set_virtual_pipeline_model_parallel_rank(self.chunk.virtual_stage)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """megatron-core's; the layers' numbers follow the virtual stage."""
        self._enter_virtual_stage()
        return super().sharded_state_dict(*args, **kwargs)

    def _mark_sharded_parameters(self) -> None:
        # megatron-core marks weights only where it initialises them; the gradient norm counts unmarked ones once
        for slot in self.slots:
            axis = slot.tensors[0].axis
            parameter = self.get_parameter(slot.parameter)
            if axis is not None and not hasattr(parameter, "tensor_model_parallel"):
                stride = 2 if slot.fusion == "gate_up" else 1
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=axis, stride=stride)

    def forward(
        self,
        input_ids: Int[Tensor, "row seq"],
        position_ids: Int[Tensor, " seq"] | Int[Tensor, "row seq"] | None = None,
        attention_mask: None = None,
        head: Head | None = None,
        documents: Documents = ONE_A_ROW,
    ) -> Tensor:
        """Hidden states of this stage, or on the last stage the head's result or the logits.

        Args:
            input_ids: int64 tokens, right-padded; stages after the first need only their shape.
            position_ids: Position of each token in its document; default 0, 1, 2 and so on in every row.
            attention_mask: None; attention is causal.
            head: Called with the final hidden states ``[seq, row, hidden]`` and this rank's output weight
                ``[padded vocabulary / tensor ranks, hidden]``. Rows beyond ``spec.vocab_size`` are padding, and the
                head must give them no probability.
            documents: What a packed row holds.

        Returns:
            Before the last stage hidden states ``[seq, row, hidden]``. On the last, what ``head`` returns, or
            ``[row, seq, padded vocabulary / tensor ranks]`` logits of this rank's shard, minus infinity on padding.
        """
        assert attention_mask is None, "attention is causal and takes no mask"
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        self._frequencies = self._frequencies.to(input_ids.device)
        hidden = self.decoder(
            hidden_states=self.embedding(input_ids=input_ids, position_ids=None) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=rotation_angles(self._frequencies, position_ids),
            # the one argument that megatron-core hands to the attention as it is, also when it recomputes a layer
            attention_bias=documents,
        )
        if not self.post_process:
            return hidden  # type: ignore[no-any-return]
        return self._logits(hidden) if head is None else head(hidden, self.output_weight)

    @property
    def output_weight(self) -> Float[Tensor, "vocab hidden"]:
        """This rank's shard of the output weight, the embedding's where they are tied; last stage only."""
        shared = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if shared else self.output_layer.weight  # type: ignore[no-any-return]

    def _logits(self, hidden: Tensor) -> Tensor:
        logits, _ = self.output_layer(hidden, weight=self.output_weight)
        if self._existing_rows < logits.shape[-1]:
            logits[..., self._existing_rows :] = -torch.inf
        return logits.transpose(0, 1).contiguous()  # type: ignore[no-any-return]


def build_model(spec: ModelSpec, config: Config, groups: Groups, device: Device) -> list[PolicyModel]:
    """This rank's model chunks, in layer order, on its device; the weights are still undefined.

    Fill them with :func:`mindspeed_simpo.model.megatron.weights.fill_weights` or from a checkpoint.

    Raises:
        ConfigError: where the layout does not divide the model, or the device lacks ``context_parallel_algo``.
        ModelError: where ``seq_length`` exceeds the model's sliding window.
    """
    spec.check_layout(config)
    if config.context_parallel_algo != "gathered" and device.name != "npu":
        raise ConfigError(
            f"context_parallel_algo: {config.context_parallel_algo} is MindSpeed's and runs on npu; this is "
            f"{device.name}: set context_parallel_algo: gathered"
        )
    megatron_config = transformer_config(spec, config, device)
    virtual_stages = config.virtual_stages(spec.num_layers)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual_stages)
    chunks = pipeline_chunks(spec, groups.pipeline.size(), virtual_stages or 1)
    return [
        PolicyModel(spec, megatron_config, chunks, chunk, groups, config.context_parallel_algo)
        for chunk in chunks
        if chunk.stage == groups.pipeline.rank()
    ]
