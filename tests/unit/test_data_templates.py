"""What a chat template must not do without a word: drop reasoning, calls or turns, print today's date, run for ever."""

from __future__ import annotations

import datetime

import pytest

from mindspeed_simpo.data import template as template_module
from mindspeed_simpo.data.frozen_date import with_frozen_date
from mindspeed_simpo.data.problems import ExampleError
from mindspeed_simpo.data.template import ChatFormat, TemplateSettings
from mindspeed_simpo.data.tokenizer import load_tokenizer
from mindspeed_simpo.data.turns import Message
from mindspeed_simpo.errors import ConfigError, DataError, ModelError
from tests.tokenizers import make_tokenizer
from tests.unit.data_helpers import PLAIN, encode, prepare, texts, tokenizer

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + GENERATION
# as DeepSeek-R1 and EXAONE 4 do: all up to the end of the thought is gone from the conversation
DELETES_THOUGHTS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
# as Qwen3: reasoning is a key of the message, or the start of its text
REASONING = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}",
)
SWITCH = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
THOUGHT = {**PLAIN, "chosen": "<think>\nFrance.\n</think>\n\nParis."}


def with_template(template, family="qwen2"):
    tok = make_tokenizer(family)
    tok.chat_template = template
    return tok


def message(text, **more):
    return {"role": "assistant", "content": text, **more}


def test_reasoning_that_a_template_deletes_is_refused():
    with pytest.raises(ExampleError, match="chosen: the chat template deletes the reasoning of the response") as caught:
        encode(THOUGHT, with_template(DELETES_THOUGHTS))
    assert caught.value.kind == "malformed"
    tok = with_template(CHATML)
    assert tok.decode(encode(THOUGHT, tok).chosen_ids) == THOUGHT["chosen"] + "<|im_end|>"


def test_reasoning_of_earlier_turns_may_be_deleted():
    earlier = [{"role": "user", "content": "x"}, message("<think>hm</think>y"), {"role": "user", "content": "z"}]
    tok = with_template(DELETES_THOUGHTS)
    assert "assistant\ny<|im_end|>" in tok.decode(encode({**PLAIN, "prompt": earlier}, tok).prompt_ids)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_text_is_trained_or_refused(key):
    row = {**PLAIN, "chosen": message("Paris.", **{key: "France."})}
    tok = with_template(REASONING)
    assert tok.decode(encode(row, tok).chosen_ids) == "<think>\nFrance.\n</think>\n\nParis.<|im_end|>"
    with pytest.raises(ExampleError, match=f"chosen: the chat template leaves out `{key}`: write the reasoning into"):
        encode(row, with_template(CHATML))
    asked = [{"role": "user", "content": "q", key: "x"}]
    with pytest.raises(ExampleError, match=f"only an assistant turn can have `{key}`, this is a user turn"):
        encode({**PLAIN, "prompt": asked}, tok)


def test_a_response_that_a_template_rewrites_is_refused():
    with pytest.raises(ExampleError, match="chosen: the chat template changes the text of the response, from 'Paris"):
        encode(PLAIN, with_template(CHATML.replace("m.content }}", "m.content | replace('.', '!') }}")))


def test_calls_that_a_template_leaves_out_are_refused():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    tok = with_template(CHATML)
    with pytest.raises(ExampleError, match="chosen: the chat template leaves out the call of `weather`"):
        encode({**PLAIN, "chosen": message("I ask.", tool_calls=[call])}, tok)
    prompt = [{"role": "user", "content": "x"}, message("", tool_calls=[call]), {"role": "tool", "content": "sunny"}]
    with pytest.raises(ExampleError, match="leaves out the call of `weather` of an assistant turn"):
        encode({**PLAIN, "prompt": prompt}, tok)
    tok = with_template(
        CHATML.replace("m.content }}", "m.content }}{% for c in m.tool_calls or [] %}{{ c }}{% endfor %}")
    )
    assert "weather" in tok.decode(encode({**PLAIN, "prompt": prompt}, tok).prompt_ids)
    without_tools = (
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.tool_calls }}" + TURN + "{% endif %}{% endfor %}"
    )
    with pytest.raises(ExampleError, match="leaves out the tool turn"):
        encode({**PLAIN, "prompt": prompt}, with_template(without_tools + GENERATION))


def test_an_empty_thought_is_part_of_the_prompt():
    tok = tokenizer("qwen3")
    pair = encode(PLAIN, tok)
    assert tok.decode(pair.prompt_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tok.decode(pair.chosen_ids) == "Paris.<|im_end|>"
    assert "'<think>\\n\\n</think>\\n\\n': part of the prompt, not scored" in ChatFormat(tok).notes()[0]
    # only one of the responses has it: both are scored as the model would generate them
    row = {**PLAIN, "chosen": "<think>\n\n</think>\n\nParis."}
    tok = with_template(CHATML)
    pair = encode(row, tok)
    assert tok.decode(pair.prompt_ids).endswith("assistant\n")
    assert tok.decode(pair.chosen_ids) == row["chosen"] + "<|im_end|>"


def test_truncation_never_cuts_the_empty_thought():
    tok = tokenizer("qwen3")
    row = {**PLAIN, "prompt": "word " * 200}
    for truncation in ("keep_end", "keep_start"):
        pair = encode(row, tok, seq_length=100, prompt_limit=60, truncation=truncation)
        assert tok.decode(pair.prompt_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_other_text_before_responses_is_scored_and_said():
    notes = ChatFormat(
        with_template(CHATML.replace("{{ m.content }}", "{% if m.role != 'user' %}final: {% endif %}{{ m.content }}"))
    ).notes()
    assert notes == ["the chat template begins responses with 'final: ', which is scored"]
    assert ChatFormat(with_template(CHATML)).notes() == []


def test_template_variables_reach_the_template_and_the_cache(tmp_path):
    tok = with_template(SWITCH)
    ends = {}
    for value in (True, False):
        settings = TemplateSettings({"enable_thinking": value})
        notes = ChatFormat(tok, settings).notes()
        assert notes == [f"the chat template is given enable_thinking = {value}"]
        ends[value] = ChatFormat(tok, settings)._closing
    assert ends[False] == ends[True] + "<think>\n\n</think>\n\n"
    for name in ("enable_thinkin", "messages", "tools", "add_generation_prompt", "tokenize"):
        with pytest.raises(ConfigError, match=f"`{name}` is set by this|does not read `{name}`"):
            ChatFormat(tok, TemplateSettings({name: 1}))
    with pytest.raises(ConfigError, match="the chat template does not read `enable_thinking`"):
        prepare(tmp_path, [PLAIN], chat_template_kwargs={"enable_thinking": False})


DATED = "{{ strftime_now('%d %b %Y, %-d.%-m.%y %A %H') }}{{ '\\n' }}" + CHATML


def test_a_date_is_frozen(tmp_path, monkeypatch):
    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2031, 1, 2, tzinfo=tz)

    def prompt(day):
        settings = TemplateSettings(date=day)
        tok = with_template(DATED)
        assert any(f"prints the date, which is always {day}" in note for note in ChatFormat(tok, settings).notes())
        return ChatFormat(tok, settings)._render([Message("user", "q")], None, header=True)

    first = prompt("2024-07-26")
    assert first.startswith("26 Jul 2024, 26.7.24 Friday 00\n<|im_start|>")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert prompt("2024-07-26") == first
    assert prompt("2025-03-01").startswith("01 Mar 2025, 1.3.25 Saturday 00\n")
    assert with_frozen_date(CHATML, "2024-07-26") is CHATML
    assert prepare(tmp_path, [PLAIN]).fingerprint
    prepare(tmp_path, [PLAIN], chat_template_date="2025-01-01")
    assert len(list((tmp_path / "cache" / "tokenised").iterdir())) == 2


def test_macros_and_line_breaks_of_a_dated_template_stay():
    inner = "\n{% macro today() %}{{ strftime_now('%Y') }}{% endmacro %}"
    inner += "{% if strftime_now is defined %}in {{ today() }}{% endif %}"
    tok = with_template(inner + CHATML)
    assert ChatFormat(tok)._render([Message("user", "q")], None, header=True).startswith("\nin 2024<|im_start|>")


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_an_endless_template_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(template_module, "TEMPLATE_SECONDS", 0.2)
    monkeypatch.setattr("mindspeed_simpo.data.tokenizer.TEMPLATE_SECONDS", 0.2)
    with pytest.raises(ModelError, match="did not end within 0"):
        ChatFormat(with_template(ENDLESS + CHATML))
    tok = with_template("{% for m in messages if m.content == 'loop' %}" + ENDLESS + "{% endfor %}" + CHATML)
    with pytest.raises(ExampleError, match="did not end within 0"):
        encode({**PLAIN, "prompt": "loop"}, tok)
    assert encode(PLAIN, tok).chosen_ids
    make_tokenizer("qwen2").save_pretrained(tmp_path / "model")
    (tmp_path / "t.jinja").write_text(ENDLESS + CHATML)
    with pytest.raises(ModelError, match=r"t.jinja: the chat template cannot render one user turn: TimeoutError"):
        load_tokenizer(str(tmp_path / "model"), str(tmp_path / "t.jinja"))


def test_a_generation_prompt_that_opens_a_thought_says_what_to_do(tmp_path):
    tok = with_template(CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
    with pytest.raises(ExampleError, match="opens a thought that the conversation has not: set chat_template_kwargs"):
        encode(PLAIN, tok)
    with pytest.raises(DataError, match="cannot be used"):
        prepare(tmp_path, [PLAIN, {**PLAIN, "chosen": "<|im_end|>"}])
    assert texts(prepare(tmp_path, [PLAIN]))[1] == "Paris.<|im_end|>"
