"""Imported once by the forkserver, so that every rank starts with megatron-core and the model loaded on the CPU."""

from tests.shapes import check_shapes

check_shapes()

from mindspeed_simpo.device import open_device  # noqa: E402

open_device("cpu")

import megatron.core  # noqa: E402
import megatron.core.models.gpt.gpt_model  # noqa: E402, F401
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen2Config  # noqa: E402, F401

import mindspeed_simpo.training.session  # noqa: E402, F401
