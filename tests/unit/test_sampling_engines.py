"""What answers and what scores: servers, vLLM by a stand-in, reward models, rankers, programs."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from mindspeed_simpo.errors import ConfigError, DataError, ModelError
from mindspeed_simpo.studies.sampling.generators import server
from mindspeed_simpo.studies.sampling.generators.server import ServerError, ServerGenerator
from mindspeed_simpo.studies.sampling.run import sample
from mindspeed_simpo.studies.sampling.scorers.classifier import Classifier
from mindspeed_simpo.studies.sampling.scorers.program import ScorerError, ScorerProgram
from mindspeed_simpo.studies.sampling.scorers.ranker import PairRanker, mean_wins
from mindspeed_simpo.studies.sampling.scorers.reward import RewardModel
from tests.completions import Completions, serving
from tests.hf import make_checkpoint
from tests.unit.conftest import FAKES
from tests.unit.sampling_helpers import LENGTHS, USER, candidates, configured, draw_of, prompts_of, settings_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("sampling") / "qwen2", hidden=32, std=0.2)


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


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in for vLLM, installed."""
    monkeypatch.syspath_prepend(FAKES / "engine")
    yield
    sys.modules.pop("vllm")


def test_vllm_where_it_is_installed(folder, tmp_path, request):
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
    request.getfixturevalue("vllm")
    report = sample(config, settings)
    assert report["answers"] == 10
    assert report["pairs"] == 2
    assert sys.modules["vllm"].LLM.made == {"tensor_parallel_size": 2, "seed": 42, "max_model_len": 96}


@pytest.mark.usefixtures("vllm")
def test_pairs_are_chosen_again_from_what_is_recorded(folder, tmp_path):
    rows = [{"prompt": text} for text in ("Why?", "How?", "What is the capital of France?", "The tide", "Why?")]
    config = configured(folder, device="cpu")
    values = {"max_new_tokens": 12, "cut_answers": "keep", "scorer": f'{sys.executable} -S -c "{LENGTHS}"'}
    report = sample(config, settings_of(rows, tmp_path, **values))
    assert (report["rows"], report["duplicate_prompts"], report["answers"], report["pairs"]) == (5, 1, 20, 4)
    assert (tmp_path / "pairs.jsonl").read_text().count("\n") == 4
    fewer = sample(config, settings_of(rows, tmp_path, min_gap=report["mean_gap"], keep_answers=True, **values))
    assert fewer["below_gap"] == 4 - fewer["pairs"] > 0
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert all(len(row["all_answers"]) == 5 for row in pairs)
    assert all(row["score_chosen"] - row["score_rejected"] >= report["mean_gap"] for row in pairs)
    with pytest.raises(DataError, match=r"(?s)no pair is left.*gap too small.*--cut-answers keep"):
        sample(config, settings_of(rows, tmp_path, min_gap=1e9, **values))
    with pytest.raises(ConfigError, match=r"the scores were begun with other settings:\n  scorer: "):
        sample(config, settings_of(rows, tmp_path, **values | {"scorer": "true"}))
    (tmp_path / "pairs.jsonl.work" / "answers.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"  answers: .* now\nGive the same .* or remove scores\.jsonl"):
        sample(config, settings_of(rows, tmp_path, **values))
    with pytest.raises(ConfigError, match="init_from: config starts from random weights"):
        sample(configured(folder, init_from="config"), settings_of(rows, tmp_path, **values))
