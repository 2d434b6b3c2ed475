"""Attention of one layer: projections, query-key norms, rotary embedding, sinks, core attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mindspeed_simpo.batch import Documents
from mindspeed_simpo.config.options import ContextParallelAlgo
from mindspeed_simpo.device import operators
from mindspeed_simpo.model import description
from mindspeed_simpo.model.balance import Balance
from mindspeed_simpo.model.causal import causal_attention
from mindspeed_simpo.model.context import CONTEXT_PARALLEL_ATTENTION
from mindspeed_simpo.model.dropout import TokenKeys
from mindspeed_simpo.model.megatron.linear import RMSNorm, column_parallel, row_parallel
from mindspeed_simpo.model.packed import packed_attention
from mindspeed_simpo.model.rotary import RotationTables
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import gather_along_first


@dataclass(frozen=True)
class RowContents:
    """What every layer knows of the rows of a micro-batch beside their hidden states."""

    documents: Documents
    """Documents of a packed row, which attend to themselves and their prefixes; empty for padded rows."""
    tables: Mapping[description.Rotation, RotationTables]
    """Cosines and sines of each distinct rotation of the layers."""
    balance: Balance | None = None
    """The auxiliary loss of the routers; None for none."""
    token_keys: TokenKeys | None = None
    """Keys of the tokens for dropout; None without dropout."""


class Attention(torch.nn.Module):
    """Causal attention of this tensor-parallel rank's heads, as described by ``layer``.

    Padded rows need no mask: padding is on the right, and a token attends to earlier tokens only. Documents of a packed
    row do not attend to each other (:mod:`mindspeed_simpo.model.packed`). Under context parallelism a rank holds two
    chunks of each document; :data:`~mindspeed_simpo.model.context.CONTEXT_PARALLEL_ATTENTION` has the
    algorithms.

    With more tensor-parallel ranks than key-value heads, consecutive ranks share a key-value head: each rank projects a
    part of the key and of the value, and the parts are all-gathered. The query heads of the key-value head are divided
    over the same ranks. Where this division is uneven, the parameters of ranks with fewer heads end with padding, which
    is zero and gets no gradient.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer: description.Attention,
        groups: Groups,
        kv_group: dist.ProcessGroup | None,
        context_parallel_algo: ContextParallelAlgo,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.kv_group = kv_group
        self.context_group = groups.context
        self.recomputes_core = config.recompute_granularity == "selective"
        ranks = groups.tensor.size()
        self.share = layer.share(groups.tensor.rank(), ranks)
        assert (kv_group is None) == (self.share.kv_parts == 1), "ranks that share a key-value head need a group"
        # the order of the modules is the order in which the gradient norm sums the parameters
        outputs = ranks * self.share.padded_queries * layer.value_dim
        self.linear_proj = row_parallel(outputs, config.hidden_size, config, groups, bias=layer.o_bias)
        self._make_projections(config, groups)
        self.sinks: torch.nn.Parameter | None = None
        if layer.sinks:
            device = torch.cuda.current_device()
            values = torch.empty(self.share.padded_queries, dtype=config.params_dtype, device=device)
            self.sinks = torch.nn.Parameter(values)
        over_context = CONTEXT_PARALLEL_ATTENTION[context_parallel_algo]
        self._over_context = over_context if groups.context.size() > 1 else None

    def _make_projections(self, config: TransformerConfig, groups: Groups) -> None:
        layer, ranks = self.layer, groups.tensor.size()
        queries = ranks * self.share.padded_queries * layer.head_dim
        keys = max(ranks, layer.kv_heads) * layer.head_dim // self.share.kv_parts
        self.linear_qkv = column_parallel(
            config.hidden_size, queries + 2 * keys, config, groups, bias=layer.qkv_bias, adds_bias=True
        )
        self.q_layernorm = self.k_layernorm = None
        if layer.qk_norm is not None:
            self.q_layernorm = RMSNorm(config, layer.head_dim, layer.qk_norm)
            self.k_layernorm = RMSNorm(config, layer.head_dim, layer.qk_norm)

    def forward(
        self, hidden: Float[Tensor, "held row hidden"], contents: RowContents
    ) -> tuple[Float[Tensor, "held row hidden"], Float[Tensor, " hidden"] | None]:
        """The output of the projection, and its bias, which the caller must add; None without a bias.

        Args:
            hidden: Normalised hidden states of this rank's shard of the sequence.
            contents: Documents and rotary tables of the rows.
        """
        query, key, value = self._projected(hidden, contents.tables[self.layer.rotation])
        core, inputs = partial(self._core, documents=contents.documents), [query, key, value]
        if self.sinks is not None:
            # the gradients of all blocks and documents are summed in fp32
            inputs.append(self.sinks[: self.share.queries].float())
        if self.recomputes_core and self.training:
            context = tensor_parallel.checkpoint(core, False, *inputs)
        else:
            context = core(*inputs)
        padding = (self.share.padded_queries - self.share.queries) * self.layer.value_dim
        result: tuple[Tensor, Tensor | None] = self.linear_proj(
            torch.nn.functional.pad(context, (0, padding)) if padding else context
        )
        return result

    def _projected(self, hidden: Tensor, tables: RotationTables) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries ``[seq, row, heads, head_dim]`` and keys, and values, of the rank's heads."""
        mixed, _ = self.linear_qkv(hidden)
        query, key, value = self._gather_qkv(mixed) if self.kv_group is not None else self._split_qkv(mixed)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        interleaved = self.layer.rotation.interleaved
        query, key = (operators.rotate(heads, *tables, interleaved=interleaved) for heads in (query, key))
        return query, key, value

    def _split_qkv(self, mixed: Float[Tensor, "seq row mixed"]) -> tuple[Tensor, Tensor, Tensor]:
        groups, head = self.share.kv_heads, self.layer.head_dim
        queries = self.share.queries // groups * head
        mixed = mixed.view(*mixed.shape[:-1], groups, queries + 2 * head)
        query, key, value = torch.split(mixed, [queries, head, head], dim=3)
        return query.reshape(*query.shape[:2], -1, head), key, value

    def _gather_qkv(self, mixed: Float[Tensor, "seq row mixed"]) -> tuple[Tensor, Tensor, Tensor]:
        assert self.kv_group is not None
        head, parts = self.layer.head_dim, self.share.kv_parts
        queries = self.share.padded_queries * head
        query, own = torch.split(mixed, [queries, mixed.shape[-1] - queries], dim=-1)
        query = query.view(*query.shape[:2], -1, head)[:, :, : self.share.queries]
        whole = gather_along_first(own, self.kv_group).view(parts, *own.shape[:2], 2, head // parts)
        key, value = whole.permute(3, 1, 2, 0, 4).reshape(2, *own.shape[:2], 1, head)
        return query, key, value

    def _core(
        self,
        query: Float[Tensor, "seq row heads dim"],
        key: Float[Tensor, "seq row groups dim"],
        value: Float[Tensor, "seq row groups dim"],
        sinks: Float[Tensor, " heads"] | None = None,
        *,
        documents: Documents,
    ) -> Float[Tensor, "seq row width"]:
        layer = self.layer
        scores = layer.scale, layer.window, layer.softcap, sinks
        if self._over_context is not None:
            attended: Tensor = self._over_context(query, key, value, documents, *scores, self.context_group)
            return attended
        if documents.wholes:
            return packed_attention(query, key, value, documents, *scores)
        return causal_attention(query, key, value, *scores)
