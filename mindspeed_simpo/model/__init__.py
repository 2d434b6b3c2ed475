"""Decoder models: the description of a Hugging Face checkpoint, its modules, the import and export of weights.

Only ``megatron`` imports megatron-core, so that modules of ``megatron`` must be imported after ``open_device``.
"""
