"""Described models as megatron-core models: layers, import of weights, export. Imported after ``open_device``."""
