"""The trained model: a subclass of megatron-core's ``GPTModel`` with its own forward, and its construction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mindspeed_simpo.batch import UNPACKED, Documents, SequenceMembers
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.options import ContextParallelAlgo
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.adapters import Adapters
from mindspeed_simpo.model.balance import Balance
from mindspeed_simpo.model.description import ModelDescription, Rotation
from mindspeed_simpo.model.dropout import TokenKeys
from mindspeed_simpo.model.megatron.adapters import attach
from mindspeed_simpo.model.megatron.attention import RowContents
from mindspeed_simpo.model.megatron.layers import block_spec, transformer_config
from mindspeed_simpo.model.naming import Chunk, pipeline_chunks
from mindspeed_simpo.model.packed import document_lengths
from mindspeed_simpo.model.rotary import RotationTables, inverse_frequencies, rotation_tables
from mindspeed_simpo.model.slots import Slot
from mindspeed_simpo.parallel import Groups, consecutive_ranks

Head = Callable[[Tensor, Tensor], Tensor]
"""``head(hidden [seq, row, hidden], weight [vocabulary shard, hidden])`` -> the output of the last pipeline rank."""

# Without this argument, megatron-core numbers the layers by the virtual pipeline rank in parallel_state
_TAKES_VP_STAGE = "vp_stage" in inspect.signature(GPTModel.__init__).parameters


class PolicyModel(GPTModel):  # type: ignore[misc]
    """One model chunk of a decoder: consecutive layers, plus embedding and head on the first and the last chunk.

    The forward differs from that of ``GPTModel``: rotary tables are computed from explicit positions, and a ``head``
    can replace the output layer, so that log-probabilities need no stored logits. The class works with the wrappers and
    schedules of megatron-core (DDP, ``Float16Module``, pipeline schedules).

    Args:
        description: Description of the whole model.
        config: See :func:`~mindspeed_simpo.model.megatron.layers.transformer_config`.
        chunks: The chunks of all pipeline ranks, in the order of the layers.
        chunk: The chunk that this module computes.
        adapters: Adapters to train instead of the weights; None without adapters.
        groups: Process groups of the layout.
        kv_groups: Number of ranks that share a key-value head -> this rank's group of such ranks.
        context_parallel_algo: Attention over context-parallel ranks.
    """

    def __init__(
        self,
        description: ModelDescription,
        config: TransformerConfig,
        chunks: list[Chunk],
        chunk: Chunk,
        adapters: Adapters | None,
        groups: Groups,
        kv_groups: dict[int, dist.ProcessGroup],
        context_parallel_algo: ContextParallelAlgo,
    ) -> None:
        ranks = groups.tensor.size()
        self.chunk = chunk
        interleaved = config.virtual_pipeline_model_parallel_size is not None
        if interleaved and not _TAKES_VP_STAGE:
            parallel_state.set_virtual_pipeline_model_parallel_rank(chunk.virtual_pipeline_rank)
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(description, chunk, groups, kv_groups, context_parallel_algo),
            vocab_size=description.padded_vocab_size(ranks),
            max_sequence_length=description.max_position_embeddings,
            pre_process=chunk.has_embedding,
            post_process=chunk.has_head,
            share_embeddings_and_output_weights=description.tied,
            position_embedding_type="none",
            **({"vp_stage": chunk.virtual_pipeline_rank} if interleaved and _TAKES_VP_STAGE else {}),
        )
        self.description = description
        self.chunks = chunks
        """The chunks of all pipeline ranks, in the order of the layers."""
        self.slots = list(chunk.slots(description))
        """The slots of the weights."""
        self.adapters = adapters
        self.adapter_slots: list[Slot] = []
        """The slots of the factors of the adapters."""
        if adapters is not None:
            self.adapter_slots = attach(self, config, self.slots, adapters, groups)
        self._groups = groups
        rows = self.vocab_size // ranks
        self._vocabulary_rows = max(0, min(rows, description.vocab_size - groups.tensor.rank() * rows))
        self._embedding_scale = float(torch.tensor(description.embedding_scale, dtype=config.params_dtype))
        # not buffers, which Float16Module would round to bfloat16
        self._frequencies: dict[Rotation, Tensor] = {
            each: inverse_frequencies(each) for each in description.rotations if not each.depends_on_length
        }
        self.await_parameters: Callable[[torch.nn.Module], None] = _already_there
        """Waits until a module's own parameters, without those of its parts, are gathered after an update. Where the
        gather overlaps with the forward, a call of the module does this; what reads parameters otherwise must ask."""
        check_slots(self.model_slots, dict(self.named_parameters()), groups)
        self._mark_sharded_parameters()

    def _mark_sharded_parameters(self) -> None:
        # the gradient norm counts unmarked parameters on one rank only, and megatron-core marks only weights that it
        # initialises itself
        for slot in self.model_slots:
            parameter = self.get_parameter(slot.parameter)
            if slot.of_experts and slot.is_copy(self._groups.shards(experts=True).rank):
                parameter.shared = True  # its first copy may lie on another tensor-parallel rank than the first
            elif (slot.of_experts or slot.axis is not None) and not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=slot.axis or 0, stride=1)

    @property
    def model_slots(self) -> list[Slot]:
        """The slots of all parameters."""
        return [*self.slots, *self.adapter_slots]

    @property
    def stored_slots(self) -> list[Slot]:
        """The slots of what a checkpoint holds: of the adapters where there are any, else of the weights."""
        return self.adapter_slots or self.slots

    def forward(
        self,
        input_ids: Int[Tensor, "row seq"],
        position_ids: Int[Tensor, " seq"] | Int[Tensor, "row seq"] | None = None,
        attention_mask: None = None,
        head: Head | None = None,
        documents: Documents = UNPACKED,
        lengths: Int[Tensor, " row"] | None = None,
        members: SequenceMembers | None = None,
        token_keys: Int[Tensor, "row seq"] | None = None,
    ) -> Tensor:
        """Hidden states of this chunk, or after the last layer the output of the head or the logits.

        Args:
            input_ids: int64 token ids, right-padded; chunks without the embedding read only the shape.
            position_ids: int64 position of each token in its document; default 0, 1, 2 and so on in every row.
            attention_mask: None; attention is causal.
            head: Function of the final hidden states ``[seq, row, hidden]`` and this rank's shard of the output weight
                ``[padded vocabulary / tensor ranks, hidden]``. Weight rows beyond ``description.vocab_size`` are
                padding, to which the head must give no probability. None computes logits.
            documents: Documents of a packed row.
            lengths: int64 length in tokens, over all context-parallel ranks and without padding, of each padded row;
                required for rotations that depend on the length.
            members: Sequences of the tokens, for the auxiliary loss of the routers; None without it.
            token_keys: Keys of the tokens, for dropout of the adapters' inputs; None without it.

        Returns:
            ``[seq, row, hidden]`` hidden states from chunks without the head. From the chunk with the head, the result
            of ``head``, or ``[row, seq, padded vocabulary / tensor ranks]`` logits of this rank's shard of the
            vocabulary, minus infinity on padding.
        """
        assert attention_mask is None, "attention is causal and takes no mask"
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        if documents.wholes:
            context = self._groups.context
            lengths = document_lengths(documents, context.rank(), context.size(), input_ids.device)
        embedded = None
        if self.pre_process:
            embedded = self.embedding(input_ids=input_ids, position_ids=None)
            if self.description.embedding_scale != 1.0:
                embedded = embedded * self._embedding_scale
            if self.adapters is not None and torch.is_grad_enabled():
                # a recomputed layer whose input requires no gradient would get none for its own parameters
                embedded.requires_grad_(self.config.recompute_granularity == "full")
        hidden = self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            attention_bias=RowContents(
                documents, self._tables(position_ids, lengths), self._balance(members), self._keys(token_keys)
            ),
        )
        if not self.post_process:
            return hidden  # type: ignore[no-any-return]
        if head is None:
            return self._logits(hidden)
        # the head multiplies with the weight without a call of the layer
        self.await_parameters(self.output_layer)
        return head(hidden, self.output_weight)

    def _balance(self, members: SequenceMembers | None) -> Balance | None:
        """The auxiliary loss, for the tokens in the order of the hidden states of this rank."""
        if members is None:
            return None
        groups, of_token = [self._groups.context], members.of_token.transpose(1, 2)
        if self.config.sequence_parallel:
            groups.append(self._groups.tensor)
            of_token = of_token.chunk(self._groups.tensor.size(), dim=1)[self._groups.tensor.rank()]
        several = [group for group in groups if group.size() > 1]
        return Balance(of_token.flatten(1), members.lengths, members.weight, several)

    def _keys(self, keys: Int[Tensor, "row seq"] | None) -> TokenKeys | None:
        """The keys in the order of the hidden states."""
        if keys is None:
            return None
        whole = held = keys.t()
        if self.config.sequence_parallel:
            held = whole.chunk(self._groups.tensor.size())[self._groups.tensor.rank()]
        return TokenKeys(whole.flatten(), held.flatten())

    def _tables(self, position_ids: Tensor, lengths: Tensor | None) -> dict[Rotation, RotationTables]:
        tables = {}
        for rotation in dict.fromkeys(layer.attention.rotation for layer in self.chunk.layers(self.description)):
            if rotation.depends_on_length:
                frequencies = inverse_frequencies(rotation, lengths)
            else:
                frequencies = self._frequencies[rotation] = self._frequencies[rotation].to(position_ids.device)
            tables[rotation] = rotation_tables(rotation, frequencies, position_ids, self.config.params_dtype)
        return tables

    @property
    def output_weight(self) -> Float[Tensor, "vocab hidden"]:
        """This rank's shard of the output weight, or of the embedding where tied; only on the chunk with the head."""
        shared = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if shared else self.output_layer.weight  # type: ignore[no-any-return]

    def _logits(self, hidden: Tensor) -> Tensor:
        logits, _ = self.output_layer(hidden, weight=self.output_weight)
        softcap = self.description.logit_softcap
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if self._vocabulary_rows < logits.shape[-1]:
            logits[..., self._vocabulary_rows :] = -torch.inf
        return logits.transpose(0, 1).contiguous()  # type: ignore[no-any-return]


def _already_there(_: torch.nn.Module) -> None:
    """Of parameters that are whole whenever they are read."""


def check_slots(slots: Sequence[Slot], parameters: Mapping[str, Tensor], groups: Groups) -> None:
    """Check that slots and parameters correspond one to one: a parameter without a slot would not be loaded or saved.

    Args:
        slots: Slots of a chunk, from ``model/naming.py``.
        parameters: Name -> parameter of the module of the chunk.
        groups: Process groups of the layout.

    Raises:
        ModelError: where a parameter has no slot or several, a slot has no parameter, or their shapes differ.
    """
    named = [slot.parameter for slot in slots]
    uncovered = sorted(set(parameters) - set(named))
    doubled = sorted({name for name in named if named.count(name) > 1})
    absent = sorted(set(named) - set(parameters))
    for problem, names in (("no slot", uncovered), ("more than one slot", doubled), ("a slot but no values", absent)):
        if names:
            raise ModelError(f"model/naming.py and the modules disagree: {', '.join(names)} has {problem}")
    for slot in slots:
        shards = groups.shards(experts=slot.of_experts)
        found, expected = tuple(parameters[slot.parameter].shape), slot.shape(shards.rank, shards.size)
        if found != expected:
            raise ModelError(f"model/naming.py gives {slot.parameter} the shape {expected}; the module has {found}")


def build_model(description: ModelDescription, config: Config, groups: Groups, device: Device) -> list[PolicyModel]:
    """This rank's model chunks, in the order of the layers, on its device, with uninitialised weights.

    :func:`mindspeed_simpo.model.megatron.weights.fill_weights` or a checkpoint sets the weights. The function creates
    process groups, so that all ranks must call it.

    Args:
        description: Description that ``config.validation.make_layout`` accepts with ``config``.
        config: Precision, parallel degrees and recomputation.
        groups: Process groups of the layout.
        device: Device of the ranks.

    Raises:
        ConfigError: where ``lora_target_modules`` names a projection that the model does not have.
    """
    megatron_config = transformer_config(description, config, device)
    adapters = Adapters.of(config, description)
    virtual_pipeline_size = config.virtual_pipeline_size(description.num_layers)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual_pipeline_size)
    expert_ranks = groups.expert_tensor_ranks
    chunks = pipeline_chunks(description, groups.pipeline.size(), virtual_pipeline_size or 1, expert_ranks)
    parts = {layer.attention.share(0, groups.tensor.size()).kv_parts for layer in description.layers}
    kv_groups = {number: consecutive_ranks(number) for number in sorted(parts) if number > 1}
    return [
        PolicyModel(
            description, megatron_config, chunks, chunk, adapters, groups, kv_groups, config.context_parallel_algo
        )
        for chunk in chunks
        if chunk.pipeline_rank == groups.pipeline.rank()
    ]
