"""A stand-in for pyACL: MindSpeed-LLM asks it for the name of the chip."""


def get_soc_name():
    return "Ascend910B"
