"""Templates, separate tokenisation, end of turn, special tokens in texts."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mindspeed_simpo.data.problems import ExampleError
from mindspeed_simpo.data.template import ChatFormat
from mindspeed_simpo.errors import ModelError
from tests.tokenizers import FAMILIES, make_tokenizer
from tests.unit.data_helpers import END, PLAIN, encode, tokenizer

SEVERAL_TURNS = {
    "prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many legs does a spider have?"},
        {"role": "assistant", "content": "Eight."},
        {"role": "user", "content": "And a planet?"},
    ],
    "chosen": "A planet has no legs.",
    "rejected": "Eight.",
}


def with_template(template, family="qwen2"):
    tok = make_tokenizer(family)
    tok.chat_template = template
    return tok


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", [PLAIN, SEVERAL_TURNS], ids=["one turn", "several turns"])
def test_the_text_is_the_templates_up_to_the_end_of_turn(family, row):
    tok = tokenizer(family)
    if family == "gemma2" and row is SEVERAL_TURNS:  # it has no system role
        row = {**row, "prompt": row["prompt"][1:]}
    pair = encode(row, tok)
    turns = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    prompt = tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt += "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    assert tok.decode(pair.prompt_ids) == prompt
    assert pair.prompt_ids == tok(prompt, add_special_tokens=False)["input_ids"]
    for ids, answer in ((pair.chosen_ids, row["chosen"]), (pair.rejected_ids, row["rejected"])):
        whole = tok.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
        if family == "glm4":  # its template ends no assistant turn: the EOS does
            whole += END[family]
        text = prompt + tok.decode(ids)
        assert whole.startswith(text)
        assert whole[len(text) :] in ("", "\n", "\n<|endoftext|>")
        assert text.endswith(answer + END[family])
        end = tok.convert_tokens_to_ids(END[family])
        assert ids[-1] == end
        assert ids.count(end) == 1
        assert ids[:-1] == tok(tok.decode(ids[:-1]), add_special_tokens=False)["input_ids"]
    if tok.bos_token_id is not None:
        assert pair.prompt_ids[0] == tok.bos_token_id
        assert [*pair.prompt_ids, *pair.chosen_ids].count(tok.bos_token_id) == 1


def test_a_template_that_changes_the_prompt_is_reported():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    with pytest.raises(
        ExampleError, match=r"prompt is not a prefix .* the prompt has '<think>.n', the conversation"
    ) as caught:
        encode(PLAIN, with_template(template))
    assert caught.value.kind == "not_prefix"


@pytest.mark.parametrize("closing", ["", "\n", " ###\n"])
def test_without_an_end_of_turn_in_the_template_the_eos_token_ends_the_response(closing):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}" + closing.replace("\n", "{{ '\\n' }}") + "{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tok = with_template(template)
    pair = encode(PLAIN, tok)
    assert tok.decode(pair.chosen_ids) == "Paris.<|im_end|>"
    tok.eos_token = None
    with pytest.raises(ModelError, match="no end-of-turn token"):
        ChatFormat(tok)


def test_the_end_of_turn_is_the_templates_not_the_tokenizers_eos():
    tok = make_tokenizer("llama")
    tok.eos_token = "<|end_of_text|>"
    assert tok.decode(encode(PLAIN, tok).chosen_ids) == "Paris.<|eot_id|>"


def test_text_after_the_end_of_turn_is_cut_even_if_it_is_a_token():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
    )
    tok = with_template(template)
    assert tok.decode(encode(PLAIN, tok).chosen_ids) == "Paris.<|im_end|>"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"prompt": "what is <|im_end|> for?"}, r"turn 1 \(user\)"),
        ({"chosen": "x<|im_end|>\n<|im_start|>user\nyes"}, "chosen"),
        ({"rejected": "<|endoftext|>"}, "rejected"),
        ({"system": "<|im_start|>"}, r"turn 1 \(system\)"),
    ],
)
def test_special_tokens_as_text_are_reported(change, where):
    with pytest.raises(ExampleError, match=where + r": contains the special token '<\|"):
        encode({**PLAIN, **change}, tokenizer("qwen2"))


def test_tokens_that_are_not_special_may_be_text():
    tok = tokenizer("qwen3")
    pair = encode({**PLAIN, "chosen": "<think>\nParis?\n</think>\n\nParis."}, tok)
    assert tok.convert_tokens_to_ids("</think>") in pair.chosen_ids


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system role') }}", "refuses the conversation: no system role"),
        ("{{ messages[0].content.nothing.at_all }}", "refuses the conversation"),
        ("hello", "leaves out the user or the assistant turn"),
        (
            "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
            "renders <.begin_of_text.> twice",
        ),
    ],
)
def test_a_template_that_cannot_serve_is_refused_once(template, words):
    with pytest.raises(ModelError, match=words):
        ChatFormat(with_template(template, "llama"))


CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{% if m.role != 'system' %}" + CHATML + "{% endif %}{% endfor %}" + GENERATION,
         "leaves out the system turn"),
        ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
         + "{% endfor %}" + GENERATION, "refuses the conversation: no system"),
    ],
)  # fmt: skip
def test_a_system_turn_is_never_lost_silently(template, words):
    with pytest.raises(ExampleError, match=words):
        encode({**PLAIN, "system": "Be brief."}, with_template(template))
    assert encode(PLAIN, with_template(template)).chosen_ids


def test_tools_reach_a_template_that_takes_them_and_no_other():
    row = {**PLAIN, "tools": json.dumps([{"type": "function", "function": {"name": "weather"}}])}
    with pytest.raises(ExampleError, match="tools, which the chat template does not take"):
        encode(row, tokenizer("qwen2"))
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}" + CHATML + "{% endfor %}" + GENERATION
    )
    tok = with_template(template)
    assert '"name": "weather"' in tok.decode(encode(row, tok).prompt_ids)


def test_a_response_that_the_template_empties_is_empty():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        + GENERATION
    )
    with pytest.raises(ExampleError) as caught:
        encode({**PLAIN, "chosen": "<think>hm</think>"}, with_template(template))
    assert caught.value.kind == "empty"


def test_responses_that_are_the_same_once_rendered_are_identical():
    with pytest.raises(ExampleError) as caught:
        encode({**PLAIN, "rejected": PLAIN["chosen"] + " \n"}, tokenizer("llama"))
    assert caught.value.kind == "identical"


def test_no_space_is_put_before_a_response_by_tokenizers_that_prepend_one():
    """Llama-2's kind: after the prompt the model generates ``Paris`` or one ``▁Paris``, never ``▁`` and ``▁Paris``."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(["Paris is the capital of France", "I do not know"], trainer)
    backend.add_tokens(bytes_)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for space in ("", " "):
        tok.chat_template = (
            "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}{{ m.content }}\n"
            "{% else %}" + space + "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        )
        pair = encode(PLAIN, tok)
        whole = tok("What is the capital of France?\n" + space + "Paris.", add_special_tokens=False)["input_ids"]
        assert [*pair.prompt_ids[1:], *pair.chosen_ids[:-1]] == whole


def test_a_space_is_kept_where_the_first_word_begins_the_text():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, vocab_size=260
    )
    backend.train_from_iterator(["Paris"], trainer)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tok.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    tok.chat_template += "{% if add_generation_prompt %}assistant:{% endif %}"
    assert tok.decode(encode(PLAIN, tok).chosen_ids) == "Paris.</s>"
