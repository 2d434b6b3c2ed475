"""The oracle against transformers' models in fp64, torch's optimizer and numbers worked out by hand."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import hf, oracle
from tests.oracle_objectives import Scores, score

SHAPES = [(family, {}) for family in hf.FAMILIES] + [
    ("qwen2", {"tied": True}),
    ("qwen3", {"head_dim": 32, "kv_heads": 1}),
    ("llama", {"rope_scaling": "llama3", "kv_heads": 4}),
    ("mistral", {"head_dim": 8, "layers": 1}),
]


@pytest.fixture
def in_fp64(monkeypatch):
    """Turn transformers' own fp32 islands (norms, rotary angles) into fp64: they ask for torch.float32 by name."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def load(folder):
        model = AutoModelForCausalLM.from_pretrained(folder).double()
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        return model

    return load


def _model_logprob(model, prompt, response):
    logprobs = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(response))


def _model_loss(model, pairs):
    margins = [
        _model_logprob(model, prompt, chosen) / len(chosen) - _model_logprob(model, prompt, rejected) / len(rejected)
        for prompt, chosen, rejected in pairs
    ]
    return -logsigmoid(2.5 * (torch.stack(margins) - 0.55)).mean()


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_logits_equal_transformers(tmp_path, in_fp64, family, shape):
    folder = hf.make_checkpoint(tmp_path, family, **shape)
    tokens = torch.randint(hf.TOKENIZER_SIZE, (90,))
    with torch.no_grad():
        expected = in_fp64(folder)(tokens[None]).logits[0]
        actual = oracle.logits(*oracle.load(folder), tokens)
    assert expected.dtype == torch.float64
    assert expected.std() > 0.3
    assert (actual - expected).abs().max() < 1e-9


@pytest.mark.parametrize("scaling", [None, "llama3"])
def test_both_layouts_of_the_rotary_options_are_read(tmp_path, scaling):
    folder = hf.make_checkpoint(tmp_path, "llama", rope_scaling=scaling)
    params, config = oracle.load(folder)
    rope = dict(config.pop("rope_parameters", None) or {"rope_theta": config["rope_theta"], "rope_type": "default"})
    rope |= config.pop("rope_scaling", None) or {}
    theta = rope.pop("rope_theta")
    flat = config | {"rope_theta": theta, "rope_scaling": rope if scaling else None}
    nested = config | {"rope_parameters": rope | {"rope_theta": theta}}
    changed = config | {"rope_theta": 10 * theta, "rope_scaling": rope if scaling else None}
    tokens = list(range(40))
    assert torch.equal(oracle.logits(params, flat, tokens), oracle.logits(params, nested, tokens))
    assert not torch.allclose(oracle.logits(params, flat, tokens), oracle.logits(params, changed, tokens))


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen3", False)])
def test_gradients_equal_autograd_through_transformers(tmp_path, in_fp64, family, tied):
    folder = hf.make_checkpoint(tmp_path, family, tied=tied)
    pairs = hf.make_token_pairs(4)
    model = in_fp64(folder)
    loss = _model_loss(model, pairs)
    loss.backward()
    expected = {name: param.grad for name, param in model.named_parameters()}
    actual = oracle.gradients(folder, pairs, oracle.Options())
    assert oracle.evaluate(folder, pairs, oracle.Options())["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        assert (grad - expected[name]).norm() < 1e-10 * grad.norm(), name
    norm = torch.nn.utils.get_total_norm(list(expected.values())).item()
    assert oracle.grad_norm(actual) == pytest.approx(norm, rel=1e-12)


def test_dpo_gradient_is_the_slope_of_the_loss(tmp_path):
    folder = hf.make_checkpoint(tmp_path / "model", "mistral", layers=1, seed=1)
    reference = hf.make_checkpoint(tmp_path / "reference", "mistral", layers=1, seed=2)
    options = oracle.Options(stage="dpo", dpo_beta=0.3, dpo_label_smoothing=0.1, pref_ftx=0.2)
    pairs = hf.make_token_pairs(3)
    gradient = oracle.gradients(folder, pairs, options, reference)
    weights = load_file(folder / "model.safetensors")
    direction = {name: torch.randn(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    slope, step, losses = sum((gradient[name] * direction[name]).sum() for name in weights).item(), 1e-6, []
    for sign in (1, -1):
        moved = {name: weight.double() + sign * step * direction[name] for name, weight in weights.items()}
        save_file(moved, folder / "model.safetensors")
        losses.append(oracle.evaluate(folder, pairs, options, reference)["loss"])
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_dpo_of_a_model_against_itself_is_log_2(tmp_path):
    folder = hf.make_checkpoint(tmp_path, "llama", layers=1)
    metrics = oracle.evaluate(folder, hf.make_token_pairs(3), oracle.Options(stage="dpo"))
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-14)
    assert metrics["rewards/chosen"] == metrics["rewards/margins"] == metrics["rewards/accuracies"] == 0


def test_metrics_of_a_uniform_model_are_those_of_the_formulas(tmp_path):
    folder = hf.make_checkpoint(tmp_path, "qwen2", layers=1)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    pairs = [([5, 6], [0], [1, 2, 3]), ([7], [511, 0], [8])]
    metrics = oracle.evaluate(folder, pairs, oracle.Options(pref_ftx=0.5))
    nats = math.log(512)
    assert metrics == pytest.approx(
        {
            # z = -0.55 for every pair
            "loss": math.log(1 + math.exp(2.5 * 0.55)) + 0.5 * nats,
            "rewards/chosen": -2.5 * nats,
            "rewards/rejected": -2.5 * nats,
            "rewards/accuracies": 0.0,
            "rewards/margins": 0.0,
            "logps/chosen": -nats,
            "logps/rejected": -nats,
            "sft_loss": nats,
            "response_tokens/chosen": 1.5,
            "response_tokens/rejected": 2.0,
        },
        abs=1e-12,
    )


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "expected"),
    # z = -1 - (-1.5) - 0.25 = 0.25, beta z = 0.5
    [
        ("sigmoid", 0.0, 0.4740769841801067),
        ("sigmoid", 0.2, 0.8 * 0.4740769841801067 + 0.2 * 0.9740769841801067),
        ("hinge", 0.0, 0.5),
        ("ipo", 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("pref_ftx", [0.0, 0.3])
def test_simpo_loss_by_hand(loss_type, smoothing, expected, pref_ftx):
    options = oracle.Options(
        simpo_beta=2.0,
        gamma_beta_ratio=0.25,
        simpo_loss_type=loss_type,
        simpo_label_smoothing=smoothing,
        pref_ftx=pref_ftx,
    )
    pair = Scores(sums(-4.0, -3.0), (4, 2))
    assert score(pair, options)[0].item() == pytest.approx(expected + pref_ftx * 1.0, abs=1e-14)


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "expected"),
    # h = 3 - (-2) = 5, beta h = 0.5
    [
        ("sigmoid", 0.0, 0.4740769841801067),
        ("sigmoid", 0.2, 0.8 * 0.4740769841801067 + 0.2 * 0.9740769841801067),
        ("hinge", 0.0, 0.5),
        ("ipo", 0.0, 0.0),
    ],
)
def test_dpo_loss_by_hand(loss_type, smoothing, expected):
    options = oracle.Options(
        stage="dpo", dpo_beta=0.1, dpo_loss_type=loss_type, dpo_label_smoothing=smoothing, pref_ftx=0.5
    )
    loss, _ = score(Scores(sums(-5.0, -3.0), (4, 2), (-8.0, -1.0)), options)
    assert loss.item() == pytest.approx(expected + 0.5 * 1.25, abs=1e-14)


def test_running_statistics_by_hand():
    running = oracle.Running()
    running.join([1.0, 3.0])
    assert running.value == pytest.approx((2.0, 2**0.5))
    running.join([7.0])
    assert running.value == pytest.approx((0.9 * 2 + 0.7, 0.9 * 2**0.5))


def sums(chosen, rejected):
    return torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_training_equals_torch_adamw_on_transformers(tmp_path, in_fp64, clip):
    folder = hf.make_checkpoint(tmp_path, "qwen2", layers=1, hidden=32)
    batches = [hf.make_token_pairs(2, seed=seed) for seed in range(3)]
    lrs = [1e-3, 3e-3, 2e-3]
    options = oracle.Options(weight_decay=0.1, clip_grad=clip, adam_beta2=0.98, adam_eps=1e-6)
    model = in_fp64(folder)
    params = dict(model.named_parameters())
    groups = [
        {"params": [param for param in params.values() if (param.dim() > 1) == decays], "weight_decay": decay}
        for decays, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer, expected = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6), []
    for pairs, lr in zip(batches, lrs, strict=True):
        optimizer.zero_grad()
        loss = _model_loss(model, pairs)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params.values(), clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        expected.append((loss.item(), norm.item()))
    history, final = oracle.train(folder, batches, lrs, options)
    assert [value for step in history for value in step] == pytest.approx(
        [v for step in expected for v in step], rel=1e-9
    )
    start = oracle.load(folder)[0]
    for name, param in params.items():
        moved = (param - start[name]).norm()
        assert moved > 0
        assert (final[name] - param).norm() < 1e-8 * moved, name


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_saved_tokenizers_render_and_encode_as_their_families_do(tmp_path, family):
    hf.make_checkpoint(tmp_path, family, layers=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == hf.TOKENIZER_SIZE
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "What boils at 一百度?"},
        {"role": "assistant", "content": "水 🌊"},
    ]
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(prompt)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == whole
    assert ids.count(tokenizer.eos_token_id) == {"qwen2": 3, "qwen3": 3, "llama": 3, "mistral": 1}[family]
    assert ids.count(tokenizer.bos_token_id) == (1 if family in ("llama", "mistral") else 0)
    assert len(tokenizer("水")["input_ids"]) - len(tokenizer("水", add_special_tokens=False)["input_ids"]) == (
        1 if family in ("llama", "mistral") else 0
    )


def test_pairs_files_hold_every_kind_and_repeat_under_a_seed(tmp_path):
    first, again, other = (
        hf.make_pairs(tmp_path / name, 16, seed) for name, seed in (("a.jsonl", 3), ("b.jsonl", 3), ("c.jsonl", 4))
    )
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    rows = [json.loads(line) for line in first.read_text(encoding="utf-8").splitlines()]
    lengths = [len(row["chosen"][0]["content"]) for row in rows]
    assert len(rows) == 16
    assert {len(row["prompt"]) for row in rows} == {1, 2, 3, 7}
    assert min(lengths) <= 3
    assert max(lengths) > 300
    assert all(row["chosen"] != row["rejected"] for row in rows)


def test_token_pairs_reach_every_shard_boundary():
    for vocab_size in (64, 100, 509):
        _, (_, chosen, rejected), (_, short, _), (_, _, single) = (None, *hf.make_token_pairs(5, vocab_size)[:3])
        labels = {*chosen, *rejected}
        assert {0, vocab_size - 1} | {k * vocab_size // 8 for k in range(1, 8)} <= labels
        assert short == [0]
        assert single == [0]
        assert max(labels) < vocab_size
