"""Hugging Face checkpoints as megatron-core models, and back.

``hf_config`` and ``naming`` import no megatron; the other modules do, and so are imported after ``open_device``.
"""
