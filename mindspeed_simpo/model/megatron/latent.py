"""Multi-head latent attention of one layer: the projections by way of latent vectors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad

from mindspeed_simpo.batch import Documents
from mindspeed_simpo.device import operators
from mindspeed_simpo.model.megatron.attention import Attention
from mindspeed_simpo.model.megatron.linear import RMSNorm, column_parallel, replicated
from mindspeed_simpo.model.rotary import RotationTables
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import copy_to, gather_along_first


class LatentAttention(Attention):
    """Causal attention of this tensor-parallel rank's heads, whose keys and values come from a latent vector.

    The projections to the latent vectors are replicated over the tensor-parallel ranks; those from the latent vectors
    to the heads are sharded. Training keeps keys and values of all heads: the latent vectors are not cached as in
    generation. Where values are narrower than keys, zeros pad them for the attention kernel, since no fused kernel of
    CPUs takes both widths.
    """

    def _make_projections(self, config: TransformerConfig, groups: Groups) -> None:
        layer, latent, hidden = self.layer, self.layer.latent, config.hidden_size
        assert latent is not None
        self._tensor_group = groups.tensor
        self._divides_sequence = config.sequence_parallel
        self.q_latent = self.q_latent_norm = None
        inputs = hidden
        if latent.query_rank is not None:
            inputs = latent.query_rank
            self.q_latent = replicated(hidden, inputs, config, bias=latent.bias)
            self.q_latent_norm = RMSNorm(config, inputs, latent.norm)
        outputs = layer.heads * layer.head_dim
        self.linear_q = column_parallel(inputs, outputs, config, groups, bias=False, adds_bias=True)
        rotated = layer.rotation.dims
        self.kv_latent = replicated(hidden, latent.kv_rank + rotated, config, bias=latent.bias)
        self.kv_latent_norm = RMSNorm(config, latent.kv_rank, latent.norm)
        outputs = layer.heads * (layer.head_dim - rotated + latent.value_dim)
        self.linear_kv = column_parallel(latent.kv_rank, outputs, config, groups, bias=False, adds_bias=True)

    def _projected(self, hidden: Tensor, tables: RotationTables) -> tuple[Tensor, Tensor, Tensor]:
        layer, rotation = self.layer, self.layer.rotation
        vector = hidden
        if self.q_latent is not None and self.q_latent_norm is not None:
            vector = self.q_latent_norm(self.q_latent(hidden)[0])
        query = self.linear_q(vector)[0].unflatten(-1, (-1, layer.head_dim))
        latent, rotated = self.kv_latent(hidden)[0].split([layer.latent.kv_rank, rotation.dims], dim=-1)  # type: ignore[union-attr]
        # each rank has the gradient of the rotated part from its own heads only
        gather = gather_along_first if self._divides_sequence else copy_to
        rotated = gather(rotated.contiguous(), self._tensor_group)[:, :, None]
        query, rotated = (
            operators.rotate(heads, *tables, interleaved=rotation.interleaved) for heads in (query, rotated)
        )
        mixed = self.linear_kv(self.kv_latent_norm(latent))[0]
        mixed = mixed.unflatten(-1, (-1, layer.head_dim - rotation.dims + layer.value_dim))
        key, value = mixed.split([layer.head_dim - rotation.dims, layer.value_dim], dim=-1)
        return query, torch.cat([rotated.expand(-1, -1, key.shape[2], -1), key], dim=-1), value

    def _core(
        self,
        query: Float[Tensor, "seq row heads dim"],
        key: Float[Tensor, "seq row heads dim"],
        value: Float[Tensor, "seq row heads value_dim"],
        sinks: Float[Tensor, " heads"] | None = None,
        *,
        documents: Documents,
    ) -> Float[Tensor, "seq row width"]:
        width = max(self.layer.head_dim, self.layer.value_dim)
        query, key, value = (pad(each, (0, width - each.shape[-1])) for each in (query, key, value))
        context = super()._core(query, key, value, sinks, documents=documents)
        if width == self.layer.value_dim:
            return context
        own: Tensor = context.view(*context.shape[:2], -1, width)[..., : self.layer.value_dim].flatten(2)
        return own
