"""As MindSpeed-LLM does: the command line is parsed while the package is imported."""

from mindspeed_llm.tasks import megatron_adaptor_v2 as megatron_adaptor  # noqa: F401
