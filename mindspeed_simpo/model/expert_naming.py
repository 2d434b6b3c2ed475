"""The slots of the experts of a layer, whose tensors a checkpoint has one by one or those of all experts together."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from mindspeed_simpo.model.description import Experts, ModelDescription
from mindspeed_simpo.model.slots import HFTensor, Place, Slot, Span, evenly, stack


def expert_slots(model: ModelDescription, experts: Experts, hf: str, prefix: str, tensor_ranks: int) -> Iterator[Slot]:
    """The parameters of the router and of the experts of one layer.

    Args:
        model: Description of the model.
        experts: Description of the experts.
        hf: Prefix of the layer's Hugging Face names.
        prefix: Prefix of the layer's parameters.
        tensor_ranks: Number of ranks that divide each expert.
    """
    names = model.names
    router = HFTensor(f"{hf}{names.router}", (experts.number, model.hidden_size))
    yield Slot(f"{prefix}router.weight", (router,), scores_experts=True)
    if experts.corrected:
        correction = HFTensor(f"{hf}{names.correction}", (experts.number,), is_fp32=True, initial=0.0)
        yield Slot(f"{prefix}router.correction", (correction,))
    if experts.bias:
        yield Slot(f"{prefix}router.bias", (HFTensor(f"{hf}{names.router_bias}", (experts.number,)),))
    kinds = [_weights] if not experts.bias else [_weights, _biases]
    for kind in kinds:
        of_each = [kind(model, experts, hf, number) for number in range(experts.number)]
        for of_one in zip(*of_each, strict=True):
            yield stack(f"{prefix}{of_one[0].parameter}", of_one, tensor_ranks)


def _weights(model: ModelDescription, experts: Experts, hf: str, number: int) -> tuple[Slot, Slot]:
    hidden, width, names = model.hidden_size, experts.width, model.names
    both = f"{hf}{names.experts_gate_up}", (experts.number, hidden, 2 * width)
    gate, up = (
        HFTensor(
            f"{hf}{name}.weight".format(number), (width, hidden), axis=0, place=_place(experts, both, number, part)
        )
        for part, name in enumerate(names.expert_gate_up)
    )
    place = _place(experts, (f"{hf}{names.experts_down}", (experts.number, width, hidden)), number)
    down = HFTensor(f"{hf}{names.expert_down}.weight".format(number), (hidden, width), axis=1, place=place)
    return _gate_up("linear_fc1", gate, up), Slot(
        "linear_fc2", (down,), functools.partial(evenly, [Span(down, 0, width)])
    )


def _biases(model: ModelDescription, experts: Experts, hf: str, number: int) -> tuple[Slot, Slot]:
    """Each of the ranks that divide an expert adds a part of its bias of ``down``: their sum has every part once."""
    hidden, width, names = model.hidden_size, experts.width, model.names
    both = f"{hf}{names.experts_gate_up}_bias", (experts.number, 2 * width)
    gate, up = (
        HFTensor(
            f"{hf}{name}.bias".format(number), (width,), axis=0, initial=0.0, place=_place(experts, both, number, part)
        )
        for part, name in enumerate(names.expert_gate_up)
    )
    place = _place(experts, (f"{hf}{names.experts_down}_bias", (experts.number, hidden)), number)
    down = HFTensor(f"{hf}{names.expert_down}.bias".format(number), (hidden,), axis=0, initial=0.0, place=place)
    return _gate_up("fc1.bias", gate, up), Slot(
        "fc2.bias", (down,), functools.partial(_padded, [Span(down, 0, hidden)])
    )


def _gate_up(parameter: str, gate: HFTensor, up: HFTensor) -> Slot:
    return Slot(parameter, (gate, up), functools.partial(evenly, [Span(each, 0, each.shape[0]) for each in (gate, up)]))


def _place(experts: Experts, stored: tuple[str, tuple[int, ...]], number: int, part: int | None = None) -> Place | None:
    """Where a tensor of expert ``number`` is stored; gate and up are the even and the odd outputs of one tensor."""
    if not experts.together:
        return None
    return Place(*stored, number) if part is None else Place(*stored, number, first=part, step=2)


def _padded(whole: Sequence[Span], rank: int, size: int) -> Sequence[Span]:
    """An equal share of the one span, with padding where ``size`` does not divide its length."""
    share = -(-whole[0].length // size)
    start, stop = (min(each * share, whole[0].length) for each in (rank, rank + 1))
    return whole[0].part(start, stop - start), Span(None, 0, share - (stop - start))
