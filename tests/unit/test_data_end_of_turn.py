"""The token that ends an assistant turn, for templates that write it in other ways than after each turn."""

from __future__ import annotations

import pytest

from mindspeed_simpo.data.problems import ExampleError
from mindspeed_simpo.data.template import ChatFormat
from scripts.describe_templates import EXAMPLES, described
from tests.tokenizers import make_tokenizer
from tests.unit.data_helpers import PLAIN, encode, tokenizer

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
GENERATION = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
BODY = "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}"


def with_template(template, *special, eos=None):
    tok = make_tokenizer("qwen2")
    tok.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", *special]})
    if eos is not None:
        tok.eos_token = eos
    tok.chat_template = template
    return tok


def ends(tok, row=PLAIN):
    return tok.decode(encode(row, tok).chosen_ids)


def test_a_turn_that_the_next_users_turn_ends():
    # as GLM: the model generates the token of the user's turn, after which generation stops
    tok = with_template("{% for m in messages %}<|{{ m.role }}|>" + BODY + "{% endfor %}" + GENERATION)
    assert tok.eos_token == "<|im_end|>"
    assert ends(tok) == "Paris.<|user|>"
    # which token ends a call cannot be seen
    row = {**PLAIN, "chosen": [{"role": "assistant", "content": "", "tool_calls": [CALL]}]}
    with pytest.raises(ExampleError, match="chosen: the chat template does not render the token that ends a call"):
        encode(row, tok)


def test_a_token_that_begins_every_turn_is_no_end():
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    tok = with_template(template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    assert ends(tok) == "Paris.<|im_end|>"


def test_two_tokens_that_end_every_turn():
    # as Cohere: the end of the response, then the end of the turn, at which generation stops
    template = "{% for m in messages %}<|{{ m.role }}|>" + BODY
    template += "{% if m.role == 'assistant' %}<|end_response|>{% endif %}<|end_turn|>{% endfor %}" + GENERATION
    tok = with_template(template, "<|end_response|>", "<|end_turn|>", eos="<|end_turn|>")
    assert ends(tok) == "Paris.<|end_response|><|end_turn|>"


def test_a_token_that_ends_the_conversation_only():
    # as Phi-4-mini: the tokenizer's eos_token stands after the last turn
    template = "{% for m in messages %}<|{{ m.role }}|>" + BODY + "<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    assert ends(with_template(template, "<|end|>", eos="<|endoftext|>")) == "Paris.<|end|>"


def test_a_system_turn_that_moves_is_refused():
    # as Mistral's: in the last user turn, as long as no answer follows
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{% if loop.last and messages[0].role == 'system' %}"
    )
    template += "{{ messages[0].content }} {% endif %}{{ m.content }}<|assistant|>{% elif m.role == 'assistant' %}"
    template += BODY + "<|im_end|>{% endif %}{% endfor %}"
    tok = with_template(template)
    assert ends(tok) == "Paris.<|im_end|>"
    row = {**PLAIN, "system": "Be brief."}
    with pytest.raises(ExampleError, match="chosen: the chat template moves or drops the system turn") as caught:
        encode(row, tok)
    assert caught.value.kind == "not_prefix"


def test_the_table_of_templates(tmp_path):
    for family in ("qwen2", "gemma2"):
        tokenizer(family).save_pretrained(tmp_path / family)
    rows = {family: described(str(tmp_path / family)) for family in ("qwen2", "gemma2")}
    assert rows["qwen2"].end_of_turn == "<|im_end|>"
    assert dict(zip(EXAMPLES, rows["qwen2"].cells, strict=True)) | {"call": ""} == {
        "system turn": "yes",
        "several turns": "yes",
        "thought in the text": "yes",
        "`reasoning_content`": "no: leaves it out",
        "call": "",
        "call, result, answer": "no: takes no tools",
    }
    assert rows["gemma2"].cells[0].startswith("no: ")
    assert ChatFormat(tokenizer("gemma2")).notes() == rows["gemma2"].notes
