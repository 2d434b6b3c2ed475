"""Measurements of single operators of the engine on one device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mindspeed_simpo.device import operators
from mindspeed_simpo.device.grouped import grouped_linear
from mindspeed_simpo.model.causal import causal_attention
from mindspeed_simpo.model.routes import routes_of, take

REPEATS = 7


def _fastest(
    run: Callable[[], object], wait: Callable[[], None], repeats: int = REPEATS, *, waited: bool = True
) -> float:
    """Seconds of the fastest call, to which other programs have added least; one call before is not counted.

    Args:
        run: What is timed.
        wait: Waits for the device.
        repeats: Timed calls.
        waited: Whether the wait for the device is timed; else the host's seconds alone.
    """
    run()
    found = []
    for _ in range(repeats):
        wait()
        begin = time.perf_counter()
        run()
        if waited:
            wait()
        found.append(time.perf_counter() - begin)
    wait()
    return min(found)


def _nothing() -> None:
    """Wait for a device whose work is done when a call returns."""


@dataclass(frozen=True)
class Rates:
    """Measurements of single operators of the engine on one device."""

    device: torch.device
    dtype: torch.dtype
    """Of the operators; Adam's numbers are fp32."""
    hidden: int
    tokens: int
    heads: int
    """Of 64 elements, of the attention."""
    parameters: int
    """Of Adam."""
    wait: Callable[[], None] = _nothing
    """Waits for the device."""

    def _drawn(self, *shape: int, wide: bool = False) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32 if wide else self.dtype)

    def product(self) -> Callable[[], torch.Tensor]:
        """The forward of a projection."""
        inputs, weight = self._drawn(self.tokens, self.hidden), self._drawn(4 * self.hidden, self.hidden)
        return partial(torch.nn.functional.linear, inputs, weight)

    def matmul_flops(self) -> float:
        """Of forward and backward of a projection."""
        inputs = self._drawn(self.tokens, self.hidden).requires_grad_()
        weight = self._drawn(4 * self.hidden, self.hidden).requires_grad_()
        upstream = self._drawn(self.tokens, 4 * self.hidden)

        def run() -> None:
            torch.nn.functional.linear(inputs, weight).backward(upstream)  # type: ignore[no-untyped-call]

        return 3 * 2 * self.tokens * 4 * self.hidden * self.hidden / _fastest(run, self.wait)

    def attention_flops(self) -> float:
        """Of forward and backward of causal attention, 3.5 forwards, of the pairs that the mask lets through."""
        dim = 64
        query, key, value = (self._drawn(self.tokens, 1, self.heads, dim).requires_grad_() for _ in range(3))
        upstream = self._drawn(self.tokens, 1, self.heads * dim)

        def run() -> None:
            causal_attention(query, key, value, dim**-0.5).backward(upstream)  # type: ignore[no-untyped-call]

        pairs = self.tokens * (self.tokens + 1) / 2
        return 3.5 * 2 * pairs * self.heads * 2 * dim / _fastest(run, self.wait)

    def values_bytes_per_s(self) -> float:
        """Of norm and activation, forward and backward, by the bytes that a simulation counts for them."""
        norm_inputs = self._drawn(self.tokens, self.hidden).requires_grad_()
        weight = torch.ones(self.hidden, device=self.device, dtype=self.dtype, requires_grad=True)
        gates = self._drawn(self.tokens, 8 * self.hidden).requires_grad_()
        upstreams = self._drawn(self.tokens, self.hidden), self._drawn(self.tokens, 4 * self.hidden)

        def run() -> None:
            operators.rms_norm(norm_inputs, weight, 1e-6).backward(upstreams[0])  # type: ignore[no-untyped-call]
            operators.swiglu(gates).backward(upstreams[1])  # type: ignore[no-untyped-call]

        # a norm reads and writes its input, the activation reads two numbers for each that it writes; a backward
        # does so twice
        counted = 3 * self.dtype.itemsize * self.tokens * (2 * self.hidden + 3 * 4 * self.hidden)
        return counted / _fastest(run, self.wait)

    def adam_bytes_per_s(self) -> float:
        """Of Adam, by the bytes that a simulation counts for it."""
        parameters = [torch.nn.Parameter(self._drawn(self.parameters // 8, wide=True)) for _ in range(8)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.AdamW(parameters, lr=1e-6)
        # a simulation counts 40 bytes of each parameter for norm, clipping and Adam, of which Adam has 28
        return 28 * sum(parameter.numel() for parameter in parameters) / _fastest(optimizer.step, self.wait)

    def operator_s(self) -> float:
        """Of a product of a few numbers, many of which are queued."""
        inputs, weight = self._drawn(2, 16), self._drawn(16, 16)
        return _fastest(lambda: [torch.nn.functional.linear(inputs, weight) for _ in range(100)], self.wait) / 100

    def layer_host_s(self) -> float:
        """Forward of a layer's operators on a few numbers, where all of the time is the host's."""
        tokens, hidden, heads = 4, 32, 2
        inputs, weight = self._drawn(tokens, 1, hidden).requires_grad_(), self._drawn(hidden, hidden).requires_grad_()
        norm = torch.ones(hidden, device=self.device, dtype=self.dtype, requires_grad=True)
        gate = self._drawn(2 * hidden, hidden).requires_grad_()

        def run() -> None:
            for _ in range(20):
                states = operators.rms_norm(inputs, norm, 1e-6)
                query, key, value = (
                    torch.nn.functional.linear(states, weight).view(tokens, 1, heads, -1) for _ in range(3)
                )
                states = inputs + torch.nn.functional.linear(causal_attention(query, key, value, 0.35), weight)
                inner = operators.swiglu(torch.nn.functional.linear(operators.rms_norm(states, norm, 1e-6), gate))
                states + torch.nn.functional.linear(inner, weight)

        return _fastest(run, self.wait, waited=False) / 20

    def experts_host_s(self) -> float:
        """Forward of four experts of few tokens, without their activation, which a layer without experts has too."""
        tokens, hidden, experts, chosen = 8, 16, 4, 2
        states, router = self._drawn(tokens, hidden).requires_grad_(), self._drawn(experts, hidden).requires_grad_()
        first, second = (self._drawn(experts, hidden, hidden).requires_grad_() for _ in range(2))

        def run() -> None:
            for _ in range(20):
                scores = torch.nn.functional.linear(states, router).softmax(-1)
                best = scores.detach().topk(chosen, dim=-1).indices
                weights = scores.gather(1, best)
                weights = weights / weights.sum(-1, keepdim=True)
                routes = routes_of(best, experts, experts, 1)
                rows = take(states, routes.token, routes.place)
                rows = grouped_linear(grouped_linear(rows, first, routes.counts), second, routes.counts)
                outputs = take(rows, routes.place.flatten(), routes.copy[:, None])
                torch.bmm(weights[:, None], outputs.view(tokens, chosen, -1))

        return _fastest(run, self.wait, waited=False) / 20
