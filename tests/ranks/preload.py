"""Imported once by the forkserver, so that every rank starts with megatron-core and the models loaded on the CPU."""

from tests.shapes import check_shapes

check_shapes()

from mindspeed_simpo.device import open_device  # noqa: E402

open_device("cpu")

import megatron.core  # noqa: E402
import megatron.core.models.gpt.gpt_model  # noqa: E402, F401
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen2Config  # noqa: E402, F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402, F401

import mindspeed_simpo.training.backends.fsdp  # noqa: E402
import mindspeed_simpo.training.backends.megatron  # noqa: E402
import mindspeed_simpo.training.session  # noqa: E402, F401

get_checkpoint_conversion_mapping("llama")  # it keeps the patterns of all models
