"""Answers of several turns: assistant turns with tool turns between; only the assistant's tokens are scored."""

from __future__ import annotations

import json
from itertools import groupby

import pytest

from mindspeed_simpo.batch import IGNORE_INDEX
from mindspeed_simpo.data.collate import COLLATE
from mindspeed_simpo.data.conversations import ExampleReader
from mindspeed_simpo.data.indexed import IndexedPairs, write_indexed_pairs
from mindspeed_simpo.data.problems import ExampleError
from tests.tokenizers import make_tokenizer
from tests.unit.data_helpers import PLAIN, encode, prepare, write_jsonl

CALLS = "{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}{% endif %}"
HEADER, END = "<|im_start|>{{ m.role }}\n", "<|im_end|>\n"
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}" + HEADER + "{{ m.content }}" + CALLS + END + "{% endfor %}" + GENERATION
# an empty thought before the last turn of the conversation only, as Qwen3
THOUGHT = CHATML.replace(
    HEADER, HEADER + "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
)

WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
USER = {"role": "user", "content": "Is it sunny in Paris?"}
ASK = {"role": "assistant", "content": "I look.", "tool_calls": [WEATHER]}
CALL_TEXT = '<call>{"name": "weather", "arguments": {"city": "Paris"}}</call>'


def tool(text):
    return {"role": "tool", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


CONVERSATIONS = {
    "chosen": [USER, ASK, tool("sunny"), says("Yes.")],
    "rejected": [USER, says("No idea.")],
}


def chatml(template=CHATML):
    tok = make_tokenizer("qwen2")
    tok.chat_template = template
    return tok


def runs(tok, ids, unscored):
    """The texts of the tokens that are scored, and of those that are not, in turn."""
    targets = list(ids)
    for start, stop in zip(unscored[::2], unscored[1::2], strict=True):
        targets[start:stop] = [IGNORE_INDEX] * (stop - start)
    pairs = list(zip(ids, targets, strict=True))
    return [(scored, tok.decode([token for token, _ in run])) for scored, run in groupby(pairs, lambda t: t[1] >= 0)]


def test_tools_between_assistant_turns_are_not_scored():
    tok = chatml()
    pair = encode(CONVERSATIONS, tok)
    assert tok.decode(pair.prompt_ids) == "<|im_start|>user\nIs it sunny in Paris?<|im_end|>\n<|im_start|>assistant\n"
    assert runs(tok, pair.chosen_ids, pair.chosen_unscored) == [
        (True, f"I look.{CALL_TEXT}<|im_end|>"),
        (False, "\n<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Yes.<|im_end|>"),
    ]
    assert runs(tok, pair.rejected_ids, pair.rejected_unscored) == [(True, "No idea.<|im_end|>")]


def test_both_sides_go_on_from_the_turns_that_they_share():
    def read(chosen, rejected):
        pair = ExampleReader(None).read({"chosen": [USER, *chosen], "rejected": [USER, *rejected]})
        return [len(turns) for turns in (pair.prompt, pair.chosen, pair.rejected)]

    same = [ASK, tool("sunny")]
    assert read([*same, says("Yes.")], [*same, says("No.")]) == [3, 1, 1]
    assert read([*same, says("Yes.")], [ASK, tool("rain"), says("No.")]) == [1, 3, 3]
    assert read([*same, *same, says("Yes.")], [*same, says("Yes.")]) == [3, 3, 1]
    assert read([*same, says("Yes.")], [ASK]) == [1, 3, 1]


def test_a_prompt_column_with_answers_of_several_turns():
    row = {"prompt": PLAIN["prompt"], "chosen": [ASK, tool("sunny"), says("Yes.")], "rejected": [says("No.")]}
    pair = ExampleReader(None).read(row)
    assert [turn.role for turn in pair.chosen] == ["assistant", "tool", "assistant"]
    whole = {name: [{"role": "user", "content": PLAIN["prompt"]}, *row[name]] for name in ("chosen", "rejected")}
    assert ExampleReader(None).read({**row, **whole}) == pair
    sharegpt = [
        {"from": "function_call", "value": json.dumps(WEATHER["function"])},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Yes."},
    ]
    row = {"conversations": [{"from": "human", "value": "q"}], "chosen": sharegpt, "rejected": sharegpt[:1]}
    assert [turn.role for turn in ExampleReader(None).read(row).chosen] == ["assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("chosen", "kind", "said"),
    [
        ([ASK, says("Yes.")], "malformed", "chosen: turn 3 is an assistant turn after turn 2 .* expected tool"),
        ([says("Hm."), tool("x"), says("Yes.")], "malformed", "chosen: turn 3 is a tool turn after turn 2"),
        (
            [says("Hm."), USER, says("Yes.")],
            "malformed",
            "an answer has assistant and tool turns only, chosen",
        ),
        ([ASK, tool("sunny"), says(" ")], "empty", "chosen: the response has no text"),
        ([ASK, tool("sunny")], "malformed", "the last turn must be an assistant turn, found a tool turn"),
    ],
)
def test_turns_out_of_order_are_refused(chosen, kind, said):
    with pytest.raises(ExampleError, match=said) as caught:
        encode({"chosen": [USER, *chosen], "rejected": [USER, says("No.")]}, chatml())
    assert caught.value.kind == kind


def test_a_tool_turn_that_the_template_leaves_out_is_refused():
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    with pytest.raises(ExampleError, match="the chat template leaves out the tool turn"):
        encode(CONVERSATIONS, chatml(template))


def test_an_empty_thought_before_one_answer_only_is_not_scored():
    tok = chatml(THOUGHT)
    pair = encode(CONVERSATIONS, tok)
    assert tok.decode(pair.prompt_ids).endswith("assistant\n")
    assert runs(tok, pair.chosen_ids, pair.chosen_unscored)[1:] == [
        (False, "\n<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (True, "Yes.<|im_end|>"),
    ]
    assert runs(tok, pair.rejected_ids, pair.rejected_unscored) == [
        (False, "<think>\n\n</think>\n\n"),
        (True, "No idea.<|im_end|>"),
    ]


def test_truncation_cuts_the_ranges_too():
    tok = chatml()
    pair = encode(CONVERSATIONS, tok)
    prompt, start = len(pair.prompt_ids), pair.chosen_unscored[0]
    for extra in (-1, 0, 2):
        cut = encode(CONVERSATIONS, tok, seq_length=prompt + start + extra, prompt_limit=prompt, truncation="keep_end")
        assert cut.chosen_ids == pair.chosen_ids[: start + extra]
        assert cut.chosen_unscored == ([start, start + extra] if extra > 0 else [])
    tok = chatml(THOUGHT)
    with pytest.raises(ExampleError, match="rejected: none of the 4 tokens that seq_length leaves is scored"):
        encode(CONVERSATIONS, tok, seq_length=prompt + 4, prompt_limit=prompt, truncation="keep_end")


@pytest.mark.parametrize("form", COLLATE)
def test_every_batching_scores_the_same_tokens(tmp_path, form):
    data = write_jsonl(tmp_path / "rows.jsonl", [CONVERSATIONS, PLAIN])
    tok = chatml()
    tok.save_pretrained(tmp_path / "model")
    dataset = prepare(tmp_path, data, tok=tok)
    pairs = [dataset[0], dataset[1]]
    batch = COLLATE[form](pairs, [0, 1])
    counts = [sum(token >= 0 for token in pair.chosen_targets) for pair in pairs]
    counts += [sum(token >= 0 for token in pair.rejected_targets) for pair in pairs]
    assert batch.response_tokens.tolist() == counts
    assert counts[0] < len(pairs[0].chosen_ids)
    scored = sorted(batch.targets[batch.targets >= 0].tolist())
    wanted = [token for pair in pairs for token in (*pair.chosen_targets, *pair.rejected_targets) if token >= 0]
    assert scored == sorted(wanted)


def test_files_of_mindspeed_llm_keep_what_is_not_scored(tmp_path):
    dataset = prepare(tmp_path, write_jsonl(tmp_path / "rows.jsonl", [CONVERSATIONS, PLAIN]), tok=chatml(THOUGHT))
    pairs = [dataset[index] for index in range(2)]
    write_indexed_pairs(tmp_path / "pairs", pairs)
    read = IndexedPairs(tmp_path / "pairs")
    for pair, again in zip(pairs, (read[0], read[1]), strict=True):
        assert again.prompt_ids + again.chosen_ids == pair.prompt_ids + pair.chosen_ids
        assert [token for token in again.chosen_targets if token >= 0] == [
            token for token in pair.chosen_targets if token >= 0
        ]
        assert again.rejected_targets == pair.rejected_targets
