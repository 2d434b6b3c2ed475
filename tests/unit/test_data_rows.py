"""Forms of examples: which are recognised, the resulting conversations, and the error messages."""

from __future__ import annotations

import json

import pytest

from mindspeed_simpo.data.conversations import ExampleReader
from mindspeed_simpo.data.problems import ExampleError
from mindspeed_simpo.errors import ConfigError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def turns(pair):
    return (
        [(message.role, message.content) for message in pair.prompt],
        pair.chosen[-1].content,
        pair.rejected[-1].content,
    )


ONE_TURN = ([("user", "q")], "good", "bad")
TWO_TURNS = ([("user", "q"), ("assistant", "a"), ("user", "q2")], "good", "bad")
WITH_SYSTEM = ([("system", "s"), ("user", "q")], "good", "bad")

FORMS = {
    "text": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, ONE_TURN),
    "text with a system column": ({"prompt": "q", "chosen": "good", "rejected": "bad", "system": "s"}, WITH_SYSTEM),
    "empty system column": ({"prompt": "q", "chosen": "good", "rejected": "bad", "system": ""}, ONE_TURN),
    "message lists": ({"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}, ONE_TURN),
    "one message": ({"prompt": [user("q")], "chosen": assistant("good"), "rejected": assistant("bad")}, ONE_TURN),
    "messages and text": ({"prompt": [system("s"), user("q")], "chosen": "good", "rejected": "bad"}, WITH_SYSTEM),
    "several turns": (
        {"prompt": [user("q"), assistant("a"), user("q2")], "chosen": "good", "rejected": "bad"},
        TWO_TURNS,
    ),
    "whole conversations": (
        {
            "chosen": [user("q"), assistant("a"), user("q2"), assistant("good")],
            "rejected": [user("q"), assistant("a"), user("q2"), assistant("bad")],
        },
        TWO_TURNS,
    ),
    "whole conversations in from/value": (
        {"chosen": [human("q"), gpt("good")], "rejected": [human("q"), gpt("bad")]},
        ONE_TURN,
    ),
    "ultrafeedback": (
        {
            "prompt": "q",
            "prompt_id": "x1",
            "chosen": [user("q"), assistant("good")],
            "rejected": [user("q"), assistant("bad")],
            "messages": [user("q"), assistant("good")],
            "score_chosen": 8.0,
        },
        ONE_TURN,
    ),
    "prompt repeated in the conversations": (
        {
            "prompt": [user("q")],
            "chosen": [user("q"), assistant("good")],
            "rejected": [user("q"), assistant("bad")],
        },
        ONE_TURN,
    ),
    "sharegpt": ({"conversations": [human("q")], "chosen": gpt("good"), "rejected": gpt("bad")}, ONE_TURN),
    "sharegpt with system": (
        {
            "conversations": [{"from": "system", "value": "s"}, human("q")],
            "chosen": gpt("good"),
            "rejected": gpt("bad"),
            "tools": "",
        },
        WITH_SYSTEM,
    ),
    "openai messages": ({"messages": [user("q")], "chosen": assistant("good"), "rejected": assistant("bad")}, ONE_TURN),
    "alpaca list": ({"instruction": "q", "input": "", "output": ["good", "bad"]}, ONE_TURN),
    "alpaca input": (
        {"instruction": "q", "input": "more", "output": ["good", "bad"], "system": "s"},
        ([("system", "s"), ("user", "q\nmore")], "good", "bad"),
    ),
    "alpaca history": (
        {"instruction": "q2", "history": [["q", "a"]], "chosen": "good", "rejected": "bad"},
        TWO_TURNS,
    ),
    "null columns": ({"prompt": "q", "chosen": "good", "rejected": "bad", "system": None, "tools": None}, ONE_TURN),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_row_form_becomes_its_turns(form):
    row, expected = FORMS[form]
    assert turns(ExampleReader(None).read(row)) == expected


@pytest.mark.parametrize(
    ("map_keys", "row", "expected"),
    [
        (
            {"prompt": "question", "query": "", "system": "system"},
            {"question": "q", "system": "s", "input": "unrelated", "chosen": "good", "rejected": "bad"},
            WITH_SYSTEM,
        ),
        (
            {"chosen": "output", "rejected": "output"},
            {"instruction": "q", "input": "", "output": ["good", "bad"]},
            ONE_TURN,
        ),
        ({"response": "answers"}, {"instruction": "q", "answers": ["good", "bad"]}, ONE_TURN),
        (
            {
                "messages": "chat",
                "tags": {"role_tag": "who", "content_tag": "text", "user_tag": "U", "assistant_tag": "A"},
            },
            {
                "chat": [{"who": "U", "text": "q"}, {"who": "A", "text": "a"}, {"who": "U", "text": "q2"}],
                "chosen": {"who": "A", "text": "good"},
                "rejected": {"who": "A", "text": "bad"},
            },
            TWO_TURNS,
        ),
        (
            {"prompt": "instruction"},
            {"prompt": "rendered", "instruction": "q", "chosen": "good", "rejected": "bad"},
            ONE_TURN,
        ),
    ],
)
def test_map_keys_name_other_columns(map_keys, row, expected):
    assert turns(ExampleReader(map_keys).read(row)) == expected


@pytest.mark.parametrize(
    ("map_keys", "words"),
    [
        ({"promt": "question"}, "did you mean `prompt`"),
        ({"tags": {"role": "from"}}, "did you mean `role_tag`"),
        ({"tags": "from"}, "`tags` must be an object"),
        ({"chosen": {"a": "b"}}, "`chosen` must be the name of one column"),
    ],
)
def test_wrong_map_keys_are_refused_before_any_row(map_keys, words):
    with pytest.raises(ConfigError, match=words):
        ExampleReader(map_keys)


def test_a_mapped_column_that_is_not_there_is_reported():
    with pytest.raises(ExampleError, match="map_keys names the column `sytem` for `system`, the row has `prompt`"):
        ExampleReader({"system": "sytem"}).read({"prompt": "q", "chosen": "a", "rejected": "b"})


ASK = {"prompt": "q", "chosen": "good", "rejected": "bad"}
CALL = {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Paris"}})}
MALFORMED = [
    (5, "expected an object of columns, found the number 5"),
    ([], "found a list of 0"),
    (None, "found null"),
    ({}, "no chosen response.*no columns"),
    ({"text": "x"}, "no chosen response: expected the column `chosen`, the row has `text`"),
    ({"prompt": "q", "chosen": "a"}, "no rejected response"),
    ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected: expected text.*found null"),
    ({"chosen": "a", "rejected": "b"}, "no prompt: expected the column `prompt`, `instruction`"),
    (ASK | {"prompt": 5}, "prompt: expected text, found the number 5"),
    (ASK | {"prompt": True}, "prompt: expected text, found true"),
    (ASK | {"prompt": {"role": "user"}}, "prompt: expected text, found an object with the keys `role`"),
    (ASK | {"chosen": 1.5}, "chosen: expected text, a message or a list of messages, found the number 1.5"),
    (ASK | {"chosen": ["good"]}, r"chosen\[0\]: expected a message object, found the text 'good'"),
    (ASK | {"chosen": [user("x")]}, "the last turn must be an assistant turn, found a user turn"),
    (ASK | {"chosen": [assistant("x"), assistant("y")]}, r"chosen: turn 3 is an assistant turn after turn 2"),
    (ASK | {"chosen": {}}, "expected the keys `role` and `content`, or `from` and `value`"),
    (ASK | {"chosen": None}, "chosen: expected text, a message or a list of messages, found null"),
    (ASK | {"prompt": None}, "no prompt: .*and `prompt` is null"),
    (ASK | {"chosen": {"role": "assistant"}}, "`content` is missing or null"),
    (ASK | {"chosen": {"role": "assistant", "content": None}}, "`content` is missing or null"),
    (ASK | {"chosen": {"role": "assistant", "content": [{"type": "text"}]}}, "chosen.content.0..text: expected text"),
    (ASK | {"chosen": {"role": "assistant", "content": [{"type": "video"}]}}, "a part of type 'video'"),
    (ASK | {"chosen": {"role": "assistant", "content": {"type": "text"}}}, "chosen.content: expected text, found an"),
    (ASK | {"chosen": {"role": ["assistant"], "content": "x"}}, "chosen.role: unknown role, a list of 1"),
    (ASK | {"chosen": "a \ud800 b"}, "half of a pair"),
    (ASK | {"prompt": [{"role": "bot", "content": "x"}]}, r"prompt\[0\].role: unknown role, the text 'bot'; exp"),
    (ASK | {"prompt": [assistant("x")]}, "turn 1 is an assistant turn at the start; expected system or user"),
    (ASK | {"prompt": [user("x"), user("y")]}, r"turn 2 is a user turn after turn 1 \(user\); expected assistant"),
    (ASK | {"prompt": [user("x"), assistant("y")]}, "must end with a user turn, it ends with an assistant turn"),
    (ASK | {"prompt": [user("x"), system("y")]}, "turn 2 is a system turn"),
    (ASK | {"prompt": [system("x")]}, "must end with a user turn, it ends with a system turn"),
    (ASK | {"prompt": [system("s"), user("x")], "system": "t"}, "`system` column and a system turn .* differ"),
    (ASK | {"system": ["s"]}, "system: expected text, found a list of 1"),
    (ASK | {"instruction": "q"}, "both `prompt`, `instruction` could be the prompt; say which with map_keys"),
    (ASK | {"history": "x"}, "history: expected a list"),
    (ASK | {"history": [["only one"]]}, r"history\[0\]: expected \[question, answer\], found a list of 1"),
    (ASK | {"history": [[1, 2]]}, r"history\[0\]\[0\]: expected text"),
    (ASK | {"prompt": [user("q")], "history": [["a", "b"]]}, "`history` goes with a text prompt"),
    (ASK | {"tools": "{bad"}, "tools: expected tools as JSON"),
    (ASK | {"tools": "5"}, "tools: expected a list of tool objects, found the number 5"),
    ({"instruction": "q", "output": ["a"]}, r"output: expected a list of two texts.*found a list of 1"),
    ({"instruction": "q", "output": "a"}, "output: expected a list of two texts"),
    ({"instruction": "q", "output": ["a", 7]}, r"output\[1\]: expected text"),
    ({"conversations": "q", "chosen": "a", "rejected": "b"}, "conversations: expected a list of messages"),
    ({"conversations": [human("q"), gpt("a")], "chosen": gpt("a"), "rejected": gpt("b")}, "must end with a user turn"),
    ({"conversations": [human("q")], "chosen": human("a"), "rejected": gpt("b")}, "an assistant turn, found a user"),
    ({"conversations": [human("q"), CALL, human("x")], "chosen": "a", "rejected": "b"}, "turn 3 is a user.*cted tool"),
    (
        {"conversations": [human("q"), CALL | {"value": "weather()"}], "chosen": "a", "rejected": "b"},
        "expected a function call as JSON",
    ),
    (
        {"chosen": [user("q"), assistant("a")], "rejected": [user("other"), assistant("b")]},
        "part at turn 1 of 2 and 2: an answer has assistant and tool turns only, chosen has a user turn",
    ),
    (
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("x"), user("y"), assistant("b")]},
        "part at turn 2 of 2 and 4",
    ),
    (
        {"prompt": "other", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        "`prompt` is no user turn",
    ),
    (ASK | {"conversations": [human("another")]}, "`prompt` is no user turn"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "words"), MALFORMED)
def test_a_malformed_row_says_what_is_wrong(row, words):
    with pytest.raises(ExampleError, match=words) as caught:
        ExampleReader(None).read(row)
    assert caught.value.kind == "malformed"


@pytest.mark.parametrize(
    "row",
    [
        ASK | {"prompt": "  "},
        ASK | {"chosen": ""},
        ASK | {"rejected": " \n"},
        ASK | {"prompt": []},
        ASK | {"chosen": []},
        ASK | {"prompt": [user("x"), assistant(""), user("y")]},
        {"conversations": [], "chosen": gpt("a"), "rejected": gpt("b")},
        {"instruction": "", "input": "", "output": ["a", "b"]},
    ],
)
def test_an_empty_part_is_counted_as_empty(row):
    with pytest.raises(ExampleError) as caught:
        ExampleReader(None).read(row)
    assert caught.value.kind == "empty"


def test_equal_answers_are_identical():
    with pytest.raises(ExampleError) as caught:
        ExampleReader(None).read({"prompt": "q", "chosen": "same", "rejected": "same"})
    assert caught.value.kind == "identical"


def test_function_calls_become_the_calls_that_templates_read():
    row = {
        "conversations": [human("weather?"), CALL, {"from": "observation", "value": "rain"}],
        "chosen": gpt("Rain."),
        "rejected": gpt("Sun."),
        "tools": [{"type": "function", "function": {"name": "weather"}}],
    }
    pair = ExampleReader(None).read(row)
    call = pair.prompt[1].for_template()
    assert call["tool_calls"] == [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]
    assert [message.role for message in pair.prompt] == ["user", "assistant", "tool"]
    assert json.loads(pair.tools) == row["tools"]
