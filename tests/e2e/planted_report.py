"""Sections of the device report that go wrong."""

import os
import signal
import time


def run(job):
    """What the section's options ask for."""
    {"defect": _defect, "crash": _crash, "hang": _hang}[job.options["kind"]](job)


def _defect(job):
    """An activation whose gradient of ``up`` is off by a ten-thousandth."""
    import torch

    from mindspeed_simpo.device import operators
    from scripts.device_report import operators as section

    backward = operators._SwiGLU.backward

    def wrong(ctx, grad):
        grads = backward(ctx, grad)
        return torch.cat([part * factor for part, factor in zip(grads.chunk(2, -1), (1, 1.0001), strict=True)], -1)

    operators._SwiGLU.backward = staticmethod(wrong)
    section.run(job)


def _crash(job):
    job.add(case="before", dtype="float32", of="value", error=0.0, bound=1.0, holds=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(job):
    job.add(lever="before", waits=0, places={})
    time.sleep(100)
