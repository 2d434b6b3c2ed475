"""Write configs/quickstart: preference pairs, a small tokenizer and the shape of a small model, all made here.

The pairs ask small facts. The chosen answer is friendly, complete and right; the rejected answer is curt, rude,
evasive, or friendly and wrong. A held-out prompt is a combination of fact, question and opening words that training
never shows. The same files come out of every run.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

PAIRS_PER_FACT = 6
VOCAB_SIZE = 960
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LEADS = (
    "{}",
    "Please tell me. {}",
    "I would like to know. {}",
    "A quick question. {}",
    "My teacher asks. {}",
    "Hello! {}",
    "We are playing a quiz. {}",
    "Can you help me? {}",
    "{} Thank you!",
    "Here is what I want to learn today. {}",
)
OPENERS = ("Of course!", "Happy to help!", "Good question!")
RUDE = ("Why do you ask me? Look it up.", "Not my job.", "That is a boring question.", "Leave me alone.")
EVASIVE = ("I do not know.", "No idea, sorry.", "It depends.", "Maybe ask somebody else.")


@dataclass(frozen=True)
class Topic:
    """Facts of one kind: ``questions`` and ``answer`` are written around a fact's two words."""

    questions: tuple[str, ...]
    answer: str
    facts: dict[str, str]


TOPICS = (
    Topic(
        ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}."),
        "The capital of {} is {}.",
        {
            "France": "Paris",
            "Italy": "Rome",
            "Spain": "Madrid",
            "Germany": "Berlin",
            "Japan": "Tokyo",
            "China": "Beijing",
            "Egypt": "Cairo",
            "Greece": "Athens",
            "Norway": "Oslo",
            "Sweden": "Stockholm",
            "Portugal": "Lisbon",
            "Austria": "Vienna",
            "Poland": "Warsaw",
            "Peru": "Lima",
            "Cuba": "Havana",
            "Kenya": "Nairobi",
            "Ireland": "Dublin",
            "Finland": "Helsinki",
            "Hungary": "Budapest",
            "Canada": "Ottawa",
        },
    ),
    Topic(
        ("What colour is {}?", "Which colour does {} have?", "Name the colour of {}."),
        "The colour of {} is {}.",
        {
            "grass": "green",
            "the sky": "blue",
            "snow": "white",
            "coal": "black",
            "a banana": "yellow",
            "a tomato": "red",
            "a carrot": "orange",
            "chocolate": "brown",
            "a flamingo": "pink",
            "an elephant": "grey",
            "a lemon": "yellow",
            "a cherry": "red",
            "a crow": "black",
            "a frog": "green",
            "milk": "white",
            "the sea": "blue",
        },
    ),
    Topic(
        ("What is a young {} called?", "What do you call a baby {}?", "Name the young of a {}."),
        "A young {} is called a {}.",
        {
            "dog": "puppy",
            "cat": "kitten",
            "cow": "calf",
            "sheep": "lamb",
            "horse": "foal",
            "goat": "kid",
            "pig": "piglet",
            "duck": "duckling",
            "bear": "cub",
            "deer": "fawn",
            "hen": "chick",
            "swan": "cygnet",
            "goose": "gosling",
            "kangaroo": "joey",
        },
    ),
    Topic(
        ("What is the opposite of {}?", "Which word means the opposite of {}?", "Name the opposite of {}."),
        "The opposite of {} is {}.",
        {
            "hot": "cold",
            "big": "small",
            "fast": "slow",
            "early": "late",
            "wet": "dry",
            "hard": "soft",
            "full": "empty",
            "light": "dark",
            "old": "new",
            "open": "closed",
            "loud": "quiet",
            "happy": "sad",
            "strong": "weak",
            "near": "far",
            "high": "low",
            "rich": "poor",
        },
    ),
    Topic(
        ("Which number comes after {}?", "What do you count after {}?", "Name the number that follows {}."),
        "The number after {} is {}.",
        {
            "one": "two",
            "two": "three",
            "three": "four",
            "four": "five",
            "five": "six",
            "six": "seven",
            "seven": "eight",
            "eight": "nine",
            "nine": "ten",
            "ten": "eleven",
            "eleven": "twelve",
            "twelve": "thirteen",
        },
    ),
    Topic(
        ("Which month comes after {}?", "What month is next after {}?", "Name the month that follows {}."),
        "The month after {} is {}.",
        {
            "January": "February",
            "February": "March",
            "March": "April",
            "April": "May",
            "May": "June",
            "June": "July",
            "July": "August",
            "August": "September",
            "September": "October",
            "October": "November",
            "November": "December",
            "December": "January",
        },
    ),
)


def build_pairs(seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out rows ``{prompt, chosen, rejected}``; no prompt is in both, every fact is in both."""
    random_source = random.Random(seed)
    train, held_out = [], []
    for topic in TOPICS:
        for subject in topic.facts:
            prompts = [lead.format(question.format(subject)) for lead in LEADS for question in topic.questions]
            chosen_prompts = random_source.sample(prompts, PAIRS_PER_FACT + 1)
            rows = [_pair(topic, subject, prompt, random_source) for prompt in chosen_prompts]
            held_out.append(rows[0])
            train.extend(rows[1:])
    random_source.shuffle(train)
    random_source.shuffle(held_out)
    return train, held_out


def _pair(topic: Topic, subject: str, prompt: str, random_source: random.Random) -> dict[str, str]:
    right = topic.facts[subject]
    wrong = random_source.choice(sorted(set(topic.facts.values()) - {right}))
    rejected = random_source.choice(
        [
            f"{right}.",
            f"{right}, obviously.",
            random_source.choice(RUDE),
            random_source.choice(EVASIVE),
            f"{random_source.choice(OPENERS)} {topic.answer.format(subject, wrong)}",
            f"{random_source.choice(OPENERS)} {topic.answer.format(subject, wrong)}",
        ]
    )
    chosen = f"{random_source.choice(OPENERS)} {topic.answer.format(subject, right)}"
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def build_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Byte-level BPE of ``VOCAB_SIZE`` entries: any text can be encoded, the texts of the pairs in few tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_all(folder: Path) -> None:
    """Write every file of the quickstart below ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = build_pairs()
    _write_rows(folder / "train.jsonl", train)
    _write_rows(folder / "held_out.jsonl", held_out)
    tokenizer = build_tokenizer(text for row in train for text in ("user\n", "assistant\n", *row.values()))
    (folder / "tokenizer.json").write_text(tokenizer.to_str() + "\n", encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 256,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write_json(folder / "config.json", _model_shape(tokenizer.get_vocab_size()))


def _model_shape(vocab_size: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def _write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "configs" / "quickstart")
    write_all(parser.parse_args().output)
