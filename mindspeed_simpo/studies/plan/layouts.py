"""All layouts of a model on a number of devices that validation allows; no rule of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.options import BatchingForm
from mindspeed_simpo.config.resolution import resolve
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.studies.plan.simulation import Candidate

Values = Mapping[str, Any]
_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_NONE = dict.fromkeys(_FULL)
RECOMPUTE: tuple[Values, ...] = (_NONE, {**_NONE, "recompute_granularity": "selective"}, _FULL)
"""From least to most recomputation."""
SCHEDULES: tuple[str, ...] = get_args(Config.model_fields["pair_schedule"].annotation)
"""From least to most work."""
_BUDGETS = (0.5, 1, 2, 4)
"""Tokens of a packed micro-batch, over those of a pair of the longest sequences."""
_MICRO_BATCHES = (1, 2, 4, 8)
LEAST_TOKENS = 512
"""Of a sequence, on each context-parallel rank: with shorter slices the collectives are longer than the work."""

SEARCHED = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "use_distributed_optimizer",
    *_FULL,
    "pair_schedule",
    "batching",
    "micro_batch_size",
    "max_tokens_per_micro_batch",
)
"""Keys that a plan chooses; where the command line gives one of them, it stays as given."""


@dataclass(frozen=True)
class Space:
    """What is searched: a configuration whose ``SEARCHED`` keys vary, except those that are ``fixed``."""

    base: Config
    model: ModelDescription
    devices: int
    device: str
    fixed: frozenset[str] = frozenset()

    def candidates(self) -> Iterator[Candidate]:
        """Each allowed layout and form of micro-batches, with the least work: :meth:`heavier` has the others."""
        for degrees in self.degrees():
            for virtual in [None, *self.virtual(degrees)]:
                yield from self.forms_of(degrees, virtual)

    def forms_of(self, degrees: Values, virtual: int | None) -> Iterator[Candidate]:
        """The forms of micro-batches that some degrees allow, with so many layers of a virtual stage."""
        key = {"num_layers_per_virtual_pipeline_stage": virtual}
        for sizes in self.forms():
            for size in sizes:
                found = self.candidate({**self._least(), **degrees, **key, **size})
                if found is None:  # what a layout refuses in small micro-batches it refuses in larger ones
                    break
                yield found

    def heavier(self, candidate: Candidate) -> Iterator[Candidate]:
        """The same layout and micro-batches with more recomputation, or the next pair schedules.

        Both cost time and save memory, so they are of use only where ``candidate`` does not fit.
        """
        config = candidate.config
        changes: list[Values] = []
        if "recompute_granularity" not in self.fixed:
            place = [each["recompute_granularity"] for each in RECOMPUTE].index(config.recompute_granularity)
            changes += RECOMPUTE[place + 1 :]
        if "pair_schedule" not in self.fixed:
            place = SCHEDULES.index(config.pair_schedule)
            changes += [{"pair_schedule": name} for name in SCHEDULES[place + 1 :]]
        yield from filter(None, (self.changed(candidate, change) for change in changes))

    def recomputing(self, candidate: Candidate, layers: int) -> Candidate | None:
        """The candidate with only so many layers of each model chunk recomputed, where it recomputes all of them."""
        change = {**_FULL, "recompute_method": "block", "recompute_num_layers": layers}
        return None if "recompute_granularity" in self.fixed else self.changed(candidate, change)

    def changed(self, candidate: Candidate, change: Values) -> Candidate | None:
        """The candidate with other values of some keys; None where it is refused."""
        return self.candidate({**{name: getattr(candidate.config, name) for name in SEARCHED}, **change})

    def candidate(self, values: Values) -> Candidate | None:
        """The candidate with these values of ``SEARCHED`` keys; None where it is refused."""
        fixed = {name: getattr(self.base, name) for name in self.fixed}
        config = self.base.model_copy(update={**values, **fixed})
        try:
            config = resolve(config, self.model, self.device)
            return Candidate(config, make_layout(config, self.devices, self.model, self.device))
        except ConfigError:
            return None

    def degrees(self) -> Iterator[Values]:
        """Degrees of all axes whose product divides the devices; validation judges them later.

        Of a pipeline :meth:`virtual` has the virtual stages.
        """
        divisors = _divisors(self.devices)
        heads = max(layer.attention.heads for layer in self.model.first_of_kind)
        widest = max(1, self.base.seq_length // LEAST_TOKENS)
        for tensor, pipeline, context in itertools.product(
            self._given("tensor_model_parallel_size", [each for each in divisors if each <= heads]),
            self._given("pipeline_model_parallel_size", [each for each in divisors if each <= self.model.num_layers]),
            self._given("context_parallel_size", [each for each in divisors if each <= widest]),
        ):
            if self.devices % (tensor * pipeline * context):
                continue
            data = self.devices // (tensor * pipeline * context)
            for expert, sequence in itertools.product(
                self._experts(tensor, self.devices // pipeline),
                self._given("sequence_parallel", [True, False] if tensor > 1 else [False]),
            ):
                yield {
                    "tensor_model_parallel_size": tensor,
                    "pipeline_model_parallel_size": pipeline,
                    "context_parallel_size": context,
                    "sequence_parallel": sequence,
                    # sharded state needs less memory and no more time
                    "use_distributed_optimizer": data * context > 1,
                    **expert,
                }

    def forms(self) -> list[list[Values]]:
        """For each form of micro-batches, and schedule of padded ones, its sizes, from the smallest on."""
        found: list[list[Values]] = []
        for form in self._given("batching", list(get_args(BatchingForm))):
            if form == "padded":
                # the halves of two passes are padded each to their own longest row, and may have less work
                schedules = self._given("pair_schedule", SCHEDULES)
                pairs = self._given("micro_batch_size", _MICRO_BATCHES)
                found += [
                    [
                        {
                            "batching": form,
                            "micro_batch_size": each,
                            "max_tokens_per_micro_batch": None,
                            "pair_schedule": schedule,
                        }
                        for each in pairs
                    ]
                    for schedule in schedules
                ]
            else:
                longest = 2 * self.base.seq_length
                budgets = [None if share == 1 else int(share * longest) for share in _BUDGETS]
                tokens = self._given("max_tokens_per_micro_batch", budgets)
                found.append(
                    [{"batching": form, "micro_batch_size": 1, "max_tokens_per_micro_batch": each} for each in tokens]
                )
        return found

    def _least(self) -> Values:
        return {**RECOMPUTE[0], "pair_schedule": SCHEDULES[0]}

    def _given(self, name: str, values: Sequence[Any]) -> Sequence[Any]:
        return [getattr(self.base, name)] if name in self.fixed else values

    def virtual(self, degrees: Values) -> Sequence[int]:
        """Numbers of layers that a virtual stage may have; none where there can be no virtual stages."""
        layers, pipeline = self.model.num_layers, degrees["pipeline_model_parallel_size"]
        if pipeline == 1 or layers % pipeline:
            return []
        fixed = "num_layers_per_virtual_pipeline_stage" in self.fixed
        return [] if fixed else [each for each in _divisors(layers // pipeline) if each < layers // pipeline]

    def _experts(self, tensor: int, ranks: int) -> list[Values]:
        numbers = {layer.experts.number for layer in self.model.first_of_kind if layer.experts is not None}
        if not numbers:
            return [{"expert_model_parallel_size": 1, "expert_tensor_parallel_size": None}]
        degrees = self._given("expert_model_parallel_size", [n for n in _divisors(min(numbers)) if ranks % n == 0])
        tensors = self._given("expert_tensor_parallel_size", [None, 1] if tensor > 1 else [None])
        return [
            {"expert_model_parallel_size": expert, "expert_tensor_parallel_size": expert_tensor}
            for expert, expert_tensor in itertools.product(degrees, tensors)
        ]


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
