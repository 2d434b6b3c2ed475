"""Small models that take images, with their processors, and images for their data."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from tests.hf import write_random_weights
from tests.tokenizers import make_tokenizer

_CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}"
    "{%- for part in message.content %}{%- if part.type == 'image' %}{{- 'PLACE' }}"
    "{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# content as lists only, and images before the text, as the templates of LLaVA
_LISTS = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- for part in message.content | selectattr('type', 'equalto', 'image') %}{{- 'PLACE' + '\\n' }}{%- endfor %}"
    "{%- for part in message.content | selectattr('type', 'equalto', 'text') %}{{- part.text }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_QWEN_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
_QWEN_TOWER = {"depth": 3, "spatial_merge_size": 2, "temporal_patch_size": 2, **_TOWER}
_QWEN3_TOWER = {**_QWEN_TOWER, "patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def _rope(*sections):
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


FAMILIES = {
    "qwen2_vl": {
        "text_config": {"rope_parameters": _rope(2, 3, 3)},
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": _rope(2, 3, 3)},
        "vision_config": {**_QWEN_TOWER, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        "text_config": {"head_dim": 16, "rope_parameters": _rope(4, 2, 2)},
        "vision_config": _QWEN3_TOWER,
    },
    "qwen3_vl_moe": {
        "text_config": {"head_dim": 16, "rope_parameters": _rope(4, 2, 2), **_EXPERTS},
        "vision_config": {**_QWEN3_TOWER, "deepstack_visual_indexes": [1]},
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **_CLIP},
    },
    "gemma3": {
        "text_config": {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16},
        "vision_config": {"image_size": 28, "patch_size": 7, **_CLIP},
        "mm_tokens_per_image": 4,
    },
}
"""Model type -> configuration beside the sizes; gemma3 lets the tokens of an image attend to later ones."""


def make_image_model(folder, family, seed=0, *, tied=False):
    """Write a model with its tokenizer and its processor; its weights hide no mistake."""
    folder = Path(folder)
    tokens, place = (_QWEN_TOKENS, _QWEN_PLACE) if family.startswith("qwen") else (["<image>"], "<image>")
    if family == "gemma3":
        tokens, place = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"], "<start_of_image>"
    tokenizer = make_tokenizer("qwen2")
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    template = _LISTS if family == "llava" else _CHATML
    tokenizer.chat_template = template.replace("PLACE", place)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    shape = FAMILIES[family]
    text = {
        **_TEXT,
        **shape["text_config"],
        "vocab_size": len(tokenizer) + 3,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": tied,
    }
    given = {**shape, "text_config": text, "tie_word_embeddings": tied, **_special_ids(family, ids)}
    _write_weights(folder, CONFIG_MAPPING[family](**given), seed)
    if family == "gemma3":
        tokenizer.init_kwargs |= {"boi_token": tokens[0], "eoi_token": tokens[1], "image_token": tokens[2]}
        tokenizer._set_model_specific_special_tokens(
            {"boi_token": tokens[0], "eoi_token": tokens[1], "image_token": tokens[2]}
        )
    tokenizer.save_pretrained(folder)
    for name, settings in _processor_files(family).items():
        (folder / name).write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _special_ids(family, ids):
    if family.startswith("qwen"):
        names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
        return dict(zip(names, ids.values(), strict=True))
    if family == "gemma3":
        names = ("boi_token_index", "eoi_token_index", "image_token_index")
        return dict(zip(names, ids.values(), strict=True))
    return {"image_token_id": ids["<image>"], "image_seq_length": 4}


def _processor_files(family):
    if family.startswith("qwen"):
        patch = 16 if family.startswith("qwen3") else 14
        sides = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (6 * patch) ** 2}
        kind = "Qwen2_5_VLProcessor" if family == "qwen2_5_vl" else "Qwen3VLProcessor"
        return {
            "preprocessor_config.json": {
                "size": sides,
                "patch_size": patch,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "image_mean": [0.48, 0.45, 0.4],
                "image_std": [0.26, 0.26, 0.27],
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2VLProcessor" if family == "qwen2_vl" else kind,
            }
        }
    size = {"height": 28, "width": 28}
    if family == "gemma3":
        settings = {"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor", "size": size}
        return {
            "preprocessor_config.json": settings,
            "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        }
    return {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "size": {"shortest_edge": 28},
            "crop_size": size,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    }


def _write_weights(folder, config, seed):
    write_random_weights(folder, AutoModelForImageTextToText.from_config(config, dtype=torch.float32), seed)


def picture(width, height, seed=0):
    """An image of smooth noise."""
    draw = np.random.RandomState(seed)
    coarse = Image.fromarray(draw.randint(256, size=(3, 4, 3)).astype(np.uint8))
    return coarse.resize((width, height), Image.Resampling.BILINEAR)


def encoded(image, kind="PNG"):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def make_image_pairs(number, vocabulary, seed=0, images=(1, 0, 2)):
    """Pairs ``(pieces, chosen_ids, rejected_ids)``: the text between image places as token ids, and the images.

    ``images`` has the number of images of the first pairs; it is repeated.
    """
    draw = random.Random(seed)

    def ids(longest):
        return [draw.randrange(vocabulary) for _ in range(draw.randint(1, longest))]

    pairs = []
    for index in range(number):
        count = images[index % len(images)]
        pictures = [
            picture(draw.randint(28, 120), draw.randint(28, 120), seed=100 * seed + 10 * index + place)
            for place in range(count)
        ]
        pairs.append(([ids(6) for _ in range(count + 1)], pictures, ids(12), ids(12)))
    return pairs
