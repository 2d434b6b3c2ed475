"""The inputs of every variant of the benchmark: one model folder, one tokenizer, one file of pairs, one order."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from mindspeed_simpo.data.conversations import ConversationPair, ExampleReader
from mindspeed_simpo.data.mixture import shuffled
from mindspeed_simpo.data.paths import open_sources

SEED = 42
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Inputs:
    """Where things lie, and what one pair costs."""

    job: dict[str, Any]
    """What a worker needs to know."""
    facts: dict[str, Any]
    mean_tokens: float
    """Tokens of a pair, its prompt once."""
    mean_flops: float
    """Floating-point operations of a pair's forward and backward, its prompt once; see :func:`useful_flops`."""


def prepare(folder: Path, arguments: argparse.Namespace) -> Inputs:
    """Train a tokenizer, write a random model, and pick the first pairs that fit, as text that all tools take."""
    texts = Path(arguments.data).read_text(encoding="utf-8")
    model = folder / "model"
    _write_model(model, arguments, texts)
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs, sizes = first_that_fit(arguments, tokenizer)
    count = len(pairs)
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
    data, in_order = folder / "pairs.jsonl", folder / "pairs_in_our_order.jsonl"
    data.write_text("".join(lines), encoding="utf-8")
    in_order.write_text("".join(lines[index] for index in shuffled(count, SEED, 0)), encoding="utf-8")
    return Inputs(
        job={
            "model": str(model),
            "data": str(data),
            "seed": SEED,
            "data_in_our_order": str(in_order),
            "seq_length": arguments.seq_length,
            "micro_batch_size": arguments.micro_batch_size,
            "steps": count // arguments.micro_batch_size,
        },
        facts={
            "pairs": count,
            "micro_batch_size": arguments.micro_batch_size,
            "seq_length": arguments.seq_length,
            "mean_prompt_tokens": sum(size[0] for size in sizes) / count,
            "mean_response_tokens": sum(size[1] + size[2] for size in sizes) / count / 2,
            "parameters": sum(value.numel() for value in AutoModelForCausalLM.from_pretrained(model).parameters()),
            "shape": {key: getattr(arguments, key) for key in ("hidden", "layers", "heads", "kv_heads", "vocab")},
        },
        mean_tokens=sum(map(sum, sizes)) / count,
        mean_flops=sum(useful_flops(arguments, *size) for size in sizes) / count,
    )


def useful_flops(shape: argparse.Namespace, prompt: int, chosen: int, rejected: int) -> float:
    """Operations that a pair needs, with nothing twice: ``6`` a weight and token, ``12 hidden`` a layer, query and key.

    A forward multiplies and adds once for each weight that a token meets, a backward twice. The output layer counts for
    the tokens that predict a response token; attention for the keys that a causal mask leaves; prompts once a pair.
    """
    tokens = prompt + chosen + rejected
    dim = shape.hidden // shape.heads
    layer = shape.hidden * (2 * shape.hidden + 2 * shape.kv_heads * dim + 3 * shape.intermediate)
    keys = prompt * (prompt + 1) / 2 + sum(size * (prompt + (size + 1) / 2) for size in (chosen, rejected))
    head = 6 * shape.hidden * shape.vocab * (chosen + rejected)
    return shape.layers * (6 * layer * tokens + 12 * shape.hidden * keys) + head


def train_tokenizer(folder: Path, vocab: int, texts: str) -> None:
    """Write a byte-level BPE tokenizer of ``vocab`` ids, trained on ``texts``, with ChatML's template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts.splitlines(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)


def _write_model(folder: Path, arguments: argparse.Namespace, texts: str) -> None:
    train_tokenizer(folder, arguments.vocab, texts)
    config = Qwen2Config(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        vocab_size=arguments.vocab,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def first_that_fit(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, Any]], list[tuple[int, int, int]]]:
    """Whole micro-batches of pairs as messages, and the tokens of their prompts, chosen and rejected answers."""
    reader = ExampleReader(None)
    [source] = open_sources(arguments.data, "train", reader.column_names)
    pairs, sizes = [], []
    for _, example in source.examples():
        pair = _as_messages(reader.read(example))
        prompt = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
        lengths = [len(tokenizer(prompt)["input_ids"])]
        for side in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
            lengths.append(len(tokenizer(whole.removeprefix(prompt))["input_ids"]))
        # tools differ by an end token or a line break
        if lengths[0] + max(lengths[1:]) <= arguments.seq_length - 8 and pair["chosen"] != pair["rejected"]:
            pairs.append(pair)
            sizes.append((lengths[0], lengths[1], lengths[2]))
        if len(pairs) == arguments.pairs:
            break
    count = len(pairs) // arguments.micro_batch_size * arguments.micro_batch_size
    return pairs[:count], sizes[:count]


def _as_messages(pair: ConversationPair) -> dict[str, Any]:
    return {
        "prompt": [{"role": turn.role, "content": turn.content} for turn in pair.prompt],
        "chosen": [{"role": turn.role, "content": turn.content} for turn in pair.chosen],
        "rejected": [{"role": turn.role, "content": turn.content} for turn in pair.rejected],
    }
