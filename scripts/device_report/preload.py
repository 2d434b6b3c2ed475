"""Imported once where the device is the CPU; each section is then forked from a process that has it."""

from mindspeed_simpo.device import open_device

open_device("cpu")

import megatron.core.models.gpt.gpt_model  # noqa: E402, F401
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402, F401

import mindspeed_simpo.training.backends.megatron  # noqa: E402
import mindspeed_simpo.training.session  # noqa: E402, F401
import scripts.device_report.ranks  # noqa: E402, F401
