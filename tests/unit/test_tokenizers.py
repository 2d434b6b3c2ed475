"""The small tokenizers: what they render and encode, as their families' do."""

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from tests.tokenizers import FAMILIES, TOKENIZER_SIZE, make_tokenizer
from tests.unit.data_helpers import END

ENDS = {"qwen2": 3, "qwen3": 3, "llama": 3, "mistral": 1, "gemma2": 2, "gemma3_text": 2, "phi3": 3, "glm4": 1}
"""How often the end-of-turn token stands in a conversation of one user and one assistant turn, after a system turn."""
PREFIX = {
    "llama": ["<|begin_of_text|>"],
    "mistral": ["<s>"],
    "gemma2": ["<bos>"],
    "gemma3_text": ["<bos>"],
    "phi3": ["<s>"],
    "glm4": ["[gMASK]", "<sop>"],
}
MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What boils at 一百度?"},
    {"role": "assistant", "content": "水 🌊"},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_tokenizers_render_and_encode_as_their_families_do(tmp_path, family):
    make_tokenizer(family).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == TOKENIZER_SIZE
    messages = MESSAGES[1:] if family == "gemma2" else MESSAGES
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(prompt)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == whole
    assert ids.count(tokenizer.convert_tokens_to_ids(END[family])) == ENDS[family]
    assert ids.count(tokenizer.bos_token_id) == (1 if tokenizer.bos_token else 0)
    bare, full = (tokenizer("水", add_special_tokens=added)["input_ids"] for added in (False, True))
    assert tokenizer.convert_ids_to_tokens(full[: len(full) - len(bare)]) == PREFIX.get(family, [])


def test_gemma_2_has_no_system_turn():
    with pytest.raises(TemplateError, match="System role not supported"):
        make_tokenizer("gemma2").apply_chat_template(MESSAGES, tokenize=False)
