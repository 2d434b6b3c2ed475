"""Sampling of on-policy pairs: prompts, draws, selection, rows, journals, and a run in this process."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from mindspeed_simpo.data.problems import ExampleError
from mindspeed_simpo.data.prompts import PromptReader
from mindspeed_simpo.errors import ConfigError, DataError
from mindspeed_simpo.studies.sampling.generators.local import TransformersGenerator, _Drawn
from mindspeed_simpo.studies.sampling.journal import Journal, check_facts, claimed
from mindspeed_simpo.studies.sampling.rows import PairRows
from mindspeed_simpo.studies.sampling.selection import Scored, select
from mindspeed_simpo.studies.sampling.settings import SamplingSettings
from tests.hf import make_checkpoint
from tests.unit.sampling_helpers import NO, SYSTEM, USER, YES, configured, draw_of, prompts_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("sampling") / "qwen2", hidden=32, std=0.2)


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"prompt": "Why?"}, "user"),
        ({"prompt": [USER]}, "user"),
        ({"messages": [SYSTEM, USER]}, "system user"),
        ({"messages": [USER, YES, USER, NO]}, "user assistant user"),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}, "user"),
        ({"instruction": "Say", "input": "why", "history": [["a", "b"]], "system": "x", "output": "y"},
         "system user assistant user"),
        ({"prompt": "Why?", "chosen": "Yes.", "rejected": "Yes."}, "user"),
        ({"prompt": "Why?", "chosen": [USER, YES], "rejected": [USER, NO], "messages": [USER, YES]}, "user"),
        ({"chosen": [USER, YES, USER, NO], "rejected": [USER, YES, USER, YES]}, "user assistant user"),
        ({"chosen": [USER, YES], "rejected": [USER, YES]}, "user"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "user"),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0}, "user"),
        ({"context": [USER, YES, USER], "response1": "a", "response2": "b", "overall_preference": 0},
         "user assistant user"),
        ({"conversation_a": [USER, YES], "conversation_b": [USER, NO], "winner": "tie"}, "user"),
        ({"question": "Why?", "answers": [{"text": "a", "pm_score": 1}]}, "user"),
        ({"prompt": "Why?", "response": "a", "helpfulness": 3}, "user"),
    ],
)  # fmt: skip
def test_prompts_of_every_form_of_row(row, roles):
    prompt = PromptReader(None).read_prompt(row)
    assert " ".join(message.role for message in prompt.messages) == roles
    assert prompt.messages[-1].content


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"messages": [SYSTEM]}, "must end with a user turn"),
        ({"prompt": "look", "images": ["a.png"]}, "images"),
        ({"prompt": ""}, "no text"),
        ("text", "expected an object"),
    ],
)
def test_rows_without_a_prompt_say_why(row, message):
    with pytest.raises(ExampleError, match=message):
        PromptReader(None).read_prompt(row)


def test_prompts_are_counted_and_rendered_as_in_training(folder, tmp_path):
    long = {"prompt": "tide " * 200}
    rows = [{"prompt": "Why?"}, {"prompt": [USER]}, long, {"chosen": "x"}, {"prompt": "How?"}, {"prompt": "When?"}]
    config = configured(folder, data_errors="drop", truncation="drop")
    found, _ = prompts_of(folder, tmp_path, rows, config)
    assert (found.rows, found.duplicates, found.too_long, found.unusable) == (6, 1, 1, 1)
    text = found.prompts[0].text
    assert text.endswith("<|im_start|>assistant\n")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert list(found.prompts[0].ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.prompts[0].limit + len(found.prompts[0].ids) == 95
    shards = [prompts_of(folder, tmp_path, rows, config, shard=f"{part}/2")[0].prompts for part in (1, 2)]
    assert [[prompt.index for prompt in shard] for shard in shards] == [[0, 2], [1]]
    with pytest.raises(DataError, match=r"(?s)prompts\.jsonl:4: no prompt.*prompts are too long.*jsonl:3"):
        prompts_of(folder, tmp_path, rows)
    with pytest.raises(DataError, match="scorer_columns names the column `truth`"):
        prompts_of(folder, tmp_path, [{"prompt": "Why?"}], scorer_columns="truth")


def test_an_empty_thought_of_the_template_is_in_the_prompt(tmp_path):
    folder = make_checkpoint(tmp_path / "qwen3", "qwen3", hidden=16, layers=1)
    found, _ = prompts_of(folder, tmp_path, [{"prompt": "Why?"}])
    template = AutoTokenizer.from_pretrained(folder).apply_chat_template([USER, YES], tokenize=False)
    assert template.startswith(found.prompts[0].text + "Yes.")


def test_draws_follow_the_distribution_and_top_p():
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0]])).repeat(4000, 1)
    drawn = _Drawn(range(4000), 1, 0, torch.device("cpu"))(torch.zeros(4000, 0, dtype=torch.long), scores)
    assert (drawn.isfinite().sum(-1) == 1).all()
    shares = torch.bincount(drawn.argmax(-1), minlength=5) / 4000
    # five standard deviations
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]), atol=0.04, rtol=0)
    assert shares[4] == 0


def test_answers_do_not_depend_on_the_batch(folder, tmp_path):
    rows = [{"prompt": text} for text in ("Why?", "What is the capital of France?", "The tide", "Water boils at")]
    prompts = prompts_of(folder, tmp_path, rows, max_new_tokens=10)[0].prompts
    everything = frozenset(range(4))

    def generator(size, **values):
        return TransformersGenerator(folder, None, draw_of(folder, **values), size, torch.device("cpu"), torch.float32)

    whole = dict(generator(64).answers(prompts, everything))
    assert [len(whole[index]) for index in range(4)] == [3] * 4
    assert len({answer.text for answers in whole.values() for answer in answers}) == 12
    assert dict(generator(3).answers(prompts, everything)) == whole
    assert dict(generator(3).answers(prompts, frozenset({2}))) == {2: whole[2]}
    # a nucleus of one token is greedy: all answers to a prompt are one
    for answers in dict(generator(64, top_p=1e-6).answers(prompts, everything)).values():
        assert len(set(answers)) == 1


def test_an_answer_ends_before_its_end_token_and_has_no_special_token(folder):
    draw = draw_of(folder)
    ids = draw.tokenizer("Paris.")["input_ids"]
    start, end = draw.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ended = draw.answer([*ids, start, end, 5, 5], 50)
    assert (ended.text, ended.cut) == ("Paris.", False)
    cut = draw.answer([*ids, end], len(ids))
    assert (cut.text, cut.cut) == ("Paris.", True)


def scored(*values, cut=(), lengths=None):
    return [Scored(s, (lengths or [10] * len(values))[i], i in cut) for i, s in enumerate(values)]


@pytest.mark.parametrize(
    ("answers", "limits", "expected"),
    [
        (scored(1, 5, 3, -2, 5), {}, (1, 3)),
        (scored(2, 2, 2), {}, "tied"),
        (scored(2), {}, "too_few"),
        (scored(), {}, "too_few"),
        (scored(1, 2), {"min_gap": 1.0}, (1, 0)),
        (scored(1, 2), {"min_gap": 1.1}, "below_gap"),
        (scored(1, 5, 3, cut={1}), {}, (2, 0)),
        (scored(1, 5, 3, cut={1}), {"cut_may_be_chosen": True}, (1, 0)),
        (scored(3, 1, cut={0}), {}, "cut"),
        (scored(3, 1, cut={1}), {}, (0, 1)),
        (scored(9, 5, 4, 0, lengths=[40, 10, 12, 15]), {"max_length_ratio": 1.5}, (1, 3)),
        (scored(9, 5, lengths=[40, 10]), {"max_length_ratio": 3.9}, "unlike_lengths"),
        (scored(9, 5, lengths=[40, 10]), {"max_length_ratio": 4.0}, (0, 1)),
    ],
)
def test_selection(answers, limits, expected):
    assert (
        select(answers, **{"min_gap": 0.0, "max_length_ratio": None, "cut_may_be_chosen": False} | limits) == expected
    )


@pytest.mark.parametrize(
    "map_keys",
    [
        None,
        {"prompt": "question", "chosen": "good", "rejected": "bad", "system": "role_text"},
        {"messages": "talk", "chosen": "both", "rejected": "both"},
        {"prompt": "", "messages": "conversations", "tags": {"role_tag": "who", "content_tag": "says"}},
        {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    ],
)
def test_rows_are_read_under_the_names_of_the_configuration(folder, tmp_path, map_keys):
    found, rendering = prompts_of(folder, tmp_path, [{"messages": [SYSTEM, USER, YES, USER]}])
    rows = PairRows(map_keys, rendering)
    row, tokens = rows.row(found.prompts[0], "The tide.", "No.", {"score_chosen": 1.0, "score_rejected": 0.5})
    assert json.loads(json.dumps(row)) == row
    assert tokens[0] > tokens[1] > 1
    with pytest.raises(ExampleError, match="same"):
        rows.row(found.prompts[0], "No.", "No.", {})


def test_journals_lose_at_most_the_last_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    journal = Journal(path)
    for index in (4, 2):
        journal.add(index, {"answers": [["é", False]] * index})
    journal.add(2, {"answers": []})
    journal.close()
    whole = path.read_bytes()
    for end in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:end])
        journal = Journal(path)
        assert len(journal) == 1
        journal.add(2, {"answers": [["é", False]] * 2})
        assert len(journal[4]["answers"]) == 4
        journal.close()
        assert path.read_bytes() == whole
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(DataError, match=r"answers\.jsonl:1: the line is damaged"):
        Journal(path)


def test_a_run_that_goes_on_asks_for_the_same(tmp_path):
    journal, facts = Journal(tmp_path / "answers.jsonl"), tmp_path / "answers.json"
    check_facts(facts, {"n": 5, "seed": 1}, journal)
    begun = check_facts(facts, {"n": 4, "seed": 1}, journal)
    journal.add(0, {"answers": []})
    assert check_facts(facts, {"n": 4, "seed": 1}, journal) == begun
    with pytest.raises(ConfigError, match=r"n: 4 before, 5 now\n  top_p: none before, 1.0 now\nGive the same"):
        check_facts(facts, {"n": 5, "seed": 1, "top_p": 1.0}, journal)
    journal.close()
    with claimed(tmp_path), pytest.raises(ConfigError, match="another process samples"), claimed(tmp_path):
        pass


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scorer": None}, "one of --reward-model, --ranker and --scorer, found none"),
        ({"ranker": "r"}, "found --ranker and --scorer"),
        ({"temperature": "0"}, "--temperature: input should be greater than 0, found 0"),
        ({"n": "1"}, "--n: .*greater than or equal to 2"),
        ({"shard": "3/2"}, "--shard: expected I/N"),
        ({"generator": "server"}, "needs --server"),
        ({"server": "host:80"}, "--server: expected an address"),
        ({"output": "pairs.txt"}, r"--output: expected the name of a \.jsonl file"),
        ({"ranker_format": "{prompt}"}, "expected a text with {first}, {second}"),
        ({"prompts": None}, "--prompts is required"),
    ],
)
def test_wrong_flags_are_named(values, message):
    given = {"prompts": "p", "output": "o.jsonl", "scorer": "x"} | values
    with pytest.raises(ConfigError, match=message):
        SamplingSettings.of({name: value for name, value in given.items() if value is not None})
