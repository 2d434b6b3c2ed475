"""Sampling of on-policy pairs, part by part: prompts, draws, servers, scorers, selection, rows, journals."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from mindspeed_simpo.config.file import validate
from mindspeed_simpo.data.problems import ExampleError
from mindspeed_simpo.data.prompts import Prompt, PromptReader
from mindspeed_simpo.data.turns import Message
from mindspeed_simpo.errors import ConfigError, DataError, ModelError
from mindspeed_simpo.studies.sampling.generators import server
from mindspeed_simpo.studies.sampling.generators.local import TransformersGenerator, _Drawn
from mindspeed_simpo.studies.sampling.generators.server import ServerError, ServerGenerator
from mindspeed_simpo.studies.sampling.journal import Journal, check_facts, claimed
from mindspeed_simpo.studies.sampling.prompts import Rendering, read_prompts
from mindspeed_simpo.studies.sampling.record import Candidates, Draw, SamplingPrompt
from mindspeed_simpo.studies.sampling.rows import PairRows
from mindspeed_simpo.studies.sampling.run import sample
from mindspeed_simpo.studies.sampling.scorers.classifier import Classifier
from mindspeed_simpo.studies.sampling.scorers.program import ScorerError, ScorerProgram
from mindspeed_simpo.studies.sampling.scorers.ranker import PairRanker, mean_wins
from mindspeed_simpo.studies.sampling.scorers.reward import RewardModel
from mindspeed_simpo.studies.sampling.selection import Scored, select
from mindspeed_simpo.studies.sampling.settings import SamplingSettings
from tests.completions import Completions, serving
from tests.hf import make_checkpoint
from tests.unit.conftest import FAKES

USER = {"role": "user", "content": "Why?"}
SYSTEM = {"role": "system", "content": "Be brief."}
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("sampling") / "qwen2", hidden=32, std=0.2)


def configured(folder, **values):
    return validate({"model_name_or_path": str(folder), "data_path": "d", "seq_length": 96} | values, where="test")


def settings_of(rows, tmp_path, **values):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {"prompts": str(path), "output": str(tmp_path / "pairs.jsonl"), "scorer": "true"} | values
    return SamplingSettings.of(values)


def prompts_of(folder, tmp_path, rows, config=None, **values):
    config = config or configured(folder)
    rendering = Rendering(config, AutoTokenizer.from_pretrained(folder))
    return read_prompts(config, settings_of(rows, tmp_path, **values), rendering), rendering


def draw_of(folder, n=3, **values):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = frozenset(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    return Draw(tokenizer, n, values.get("temperature", 0.8), values.get("top_p", 1.0), 7, ends)


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


@pytest.mark.parametrize(("form", "strict", "requests"), [("ids", False, 4), ("text", True, 7), ("chat", True, 7)])
def test_a_server_answers(folder, tmp_path, monkeypatch, form, strict, requests):
    monkeypatch.setattr(server, "PAUSES_S", (0.0, 0.0))
    found, _ = prompts_of(folder, tmp_path, [{"prompt": "Why?"}, {"prompt": "How?"}], max_new_tokens=5)
    completions = Completions(folder, strict=strict)
    completions.faults = [] if strict else [503, 500]
    with serving(completions) as address:
        generator = ServerGenerator(address, None, form, draw_of(folder), 1, 20.0, None, "own")
        answers = dict(generator.answers(found.prompts, frozenset({0, 1})))
    assert generator.model == "small"
    assert {index: len(each) for index, each in answers.items()} == {0: 3, 1: 3}
    assert len({answer.text for each in answers.values() for answer in each}) > 3
    assert len(completions.requests) == requests
    path, body = completions.requests[-1]
    if form == "ids":
        assert body["prompt"] in [list(prompt.ids) for prompt in found.prompts]
        assert set(body["stop_token_ids"]) == draw_of(folder).end_ids
    assert path == ("/v1/chat/completions" if form == "chat" else "/v1/completions")


def test_servers_that_cannot_serve_are_told(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(server, "PAUSES_S", (0.0,))
    found, _ = prompts_of(folder, tmp_path, [{"prompt": "Why?"}], max_new_tokens=5)
    draw = draw_of(folder)

    class Other(Completions):
        def reply(self, path, body):
            if body is None:
                return 200 if path == "/v1/models" else 404, {"data": [{"id": "a"}, {"id": "b"}]}
            return 200, {"choices": [{"text": "yes<|im_end|>junk", "finish_reason": "length"}] * 3,
                         "usage": {"prompt_tokens": 3}}  # fmt: skip

    with serving(Other(folder)) as address:
        with pytest.raises(ServerError, match="lists the models a, b: name one with --server-model"):
            ServerGenerator(address, None, "ids", draw, 1, 5.0, None, "own")
        assert ServerGenerator(address + "/none", None, "ids", draw, 1, 5.0, None, "own").model == "own"
        generator = ServerGenerator(address, "a", "ids", draw, 1, 5.0, None, "own")
        [(_, answers)] = generator.answers(found.prompts, frozenset({0}))
    assert [(answer.text, answer.cut) for answer in answers] == [("yes", False)] * 3
    assert "counts 3 tokens in the prompt" in caplog.text
    with pytest.raises(ServerError, match=r"no reply: .*refused.*is the server running"):
        ServerGenerator(address, None, "ids", draw, 1, 5.0, None, "own")
    completions = Completions(folder)
    with serving(completions) as address:
        generator = ServerGenerator(address, "a", "ids", draw, 1, 5.0, None, "own")
        for faults, message in (([401], "HTTP 401.*OPENAI_API_KEY"), ([400, 400], "--server-prompt text"),
                                ([503, 503], "HTTP 503")):  # fmt: skip
            completions.faults = faults
            generator._plain = False
            with pytest.raises(ServerError, match=message):
                list(generator.answers(found.prompts, frozenset({0})))


def classifier_folder(folder, source, labels=1, template=True):
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = AutoConfig.from_pretrained(source, num_labels=labels)
    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def candidates(*texts, question="Why?"):
    prompt = Prompt((Message("user", question),))
    return Candidates(SamplingPrompt(0, "p.jsonl:1", prompt, "", [1], 5), texts)


def classifier(folder, flag="--reward-model", size=2):
    return Classifier(str(folder), flag, torch.device("cpu"), torch.float32, size)


def test_a_reward_model_scores_the_conversation(folder, tmp_path):
    path = classifier_folder(tmp_path / "reward", folder)
    texts = ["Yes.", "The tide comes in twice a day.", "No."]
    [scores] = RewardModel(classifier(path)).scores([candidates(*texts)])
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    for text, score in zip(texts, scores, strict=True):
        rendered = tokenizer.apply_chat_template([USER, {"role": "assistant", "content": text}], tokenize=False)
        expected = model(**tokenizer(rendered, return_tensors="pt")).logits.item()
        assert score == pytest.approx(expected, abs=1e-5)
    assert len(set(scores)) == 3
    bare = classifier_folder(tmp_path / "bare", folder, template=False)
    [[score]] = RewardModel(classifier(bare)).scores([candidates("Yes.")])
    assert score == pytest.approx(model(**tokenizer("Why?", "Yes.", return_tensors="pt")).logits.item(), abs=1e-5)
    [scores] = RewardModel(classifier(path)).scores([candidates("Yes.", "tide " * 5000)])
    assert scores[0] is not None
    assert scores[1] is None
    with pytest.raises(ModelError, match="Qwen2ForCausalLM is no model that scores"):
        classifier(folder)
    headless = classifier_folder(tmp_path / "headless", folder)
    tensors = load_file(headless / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for score\.weight"):
        classifier(headless)
    with pytest.raises(ModelError, match="2 outputs; expected a model with one"):
        classifier(classifier_folder(tmp_path / "two", folder, labels=2))
    with pytest.raises(ModelError, match="--ranker: nowhere: not a sequence classifier"):
        classifier("nowhere", "--ranker")


def test_a_ranker_is_the_mean_over_both_orders(folder, tmp_path):
    logits = {(0, 1): 2.0, (1, 0): -1.0, (0, 2): 0.5, (2, 0): 0.5, (1, 2): -3.0, (2, 1): None}
    p = {key: None if x is None else 1 / (1 + math.exp(-x)) for key, x in logits.items()}
    scores = mean_wins(logits, 3)
    assert scores[0] == pytest.approx((p[0, 1] + 1 - p[1, 0] + p[0, 2] + 1 - p[2, 0]) / 4)
    assert scores[1] is None
    path = classifier_folder(tmp_path / "ranker", folder)
    ranker = PairRanker(classifier(path, "--ranker"), "{prompt}|{first}|{second}")
    [scores] = ranker.scores([candidates("{second}", "Yes.", "No.")])
    assert sum(scores) == pytest.approx(1.5)  # each comparison is won by one of the two
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    wins = [
        torch.sigmoid(model(**tokenizer(f"Why?|{first}|{second}", return_tensors="pt")).logits).item()
        for first, second in (("Yes.", "{second}"), ("{second}", "Yes."), ("Yes.", "No."), ("No.", "Yes."))
    ]
    assert scores[1] == pytest.approx((wins[0] + 1 - wins[1] + wins[2] + 1 - wins[3]) / 4, abs=1e-5)


LENGTHS = """import sys,json
for line in sys.stdin: print(json.dumps({'scores': [len(answer) for answer in json.loads(line)['answers']]}))"""
AT_THE_END = "import sys,json\nprint('\\n'.join(json.dumps({'scores': [1.5, None]}) for line in sys.stdin.readlines()))"


def program(code, timeout=20.0):
    return ScorerProgram(f'{sys.executable} -S -c "{code}"', timeout)


@pytest.mark.parametrize(("code", "expected"), [(LENGTHS, [1.0, 3.0]), (AT_THE_END, [1.5, None])])
def test_a_program_scores_line_by_line_or_at_the_end(code, expected):
    assert list(program(code).scores(candidates("a", "bcd") for _ in range(500))) == [expected] * 500


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('hello')", "line for p.jsonl:1: not JSON: 'hello"),
        ("print('[1, 2]')", "expected .*scores.*found a list of 2"),
        ("""print('{\\"scores\\": [1]}')""", "1 scores for 2 answers"),
        ("""print('{\\"scores\\": [1, NaN]}')""", "expected finite numbers or null"),
        ("""print('{\\"scores\\": [1, true]}')""", "expected finite numbers or null, found true"),
        ("raise SystemExit(3)", "exit code 3 before it scored p.jsonl:1"),
        ("import time; time.sleep(30)", "wrote nothing for 0.3 s"),
        ("""print('{\\"scores\\": [1, 2]}\\n' * 2)""", "wrote more lines than it was given"),
    ],
)
def test_a_program_that_fails_is_told(code, message):
    with pytest.raises(ScorerError, match=message):
        list(program(code, 0.3 if "sleep" in code else 20.0).scores([candidates("a", "b")]))
    for command in ("/no/such", "", "/no"):
        with pytest.raises(ScorerError, match=f"cannot start '{command}'"):
            ScorerProgram(command, 1.0)


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


def test_vllm_where_it_is_installed(folder, tmp_path, monkeypatch):
    """By a stand-in with the names of vLLM's documentation, which generates with the real model."""
    settings = settings_of(
        [{"prompt": "Why?"}, {"prompt": "How?"}],
        tmp_path,
        max_new_tokens=6,
        cut_answers="keep",
        scorer=f'{sys.executable} -S -c "{LENGTHS}"',
        vllm_options={"tensor_parallel_size": 2},
    )
    config = configured(folder, device="cpu")
    with pytest.raises(ConfigError, match="--vllm-options goes with vLLM"):
        sample(config, settings)
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        sample(config, settings.model_copy(update={"generator": "vllm"}))
    monkeypatch.syspath_prepend(FAKES / "engine")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    report = sample(config, settings)
    assert report["answers"] == 10
    assert report["pairs"] == 2
    assert sys.modules["vllm"].LLM.made == {"tensor_parallel_size": 2, "seed": 42, "max_model_len": 96}
    monkeypatch.delitem(sys.modules, "vllm")
