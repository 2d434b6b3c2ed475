"""Published preference sets, in the columns that they have: which response becomes chosen, and what is left out."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mindspeed_simpo.data.conversations import ExampleReader
from mindspeed_simpo.data.problems import ExampleError
from mindspeed_simpo.errors import ConfigError, DataError
from tests.unit.data_helpers import prepare, write_jsonl


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def helpsteer2(strength, prompt="q"):
    return {
        "split": "train",
        "prompt": prompt,
        "response_1": "first",
        "response_2": "second",
        "preference_strength": strength,
        "preference_statement": "Response 2 is better.",
        "preference_elaboration": "It is.",
    }


def helpsteer3(preference):
    return {
        "domain": "general",
        "language": "english",
        "context": [user("q"), assistant("a"), user("q2")],
        "response1": "first",
        "response2": "second",
        "overall_preference": preference,
        "individual_preference": [{"score": preference, "reasoning": "r", "feedback1": "f", "feedback2": "f"}],
    }


def safe_rlhf(better, safer):
    return {
        "prompt": "q",
        "response_0": "first",
        "response_1": "second",
        "prompt_source": "Alpaca3-70B",
        "is_response_0_safe": True,
        "is_response_1_safe": True,
        "better_response_id": better,
        "safer_response_id": safer,
    }


def shp(label):
    return {
        "post_id": "x",
        "domain": "askphysics_train",
        "history": "q",
        "human_ref_A": "first",
        "human_ref_B": "second",
        "labels": label,
        "score_A": 3,
        "score_B": 2,
    }


def arena(winner):
    return {
        "question_id": "x",
        "model_a": "m",
        "model_b": "n",
        "winner": winner,
        "conversation_a": [user("q"), assistant("first")],
        "conversation_b": [user("q"), assistant("second")],
    }


def stack_exchange(*scores):
    answers = [
        {"answer_id": i, "author": "x", "pm_score": score, "selected": i == 0, "text": f"answer {i}"}
        for i, score in enumerate(scores)
    ]
    return {"qid": 1, "question": "q", "answers": answers, "date": "2020/01/01", "metadata": ["https://x"]}


def nectar(*ranks):
    return {
        "prompt": "\n\nHuman: q \n\nAssistant: ",
        "answers": [{"answer": f"answer {i}", "model": "m", "rank": rank} for i, rank in enumerate(ranks)],
        "turns": 1,
        "source": ["sharegpt"],
    }


def orca(**more):
    return {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"} | more


WHOLE = {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]}
HUMAN = "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant:"
ONE_TURN, THREE_TURNS = [("user", "q")], [("user", "q"), ("assistant", "a"), ("user", "q2")]
WITH_SYSTEM = [("system", "s"), ("user", "q")]

LAYOUTS = {
    "UltraFeedback binarized": (
        WHOLE | {"prompt": "q", "prompt_id": "x", "messages": WHOLE["chosen"], "score_chosen": 8, "score_rejected": 5},
        (ONE_TURN, "good", "bad"),
    ),
    "SimPO's UltraFeedback": (
        WHOLE | {"prompt": "q", "prompt_id": "x", "all_generated_responses": ["good", "bad"], "all_rm_scores": [1, 0]},
        (ONE_TURN, "good", "bad"),
    ),
    "cleaned UltraFeedback": (
        WHOLE | {"prompt": "q", "source": "x", "chosen-rating": 5, "chosen-model": "m", "rejected-rating": 2},
        (ONE_TURN, "good", "bad"),
    ),
    "Tulu 3": (WHOLE | {"id": "x", "prompt": "q", "source": "x"}, (ONE_TURN, "good", "bad")),
    "math preference": (
        {
            "metadata": "{}",
            "instruction": "q",
            "chosen_response": "good",
            "chosen_rating": 4.5,
            "rejected_response": "bad",
            "rejected_rating": 2.0,
        },
        (ONE_TURN, "good", "bad"),
    ),
    "HH-RLHF": (
        {"chosen": f"{HUMAN} good\n\nwith Human: inside", "rejected": f"{HUMAN} bad"},
        (THREE_TURNS, "good\n\nwith Human: inside", "bad"),
    ),
    "prompt as transcript": (
        {"prompt": HUMAN, "response": " good", "chosen": "good", "rejected": "bad"},
        (THREE_TURNS, "good", "bad"),
    ),
    "Orca pairs": (orca(), (WITH_SYSTEM, "good", "bad")),
    "Orca pairs, no system": (orca(system=""), (ONE_TURN, "good", "bad")),
    "distilled Orca pairs": (
        {"system": "s", "input": "q", "chosen": "good", "rejected": "bad", "status": "swapped", "original_chosen": "x"},
        (WITH_SYSTEM, "good", "bad"),
    ),
    "HelpSteer2, the first": (helpsteer2(-2), (ONE_TURN, "first", "second")),
    "HelpSteer2, the second": (helpsteer2(1), (ONE_TURN, "second", "first")),
    "HelpSteer3, the first": (helpsteer3(-1), (THREE_TURNS, "first", "second")),
    "HelpSteer3, the second": (helpsteer3(3), (THREE_TURNS, "second", "first")),
    "SafeRLHF, the first": (safe_rlhf(0, 0), (ONE_TURN, "first", "second")),
    "SafeRLHF, the second": (safe_rlhf(1, 1), (ONE_TURN, "second", "first")),
    "SHP, A": (shp(1), (ONE_TURN, "first", "second")),
    "SHP, B": (shp(0), (ONE_TURN, "second", "first")),
    "Arena, a": (arena("model_a"), (ONE_TURN, "first", "second")),
    "Arena, b": (arena("model_b"), (ONE_TURN, "second", "first")),
    "Stack Exchange": (stack_exchange(2, 7, 0, 7), (ONE_TURN, "answer 1", "answer 2")),
    "Stack Exchange paired": (
        {"qid": 1, "question": "q", "response_j": "good", "response_k": "bad", "metadata": []},
        (ONE_TURN, "good", "bad"),
    ),
    "Nectar": (nectar(3, 1, 2), (ONE_TURN, "answer 1", "answer 0")),
}


def turns(pair):
    return (
        [(message.role, message.content) for message in pair.prompt],
        pair.chosen[-1].content,
        pair.rejected[-1].content,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout_loads_with_no_key(layout):
    row, expected = LAYOUTS[layout]
    assert turns(ExampleReader(None).read(row)) == expected


@pytest.mark.parametrize(
    "row",
    [
        *(helpsteer2(0), helpsteer3(0), arena("tie"), arena("tie (bothbad)"), stack_exchange(4, 4), nectar(1, 1)),
        orca(status="tie", original_chosen="good"),
    ],
)
def test_a_tie_is_no_pair(row):
    with pytest.raises(ExampleError) as caught:
        ExampleReader(None).read(row)
    assert caught.value.kind == "tie"


def test_ties_are_counted_and_never_fail(tmp_path):
    rows = [helpsteer2(0, "a"), helpsteer2(1, "b"), helpsteer2(0, "c"), stack_exchange(3)]
    dataset = prepare(tmp_path, rows)
    report = dataset.report
    assert (report.rows, report.kept, report.tie, report.unpaired) == (4, 1, 2, 1)
    assert "4 rows, 1 pairs kept; left out: 2 tied, 1 unpaired" in report.summary()
    with pytest.raises(DataError, match="no pair is left of 1 rows"):
        prepare(tmp_path, [helpsteer2(0)])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (helpsteer2(None), "`response_1` and `response_2` have no label: expected `preference_strength`"),
        (helpsteer2("2"), "preference_strength: the text '2' does not say which response is better"),
        (safe_rlhf(2, None), "better_response_id: the number 2 does not say"),
        (safe_rlhf(0, 1), "`better_response_id`, `safer_response_id` prefer different responses; name the one"),
        (WHOLE | {"better_response_id": 1}, "`chosen` and `rejected` are read as chosen and rejected, but `better_res"),
        (stack_exchange(1, "x"), r"answers\[1\].pm_score: expected a number, found the text 'x'"),
        ({"question": "q", "answers": [{"text": "a"}]}, r"answers\[0\]: expected one text of .* and one score of"),
        ({"question": "q", "answers": ["a", "b"]}, r"answers\[0\]: expected an object with a text and a score"),
    ],
)
def test_a_label_that_cannot_be_followed_is_named(row, words):
    with pytest.raises(ExampleError, match=words) as caught:
        ExampleReader(None).read(row)
    assert caught.value.kind == "malformed"


@pytest.mark.parametrize(
    ("row", "first", "second", "label"),
    [
        (helpsteer2(2), "response_1", "response_2", "preference_strength"),
        (safe_rlhf(1, 1), "response_0", "response_1", "better_response_id"),
        (shp(0) | {"prompt": "q", "history": None}, "human_ref_A", "human_ref_B", "labels"),
    ],
)
def test_columns_that_map_keys_names_do_not_hide_a_label(row, first, second, label):
    names = {"chosen": first, "rejected": second}
    with pytest.raises(ExampleError, match=f"`{first}` and `{second}` are read as .*`{label}`.*out of map_keys"):
        ExampleReader(names).read(row)
    assert ExampleReader({**names, "label": ""}).read(row).chosen[-1].content == "first"


def test_map_keys_names_the_label_to_follow():
    row = safe_rlhf(0, 1)
    assert ExampleReader({"label": "better_response_id"}).read(row).chosen[-1].content == "first"
    assert ExampleReader({"label": "safer_response_id"}).read(row).chosen[-1].content == "second"
    with pytest.raises(ConfigError, match="`label` must be one of preference_strength"):
        ExampleReader({"label": "upvotes"})


HELPSTEER = [
    {"prompt": "a", "response": "worse", "helpfulness": 1, "correctness": 4, "verbosity": 2},
    {"prompt": "a", "response": "better", "helpfulness": 3, "correctness": 4, "verbosity": 1},
    {"prompt": "b", "response": "x", "helpfulness": 2, "correctness": 1, "verbosity": 2},
    {"prompt": "b", "response": "y", "helpfulness": 2, "correctness": 4, "verbosity": 2},
    {"prompt": "c", "response": "alone", "helpfulness": 2, "correctness": 4, "verbosity": 2},
    {"prompt": "d", "response": "1", "helpfulness": 1, "correctness": 4, "verbosity": 2},
    {"prompt": "d", "response": "3", "helpfulness": 3, "correctness": 4, "verbosity": 2},
    {"prompt": "d", "response": "2", "helpfulness": 2, "correctness": 4, "verbosity": 2},
]


def answers(dataset):
    from tests.unit.data_helpers import texts

    end = "<|im_end|>"
    return [tuple(text.removesuffix(end) for text in texts(dataset, i)[1:]) for i in range(len(dataset))]


def test_single_answers_are_paired_by_prompt(tmp_path):
    dataset = prepare(tmp_path, HELPSTEER)
    assert answers(dataset) == [("better", "worse"), ("3", "1")]
    assert [dataset[i].source.rpartition(":")[2] for i in range(2)] == ["1", "6"]
    assert (dataset.report.rows, dataset.report.tie, dataset.report.unpaired) == (4, 1, 1)


def test_single_answers_with_a_yes_or_no(tmp_path):
    rows = [
        {"prompt": [user("a")], "completion": [assistant("bad")], "label": False},
        {"prompt": [user("a")], "completion": [assistant("good")], "label": True},
    ]
    assert answers(prepare(tmp_path, rows)) == [("good", "bad")]


def test_the_column_of_the_score_can_be_named(tmp_path):
    dataset = prepare(tmp_path, HELPSTEER, map_keys={"score": "verbosity"})
    assert answers(dataset) == [("worse", "better")]
    questions = [
        {"question": row["prompt"], "response": row["response"], "stars": row["helpfulness"]} for row in HELPSTEER
    ]
    dataset = prepare(tmp_path, questions, map_keys={"score": "stars", "prompt": "question"})
    assert answers(dataset) == [("better", "worse"), ("3", "1")]


def test_answers_of_one_prompt_must_be_adjacent(tmp_path):
    rows = [HELPSTEER[0], HELPSTEER[2], HELPSTEER[1]]
    with pytest.raises(DataError, match=r"rows.jsonl:3: .*not in adjacent rows \(others begin at 1\): sort by prompt"):
        prepare(tmp_path, rows)
    with pytest.raises(DataError, match="helpfulness: expected a number, found the text 'high'"):
        prepare(tmp_path, [HELPSTEER[0], {**HELPSTEER[1], "helpfulness": "high"}])


@pytest.mark.parametrize("rows", [[helpsteer3(1)], [shp(0)], HELPSTEER, [stack_exchange(1, 2)], [nectar(2, 1)]])
def test_tables_are_read_with_the_columns_of_a_layout(tmp_path, rows):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", [json.loads(json.dumps(row)) for row in rows])
    table, lines = (prepare(tmp_path, tmp_path / name) for name in ("a.parquet", "a.jsonl"))
    assert answers(table) == answers(lines)
    assert len(table) >= 1
