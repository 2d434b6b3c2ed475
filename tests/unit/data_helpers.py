"""What the data tests share: configurations over a temporary folder, and rows as files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.conversations import ExampleReader
from mindspeed_simpo.data.dataset import PairDataset, prepare_pairs
from mindspeed_simpo.data.encoding import PairEncoder
from tests.tokenizers import Family, make_tokenizer

END = {
    "qwen2": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama": "<|eot_id|>",
    "mistral": "</s>",
    "gemma2": "<end_of_turn>",
    "gemma3_text": "<end_of_turn>",
    "phi3": "<|end|>",
    "glm4": "<|user|>",
}
PLAIN = {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "I do not know."}
BROKEN = [
    PLAIN,
    "{bad json",
    {**PLAIN, "chosen": ""},
    {**PLAIN, "rejected": PLAIN["chosen"]},
    {**PLAIN, "chosen": "x" * 400},
    {**PLAIN, "prompt": 5},
    PLAIN,
]


@cache
def tokenizer(family: Family = "qwen2"):
    return make_tokenizer(family)


def encode(row, tok, *, seq_length=1000, prompt_limit=500, truncation="error"):
    """A row as token ids."""
    encoder = PairEncoder(tok, seq_length=seq_length, prompt_limit=prompt_limit, truncation=truncation)
    return encoder.encode(ExampleReader(None).read(row))


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def config_for(folder: Path, data: Any, **options: Any) -> Config:
    paths = [str(path) for path in data] if isinstance(data, list) else str(data)
    defaults = {"model_name_or_path": "unused", "data_cache_dir": str(folder / "cache"), "num_workers": 1}
    return Config(**(defaults | {"data_path": paths} | options))


def prepare(
    folder: Path, data: Any, family: Family = "qwen2", part: Any = "train", tok: Any = None, **options: Any
) -> PairDataset:
    """Tokenise files by the tokenizer of a family, or by ``tok``; rows are written to ``rows.jsonl`` first."""
    if isinstance(data, list) and not isinstance(data[0], Path):
        data = write_jsonl(folder / "rows.jsonl", data)
    return prepare_pairs(config_for(folder, data, **options), tok or tokenizer(family), part, progress=False)


def texts(dataset: PairDataset, index: int = 0, family: Family = "qwen2") -> tuple[str, str, str]:
    pair = dataset[index]
    prompt, chosen, rejected = map(tokenizer(family).decode, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
    return prompt, chosen, rejected
