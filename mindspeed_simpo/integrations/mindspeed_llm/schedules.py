"""The one patch: a micro-batch of n pairs has 2n rows (4n with a reference model), and its metrics are exact."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

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

            rows_per_pair = 2 if get_args().stage == "simpo" else 4
            kwargs["micro_batch_size"] *= rows_per_pair
            trainer = getattr(kwargs["forward_step_func"], "__self__", None)
            sweeps = None if kwargs.get("forward_only") else getattr(trainer, "sweeps", None)
            losses = sweeps.run(schedule, kwargs) if sweeps else schedule(*args, **kwargs)
            if not kwargs.get("forward_only"):
                report.add(losses)
            return losses

        return run

    return get
