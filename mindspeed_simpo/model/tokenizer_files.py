"""Tokenizer and processor of an exported model: the files of the model that training started from, unchanged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIG = "tokenizer_config.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken")


def write_tokenizer(source: Path, output: Path, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
    """Copy the files of tokenizer and processor: every version of transformers that reads ``source`` reads ``output``.

    ``save_pretrained`` of transformers 5 names tokenizer classes that transformers 4 does not have.

    Args:
        source: Hugging Face folder that training started from.
        output: An existing folder.
        tokenizer: Saved by transformers where ``source`` has no ``tokenizer_config.json``.
        chat_template: Takes the place of the source's own templates; None keeps them.
    """
    if not (source / _CONFIG).is_file():
        tokenizer.save_pretrained(output)
        return
    patterns = (*_FILES, *_PROCESSOR_FILES, *(_TEMPLATES if chat_template is None else ()))
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, output / path.name)
        elif path.suffix != ".py":
            shutil.copyfile(path, output / path.name)
    if chat_template is not None:
        # versions of transformers before 4.43 read the key, later ones the file
        config = json.loads((source / _CONFIG).read_text(encoding="utf-8"))
        text = json.dumps(config | {"chat_template": chat_template}, indent=2, ensure_ascii=False)
        (output / _CONFIG).write_text(text + "\n", encoding="utf-8")
        (output / _TEMPLATES[0]).write_text(chat_template, encoding="utf-8")
