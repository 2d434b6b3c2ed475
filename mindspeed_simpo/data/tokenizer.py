"""Loading a tokenizer together with the chat template that renders its conversations."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mindspeed_simpo.data import hub
from mindspeed_simpo.data.problems import printable
from mindspeed_simpo.data.time_limit import TEMPLATE_SECONDS, time_limit
from mindspeed_simpo.errors import ModelError


def load_tokenizer(path_or_hub_id: str, chat_template: str | None, of_processor: Any = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has a working chat template. Code in the model's folder is never run.

    Args:
        path_or_hub_id: A local Hugging Face folder, or a hub id.
        chat_template: Jinja file that takes the place of the tokenizer's own template, or ``None``.
        of_processor: Template of the model's processor, which goes before the tokenizer's own; ``None`` where it has
            none.

    Raises:
        ModelError: naming the folder or the template file, and what is wrong with it.
    """
    tokenizer = _load(path_or_hub_id)
    where = f"{path_or_hub_id}: the tokenizer's chat template"
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
        where = f"{chat_template}: the chat template"
    elif of_processor:
        tokenizer.chat_template = of_processor
    elif not tokenizer.chat_template:
        raise ModelError(
            f"{path_or_hub_id}: the tokenizer has no chat template; name a Jinja file with `chat_template`, "
            "the one that the model will be served with"
        )
    question: Any = [{"role": "user", "content": "?"}]
    if of_processor:
        question[0]["content"] = [{"type": "text", "text": "?"}]
    try:
        with time_limit(TEMPLATE_SECONDS):
            tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"{where} is not valid Jinja, line {error.lineno}: {error.message}") from None
    except Exception as error:
        raise ModelError(f"{where} cannot render one user turn: {_reason(error)}") from None
    return tokenizer


def _load(name: str) -> PreTrainedTokenizerBase:
    path = Path(name).expanduser()
    local = hub.exists(path)
    if not local and not hub.may_be_hub_id(name):
        raise ModelError(f"{name}: no such folder (looked for {path.absolute()}); a hub id would be `owner/name`")
    if local and not path.is_dir():
        raise ModelError(f"{name}: expected a Hugging Face folder with a tokenizer, found a file")
    try:
        return _usable(_from_pretrained(str(path) if local else name, local_files_only=True), name)
    except ModelError:
        raise
    except Exception as error:
        if local:
            raise ModelError(f"{name}: the folder holds no usable tokenizer: {_reason(error)}") from None
    looked_for = f"{name}: no such folder (looked for {path.absolute()}), and no model of the Hugging Face hub"
    if reason := hub.unreachable():
        raise ModelError(f"{looked_for}: {reason}")
    try:
        return _usable(_from_pretrained(name, local_files_only=False), name)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{looked_for}: {_reason(error)}") from None


def _from_pretrained(name: str, *, local_files_only: bool) -> Any:
    return AutoTokenizer.from_pretrained(name, local_files_only=local_files_only, trust_remote_code=False)


def _usable(tokenizer: Any, name: str) -> PreTrainedTokenizerBase:
    # Some releases of transformers build an empty tokenizer where the folder holds none.
    if (
        not isinstance(tokenizer, PreTrainedTokenizerBase)
        or not tokenizer("a b", add_special_tokens=False)["input_ids"]
    ):
        raise ModelError(f"{name}: the folder holds no usable tokenizer: it turns text into no token")
    return tokenizer


def _read_template(name: str) -> str:
    path = Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ModelError(f"chat_template: {name} is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(f"chat_template: cannot read {name} (looked for {path.absolute()}): {reason}") from None
    if not text.strip():
        raise ModelError(f"chat_template: {name} is empty")
    return text


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0][:300])}" if lines else type(error).__name__


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 of everything that token ids depend on: vocabulary, rules, special tokens, template, versions.

    It keys the cache: other versions of the libraries tokenise again, and are free to find other ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # These are settings of the tokenizer's last call, not rules; each call of this package sets both.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        model = Path(getattr(tokenizer, "vocab_file", None) or "")
        rules = [sorted(tokenizer.get_vocab().items()), model.read_bytes().hex() if model.is_file() else None]
    facts = [
        type(tokenizer).__name__,
        rules,
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        transformers.__version__,
        tokenizers.__version__,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
