"""The experts of a layer: router, dispatch of the tokens to the ranks of their experts, and the experts' projections.

No token is dropped: each expert computes all tokens that choose it, however many they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import linear, pad

from mindspeed_simpo.device import operators
from mindspeed_simpo.device.grouped import grouped_bias, grouped_linear
from mindspeed_simpo.model import description
from mindspeed_simpo.model.balance import Balance
from mindspeed_simpo.model.megatron.adapters import ExpertAdapters
from mindspeed_simpo.model.routes import routes_of, take, within_groups
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import exchange, join_along_first, split_along_first


class Router(torch.nn.Module):
    """``scores(weight x + bias)`` in fp32, the experts with the highest scores, and their weights.

    The choice has no gradient. ``bias``, of families that have it, is trained; the bias ``correction`` is frozen and
    keeps its fp32 values whatever the dtype of the model.
    """

    def __init__(self, config: TransformerConfig, experts: description.Experts) -> None:
        super().__init__()
        self.experts = experts
        device = torch.cuda.current_device()
        shape = experts.number, config.hidden_size
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        self.bias: torch.nn.Parameter | None = None
        if experts.bias:
            self.bias = torch.nn.Parameter(torch.empty(shape[0], dtype=config.params_dtype, device=device))
        for parameter in self.parameters():
            # with sequence parallelism each tensor-parallel rank routes its own tokens: megatron-core sums gradients
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.correction: torch.nn.Parameter | None = None
        if experts.corrected:
            bias = torch.zeros(experts.number, dtype=torch.float32, device=device)
            self.correction = torch.nn.Parameter(bias, requires_grad=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Router:
        kept = None if self.correction is None else self.correction.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.correction is not None and kept is not None:
            self.correction.data = kept.to(self.correction.device)
        return self

    def forward(
        self, tokens: Float[Tensor, "token hidden"], balance: Balance | None
    ) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
        """fp32 weights and int64 numbers of the experts of each token.

        Args:
            tokens: Normalised hidden states.
            balance: The auxiliary loss; None for none.
        """
        logits = linear(tokens.float(), self.weight.float(), None if self.bias is None else self.bias.float())
        scores = logits.softmax(-1) if self.experts.scores == "softmax" else logits.sigmoid()
        choice = scores.detach() if self.correction is None else scores.detach() + self.correction
        if self.experts.groups > 1:
            choice = within_groups(choice, self.experts.groups, self.experts.top_groups)
        chosen = choice.topk(self.experts.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.experts.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        if balance is not None:
            weights = balance.add_gradient(weights, scores, chosen)
        return weights * self.experts.scale, chosen


class ExpertBias(torch.nn.Module):
    """A bias of one projection of each expert that a rank holds."""

    def __init__(self, number: int, outputs: int, config: TransformerConfig) -> None:
        super().__init__()
        # weight decay leaves out parameters of this name
        self.bias = _stacked((number, outputs), config)

    def forward(self) -> Float[Tensor, "expert outputs"]:
        """The biases; a parameter that is gathered after an update is read through a call of its module."""
        return self.bias


class Experts(torch.nn.Module):
    """``sum_e w_e expert_e(x)`` over the experts that the router chooses.

    The parameters of all experts of a rank are one tensor for each projection. Without sequence parallelism the
    tensor-parallel ranks, which have the same tokens, compute an equal part of them each. Each of the ranks that divide
    an expert holds a part of the bias of its output, and adds that part to the part of the output that it computes.

    Args:
        config: Configuration of megatron-core.
        experts: Description of the experts.
        groups: Process groups of the layout.
    """

    def __init__(self, config: TransformerConfig, experts: description.Experts, groups: Groups) -> None:
        super().__init__()
        shards = groups.shards(experts=True)
        self.group, self.tensor_ranks = shards.group, groups.expert_tensor_ranks
        self.number, self.held = experts.number, experts.number * self.tensor_ranks // shards.size
        self.split_over = None if config.sequence_parallel else groups.tensor
        width = experts.width // self.tensor_ranks
        self.router = Router(config, experts)
        self.activation = _activation(experts)
        self.linear_fc1 = _stacked((self.held, 2 * width, config.hidden_size), config)
        self.linear_fc2 = _stacked((self.held, config.hidden_size, width), config)
        self.linear_fc1_adapters: ExpertAdapters | None = None
        self.linear_fc2_adapters: ExpertAdapters | None = None
        self.fc1 = self.fc2 = None
        self.tensor_rank = shards.rank % self.tensor_ranks
        if experts.bias:
            self.fc1 = ExpertBias(self.held, 2 * width, config)
            self.fc2 = ExpertBias(self.held, -(-config.hidden_size // self.tensor_ranks), config)

    def forward(
        self, hidden: Float[Tensor, "held row hidden"], balance: Balance | None
    ) -> Float[Tensor, "held row hidden"]:
        """The weighted sum of the experts of each token.

        Args:
            hidden: Normalised hidden states of this rank's shard of the sequence.
            balance: The auxiliary loss of the router; None for none.
        """
        tokens = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.router(tokens, balance)
        number, keys = len(tokens), self._token_keys()
        if self.split_over is not None and self.split_over.size() > 1:
            tokens, weights, chosen = (self._own_part(each) for each in (tokens, weights, chosen))
            keys = keys if keys is None else self._own_part(keys)
        mixed = self._mixed(tokens, weights, chosen, keys)
        if self.split_over is not None:
            mixed = join_along_first(mixed, self.split_over)[:number]
        return mixed.view(hidden.shape)

    def _token_keys(self) -> Int[Tensor, "token one"] | None:
        """Keys of the tokens for dropout of the adapters' inputs; None without dropout."""
        adapters = (self.linear_fc1_adapters, self.linear_fc2_adapters)
        keys = [each.token_keys for each in adapters if each is not None and each.active]
        return None if not keys or keys[0] is None else keys[0].held[:, None]

    def _own_part(self, values: Tensor) -> Tensor:
        """This tensor-parallel rank's part of values of each token, of equally many tokens on each rank."""
        assert self.split_over is not None
        padding = -len(values) % self.split_over.size()
        return split_along_first(pad(values, (0, 0, 0, padding)), self.split_over)

    def _mixed(
        self,
        tokens: Float[Tensor, "token hidden"],
        weights: Float[Tensor, "token k"],
        chosen: Int[Tensor, "token k"],
        keys: Int[Tensor, "token one"] | None,
    ) -> Float[Tensor, "token hidden"]:
        routes = routes_of(chosen, self.number, self.held, self.tensor_ranks)
        rows = take(tokens, routes.token, routes.place)
        row_keys = None if keys is None else keys[routes.token]
        if self.group.size() == 1:
            computed = self._computed(rows, routes.counts, row_keys)
        else:
            computed = self._computed_by_ranks(rows, routes.counts, row_keys)
        # [token, expert, rank that computed a part of the expert]
        parts = take(computed, routes.place.flatten(), routes.copy[:, None])
        outputs = parts.view(*chosen.shape, self.tensor_ranks, -1).sum(2)
        return torch.bmm(weights.to(outputs.dtype)[:, None], outputs)[:, 0]

    def _computed(
        self, rows: Float[Tensor, "row hidden"], counts: Int[Tensor, " expert"], keys: Int[Tensor, "row one"] | None
    ) -> Float[Tensor, "row hidden"]:
        """This rank's experts of consecutive rows."""
        gate_up = _projected(rows, self.linear_fc1, self.linear_fc1_adapters, counts, keys)
        if self.fc1 is not None:
            gate_up = grouped_bias(gate_up, self.fc1(), counts)
        output = _projected(self.activation(gate_up), self.linear_fc2, self.linear_fc2_adapters, counts, keys)
        if self.fc2 is not None:
            bias = self.fc2()
            share = bias.shape[1]
            first = self.tensor_rank * share
            # a negative number of zeros leaves out what pads the last rank's share
            biases = pad(bias, (first, output.shape[1] - first - share))
            output = grouped_bias(output, biases, counts)
        return output

    def _computed_by_ranks(
        self, rows: Float[Tensor, "row hidden"], counts: Int[Tensor, " expert"], keys: Int[Tensor, "row one"] | None
    ) -> Float[Tensor, "row hidden"]:
        """The experts of all ranks; the sizes of the messages force a host synchronisation."""
        all_counts = counts.new_empty(self.group.size(), len(counts))
        dist.all_gather(list(all_counts.unbind()), counts, group=self.group)
        of_ranks = all_counts.view(self.group.size(), -1, self.held)
        own = of_ranks[:, self.group.rank() // self.tensor_ranks]
        to_ranks = counts.view(-1, self.held).sum(1).repeat_interleave(self.tensor_ranks)
        sent, received = torch.stack([to_ranks, own.sum(1)]).tolist()
        arrived = exchange(rows, sent, received, self.group)
        # the rows of each rank lie expert by expert: bring those of one expert together
        expert = torch.arange(self.held, device=rows.device).repeat(self.group.size())
        order = expert.repeat_interleave(own.flatten(), output_size=len(arrived)).argsort(stable=True)
        back = order.argsort()
        keys = keys if keys is None else exchange(keys, sent, received, self.group)[order]
        computed = self._computed(take(arrived, order, back[:, None]), own.sum(0), keys)
        return exchange(take(computed, back, order[:, None]), received, sent, self.group)


def _projected(
    rows: Tensor, weights: Tensor, adapters: ExpertAdapters | None, counts: Tensor, keys: Tensor | None
) -> Tensor:
    output = grouped_linear(rows, weights, counts)
    return output if adapters is None or not adapters.active else output + adapters(rows, counts, keys)


def _activation(experts: description.Experts) -> Callable[[Tensor], Tensor]:
    """Products of the first projection ``[row, 2 width]`` -> ``[row, width]``."""
    kind = experts.activation
    if isinstance(kind, description.ClampedSwiGLU):
        return partial(operators.clamped_swiglu, alpha=kind.alpha, limit=kind.limit)
    return operators.swiglu


def _stacked(shape: tuple[int, ...], config: TransformerConfig) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device()))
    # megatron-core then reduces the gradient over the ranks with the same experts
    weight.allreduce = False  # type: ignore[attr-defined]
    return weight
