"""Small but real inputs for tests: Hugging Face checkpoints, tokenizers with chat templates, preference data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

Family = Literal["qwen2", "qwen3", "llama", "mistral"]
FAMILIES: tuple[Family, ...] = ("qwen2", "qwen3", "llama", "mistral")

TOKENIZER_SIZE = 512
"""Tokens of the tokenizers here, special ones included."""

ENGLISH = """
The tide comes in twice a day because the moon pulls the sea towards it, and the earth turns under that pull.
A good loaf of bread needs flour, water, salt, yeast and above all time; the dough should rest until it doubles.
To sort a list in place, compare each pair of neighbours and swap them while the left one is larger than the right one.
Please write a short letter that thanks the teacher for her help and asks whether the class may visit the museum.
The library opens at nine in the morning and closes at eight in the evening, except on Sunday, when it stays closed.
Water boils at one hundred degrees at sea level, but on a high mountain it boils sooner since the air presses less.
When a program fails, first read the whole message, then find the smallest input that still makes it fail.
She packed two shirts, a map and an old camera, and took the first train to the coast before the sun was up.
The heart pumps blood through the lungs, where it takes up oxygen, and then through the rest of the body.
What is the capital of France? Paris. How many legs does a spider have? Eight. Which planet is the largest? Jupiter.
You could plant beans beside the corn: the beans give nitrogen to the soil and the corn gives them a pole to climb.
I am sorry, I do not know the answer to that question; could you tell me more about what you would like to learn?
"""

CHINESE = """
潮水每天涨落两次，因为月亮吸引着海水，而地球在不停地转动。
做好一个面包需要面粉、水、盐、酵母，最重要的是时间；面团要静置到两倍大。
请写一封简短的信，感谢老师的帮助，并询问班级是否可以参观博物馆。
图书馆早上九点开门，晚上八点关门，星期天休息。
水在海平面上一百度沸腾，但在高山上沸点更低，因为那里的气压更小。
程序出错的时候，先读完整的错误信息，再找出能够重现问题的最小输入。
法国的首都是哪里？巴黎。蜘蛛有几条腿？八条。最大的行星是哪一颗？木星。
对不起，我不知道这个问题的答案；您能告诉我更多您想了解的内容吗？
"""

_SPECIAL: dict[Family, list[str]] = {
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
    ],
    "mistral": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
}

_NAMED: dict[Family, dict[str, str]] = {
    "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
    },
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}

_CHATML_HEADER = "{{- '<|im_start|>' + message.role + '\\n' }}"
_CHATML_GENERATION = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"

_TEMPLATES: dict[Family, str] = {
    # a default system turn, as Qwen2.5
    "qwen2": (
        "{%- if messages[0].role != 'system' %}"
        "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
        "{%- for message in messages %}" + _CHATML_HEADER + "{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
    )
    + _CHATML_GENERATION,
    # an empty thought before the last answer only, as Qwen3
    "qwen3": (
        "{%- for message in messages %}"
        + _CHATML_HEADER
        + "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
        "{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
    )
    + _CHATML_GENERATION,
    "llama": (
        "{{- bos_token }}{%- for message in messages %}"
        "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
        "{{- message.content | trim + '<|eot_id|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
    ),
    # no system role: its text opens the first user turn
    "mistral": (
        "{{- bos_token }}{%- set system = '' %}"
        "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + '\\n\\n' %}"
        "{%- set messages = messages[1:] %}{%- endif %}"
        "{%- for message in messages %}"
        "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}"
        "{%- if message.role == 'user' %}"
        "{{- '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}"
        "{%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}{%- endfor %}"
    ),
}


def make_tokenizer(family: Family = "qwen2", size: int = TOKENIZER_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``size`` tokens with the family's special tokens and chat template.

    As in the real ones, the special ids come last, except Mistral's, which come first. Llama and Mistral put a BOS
    before every text that is encoded with ``add_special_tokens``.
    """
    special = _SPECIAL[family]
    first = special if family == "mistral" else []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # <think> and </think> are added tokens in Qwen3, though not special
    added = ["<think>", "</think>"] if family == "qwen3" else []
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special) - len(added) + len(first),
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*ENGLISH.splitlines(), *CHINESE.splitlines()], trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(added)
    names = _NAMED[family]
    if "bos_token" in names:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=_TEMPLATES[family], clean_up_tokenization_spaces=False, **names
    )


def make_checkpoint(
    folder: str | Path,
    family: Family = "qwen2",
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate: int | None = None,
    vocab_size: int | None = None,
    tied: bool = False,
    rope_scaling: Literal["llama3"] | None = None,
    max_positions: int = 4096,
    dtype: str = "float32",
    seed: int = 0,
    std: float = 0.1,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a randomly initialised model of ``family``, with its tokenizer, as a Hugging Face folder.

    Nothing is left at a value that hides a mistake: ``std`` makes the logits anything but flat, norm weights are not
    one and biases not zero.

    Args:
        folder: Where to write; made where absent.
        family: Architecture, special tokens and chat template.
        hidden: Hidden size; ``heads``, ``kv_heads`` and ``layers`` as the names say.
        layers: Transformer layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Size of a head; default ``hidden // heads``.
        intermediate: Size of the MLP; default twice ``hidden``.
        vocab_size: Rows of the embedding; default the tokenizer's 512. A smaller one makes the tokenizer as small
            (at least 270), a larger one leaves rows that no token uses.
        tied: Whether the embedding is the LM head.
        rope_scaling: ``llama3`` for Llama 3.1's, with an original context of 32 tokens, so that short tests feel it.
        max_positions: ``max_position_embeddings``.
        dtype: Type of the stored weights.
        seed: Seed of the weights.
        std: Standard deviation of the weights.
        max_shard_size: Largest safetensors file.
    """
    vocab_size = vocab_size or TOKENIZER_SIZE
    tokenizer = make_tokenizer(family, min(vocab_size, TOKENIZER_SIZE))
    shape: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": intermediate or 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "initializer_range": std,
        "rope_theta": 10000.0,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family != "qwen2" or head_dim:
        shape["head_dim"] = head_dim or hidden // heads
    if family == "mistral":
        shape["sliding_window"] = None
    if rope_scaling:
        shape["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
        for param in model.parameters():
            if param.dim() == 1:
                param.data += std * torch.randn_like(param)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_pairs(path: str | Path, n: int, seed: int = 0) -> Path:
    """Write ``n`` preference pairs as JSONL rows ``prompt, chosen, rejected`` of message lists.

    Every run of eight rows has both languages, one with a system turn, one of several turns, one with one-word
    answers and one long one; chosen answers are sentences of the text above, rejected ones their shuffled pieces.
    """
    draw = random.Random(seed)
    sentences = [ENGLISH.strip().splitlines(), CHINESE.strip().splitlines()]
    rows = [_pair(draw, sentences[number % 2], kind=number % 8) for number in range(n)]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _pair(draw: random.Random, sentences: list[str], kind: int) -> dict[str, list[dict[str, str]]]:
    prompt = [{"role": "user", "content": draw.choice(sentences)}]
    if kind == 1:
        prompt.insert(0, {"role": "system", "content": draw.choice(sentences)})
    for _ in range({2: 1, 5: 3}.get(kind, 0)):
        prompt.append({"role": "assistant", "content": draw.choice(sentences)})
        prompt.append({"role": "user", "content": draw.choice(sentences)})
    if kind == 3:
        chosen, rejected = ("好", "不") if draw.random() < 0.5 else ("Yes", "No")
    else:
        chosen = "\n".join(draw.choice(sentences) for _ in range(12 if kind == 6 else draw.randint(1, 3)))
        pieces = chosen.split(" ") if " " in chosen else list(chosen)
        rejected = (" " if " " in chosen else "").join(draw.sample(pieces, k=draw.randint(2, len(pieces) - 1)))
    answers = ({"role": "assistant", "content": text} for text in (chosen, rejected))
    return {"prompt": prompt, "chosen": [next(answers)], "rejected": [next(answers)]}


class Pairs(list):
    """``TokenizedPair`` records and their lengths, as a dataset has them."""

    @property
    def lengths(self):
        return np.array([pair.lengths for pair in self])


def make_token_pairs(
    n: int, vocab_size: int = TOKENIZER_SIZE, seed: int = 0, max_prompt: int = 12, max_response: int = 16
) -> list[tuple[list[int], list[int], list[int]]]:
    """``n`` pairs ``(prompt_ids, chosen_ids, rejected_ids)`` of random ids.

    The first pairs hold what breaks sharded softmaxes: id 0 and both ids at each boundary of 2, 4 and 8 vocabulary
    shards as labels, responses of one token, and chosen and rejected of very unequal length.
    """
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    edges = sorted({i * vocab_size // 8 - side for i in range(1, 9) for side in (0, 1)} - {vocab_size} | {0})
    pairs = [
        (ids(draw.randint(1, max_prompt)), ids(draw.randint(1, max_response)), ids(draw.randint(1, max_response)))
        for _ in range(n)
    ]
    special = [
        (edges[: len(edges) // 2 + 1], edges[len(edges) // 2 :]),
        ([0], ids(max_response)),
        (ids(max_response), [0]),
    ]
    for number, (chosen, rejected) in enumerate(special[:n]):
        pairs[number] = (pairs[number][0], chosen, rejected)
    return pairs
