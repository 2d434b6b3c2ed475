"""Descriptions -> megatron-core models: layers, import of weights, export. Import after ``open_device`` only."""
