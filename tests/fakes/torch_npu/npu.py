"""``torch_npu.npu`` and ``torch.npu``: devices with numbers, each of which is the CPU.

Source: ``torch_npu/npu/utils.py`` and ``torch_npu/npu/random.py`` of Ascend pytorch, for devices and generators.
"""

import contextlib

import torch

DEVICES = 8
"""As many as one host can have, whatever the machine; every rank's device is the CPU."""

default_generators = (torch.default_generator,) * DEVICES
_current = 0


class Stream:
    """A queue of work that is always done."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass

    def record_event(self, event=None):
        return event or Event()


class Event:
    """A mark in such a queue."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


_stream = Stream()


def _lazy_call(callback, **kwargs):
    callback()


def _lazy_init():
    pass


def device(index):
    return contextlib.nullcontext()


def stream(_stream):
    return contextlib.nullcontext()


def current_stream(device=None):
    return _stream


def default_stream(device=None):
    return _stream


def set_stream(stream):
    pass


def is_available():
    return True


def is_initialized():
    return True


def device_count():
    return DEVICES


def current_device():
    """A number, as in torch_npu."""
    return _current


def set_device(device):
    global _current
    index = device if isinstance(device, int) else torch.device(device).index or 0
    if index >= DEVICES:
        raise RuntimeError(f"set_device: {index} of {DEVICES} devices")
    if index >= 0:
        _current = index


def synchronize(device=None):
    pass


def empty_cache():
    pass


def set_compile_mode(jit_compile=False):
    pass


def get_device_name(device=None):
    return "Ascend910B"


def manual_seed(seed):
    torch.default_generator.manual_seed(seed)


manual_seed_all = manual_seed


def get_rng_state(device=None):
    return torch.get_rng_state()


def set_rng_state(state, device=None):
    torch.set_rng_state(state)


class mstx:  # noqa: N801 - its name in torch_npu
    """Marks of the profiler, which is not there: a range has no number."""

    @staticmethod
    def range_start(message, stream=None, domain="default"):
        return 0

    @staticmethod
    def range_end(range_id, domain="default"):
        pass


def _zero(device=None):
    return 0


memory_allocated = max_memory_allocated = memory_reserved = max_memory_reserved = _zero
memory_cached = max_memory_cached = reset_peak_memory_stats = _zero


def memory_stats(device=None):
    return {"allocation.all.current": 0}
