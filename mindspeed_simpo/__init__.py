"""Preference training with SimPO, DPO and their kin on megatron-core: Ascend NPUs, GPUs and plain CPUs."""

__version__ = "0.1.0"
