"""megatron-core on CPUs: replacements for the functions of ``torch.cuda`` that megatron-core calls.

megatron-core calls ``torch.cuda`` to allocate tensors, to seed and to synchronise. The comment at each replacement
names the code of megatron-core that needs it. The replacements are installed only where the device is ``cpu``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")


@functools.cache
def install_adaptor() -> None:
    """Redirect megatron-core's CUDA calls to the CPU; a second call has no effect."""
    _redirect_device_queries()
    _redirect_allocations()
    _redirect_random_state()


@functools.cache
def wait_for_gathers() -> None:
    """Have megatron-core's all-gathers of parameters end where they start; a second call has no effect."""
    # distributed/param_and_grad_buffer.py: an asynchronous all-gather that gloo coalesces writes to memory that is no
    # longer its own while the same process exchanges other messages (torch 2.13)
    module: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    gather = module.dist_all_gather_func

    def gather_at_once(output: torch.Tensor, shard: torch.Tensor, group: Any, async_op: bool) -> None:
        if async_op:
            group._allgather_base(output, shard).wait()
        else:
            gather(output, shard, group=group, async_op=False)

    module.dist_all_gather_func = gather_at_once


def _redirect_device_queries() -> None:
    # pipeline_parallel/p2p_communication.py, distributed/param_and_grad_buffer.py: device=torch.cuda.current_device()
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    # pipeline_parallel/p2p_communication.py and timers: synchronisation around send and receive
    torch.cuda.synchronize = lambda device=None: None  # noqa: ARG005


def _redirect_allocations() -> None:
    # pipeline_parallel/schedules.py (token counter), optimizer/clip_grads.py, optimizer/optimizer.py: device="cuda"
    # `with torch.device(...)` knows the factories by what they are when it is first used: that must be before
    with torch.device("cpu"):
        torch.empty(0)
    for name in ("tensor", "zeros", "ones", "empty", "full"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # optimizer/optimizer.py and tensor_parallel/data.py move tensors with .cuda()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]  # noqa: ARG005
    # optimizer/clip_grads.py, optimizer.py and distrib_optimizer.py compare Tensor.type() with torch.cuda.*Tensor
    torch.Tensor.type = _type_named_cuda(torch.Tensor.type)  # type: ignore[method-assign]


def _redirect_random_state() -> None:
    # tensor_parallel/random.py: seed and state of the device's generator, here the generator of the host
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()  # noqa: ARG005
    # recomputation in the same file calls the function through the module that defines it
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.set_rng_state = lambda new_state, device=None: torch.set_rng_state(new_state)  # noqa: ARG005
    torch.cuda.default_generators = {_CPU: torch.default_generator}  # type: ignore[assignment]
    # tensor_parallel/random.py imports _lazy_call, which would defer the call until CUDA is initialised
    torch.cuda._lazy_call = lambda callback, **kwargs: callback()  # noqa: ARG005


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return allocate


def _type_named_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_name(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, **kwargs)
        return str(original(self)).replace("torch.", "torch.cuda.", 1)

    return type_name
