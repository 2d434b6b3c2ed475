"""The one patch: a micro-batch of n pairs has 2n rows (4n with a reference model), and its metrics are exact."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from mindspeed_simpo.integrations.mindspeed_llm import stages
from mindspeed_simpo.integrations.mindspeed_llm.report import IterationReport

Schedule = Callable[..., Any]


def pair_rows_wrapper(get_forward_backward_func: Callable[..., Schedule]) -> Callable[..., Schedule]:
    """Wrap megatron's ``get_forward_backward_func`` so that the schedule it returns knows the rows of a micro-batch.

    ``args.micro_batch_size`` stays the number of pairs: samplers, learning-rate schedule and consumed samples count it.
    The name ends as MindSpeed's patch manager wants a wrapper's name to end.
    """
    report = IterationReport()

    @wraps(get_forward_backward_func)
    def get(*args: Any, **kwargs: Any) -> Schedule:
        schedule = get_forward_backward_func(*args, **kwargs)

        @wraps(schedule)
        def run(*args: Any, **kwargs: Any) -> Any:
            from megatron.training import get_args

            objective = stages.objective_of(get_args())
            if objective is None:
                return schedule(*args, **kwargs)
            kwargs["micro_batch_size"] *= 4 if objective.needs_reference else 2
            if kwargs.get("forward_only"):
                return schedule(*args, **kwargs)
            trainer = getattr(kwargs["forward_step_func"], "__self__", None)
            two_pass = getattr(trainer, "two_pass", None)
            losses = two_pass.run(schedule, kwargs) if two_pass else schedule(*args, **kwargs)
            report.add(losses)
            return losses

        return run

    return get
