"""The patch of the pipeline schedules: a micro-batch of n pairs has 2n rows, or 4n rows with a reference model."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from mindspeed_simpo.integrations.mindspeed_llm import stages
from mindspeed_simpo.integrations.mindspeed_llm.report import IterationReport

Schedule = Callable[..., Any]


def pair_rows_wrapper(get_forward_backward_func: Callable[..., Schedule]) -> Callable[..., Schedule]:
    """Wrap ``get_forward_backward_func``: its schedules then take ``micro_batch_size`` in pairs, and report metrics.

    ``args.micro_batch_size`` remains the number of pairs, which samplers, learning-rate schedule and consumed samples
    count. MindSpeed's patch manager requires that the name of a wrapper ends with ``wrapper``.
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
