"""A stand-in for torchair: MindSpeed's operator builders register graph converters when they are imported."""

from torchair import ge

__all__ = ["ge", "register_fx_node_ge_converter"]


def register_fx_node_ge_converter(operator):
    return lambda converter: converter
