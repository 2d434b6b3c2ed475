"""``torch_npu.contrib``; ``transfer_to_npu`` is imported by name, for its effect."""
