"""``torch_npu.utils``."""

from torch_npu.utils import collect_env

__all__ = ["collect_env", "reset_thread_affinity"]


def reset_thread_affinity():
    pass
