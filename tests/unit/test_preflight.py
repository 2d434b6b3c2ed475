"""`check` on real tokenizers and files: what it prints, warns of and refuses."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from mindspeed_simpo.cli.check import check
from mindspeed_simpo.cli.check_warnings import run_length_warnings, setting_warnings
from mindspeed_simpo.config.config import Config

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"
PAIRS = [
    {"prompt": "Name the capital of Peru.", "chosen": "Happy to help! It is Lima.", "rejected": "No idea, sorry."},
    {"prompt": "What colour is coal?", "chosen": "Good question! Coal is black.", "rejected": "Not my job."},
]


def run(tmp_path: Path, rows=PAIRS, *, world_size: int = 1, **values) -> tuple[bool, str]:
    """Verdict and printed report."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "model_name_or_path": str(QUICKSTART),
        "init_from": "config",
        "data_path": str(path),
        "data_cache_dir": str(tmp_path / "cache"),
        "seq_length": 64,
        "global_batch_size": 2,
        "num_workers": 1,
        "device": "cpu",
    } | values
    output = io.StringIO()
    verdict = check(Config(**values), world_size, Console(file=output, width=160))
    return verdict, output.getvalue()


def test_a_good_run_is_ready(tmp_path):
    verdict, report = run(tmp_path, eval_data_path=str(QUICKSTART / "held_out.jsonl"))
    assert verdict
    assert "error" not in report
    assert "ready to train, 1 warnings" in report
    assert "│ rows                                         │ 2 " in report
    assert "│ 90 " in report
    assert "<|im_start|>user\nName the capital of Peru.<|im_end|>\n<|im_start|>assistant\nHappy to help!" in report
    assert "qwen3, 1,033,600 parameters; tensor 1 x pipeline 1 x context 1 x data 1; 2 pairs per step" in report
    assert (
        "bf16: false; batching: prefix_shared, up to 128 tokens; pair_schedule: concat; "
        "fused_logprob: chunks of 512 tokens; recompute: off" in report
    )
    assert "optimizer" in report


def test_packed_rows_and_pairs_above_their_budget(tmp_path):
    _, report = run(tmp_path, batching="prefix_shared")
    assert "batching: prefix_shared, up to 128 tokens" in report
    assert "max_tokens_per_micro_batch" not in report
    verdict, report = run(tmp_path, batching="packed", max_tokens_per_micro_batch=20)
    assert verdict
    assert "train: 2 of 2 pairs have more than max_tokens_per_micro_batch 20 tokens, up to" in report


def test_layout_of_several_ranks(tmp_path):
    _, report = run(tmp_path, world_size=8, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert "tensor 2 x pipeline 2 x context 1 x data 2" in report
    assert "pipeline rank 1" in report


def test_the_buffers_of_hccl_are_a_line_of_their_own_on_npus(tmp_path):
    assert "communication" not in run(tmp_path)[1]
    _, report = run(tmp_path, device="npu")
    assert "│ communication │ 1.56 " in report  # four communicators of 2 x 200 MiB


def test_rows_that_cannot_be_used_are_errors_with_statistics_of_the_rest(tmp_path):
    bad = [{"prompt": "A", "chosen": "same", "rejected": "same"}, {"prompt": "A", "chosen": "", "rejected": "x"}]
    verdict, report = run(tmp_path, [*PAIRS, *bad])
    assert not verdict
    assert "error: train: 2 of 4 rows cannot be used" in report
    assert "ready" not in report
    assert "pairs.jsonl:3" in report
    assert "pairs.jsonl:4" in report
    assert "│ identical                                    │ 1 " in report
    verdict, report = run(tmp_path, [*PAIRS, *bad], data_errors="drop")
    assert verdict


def test_too_long_pairs(tmp_path):
    long = {"prompt": "What comes next? " * 30, "chosen": "Good question!", "rejected": "No idea."}
    verdict, report = run(tmp_path, [*PAIRS, long])
    assert not verdict
    assert "are longer than seq_length 64" in report
    verdict, report = run(tmp_path, [*PAIRS, long], truncation="keep_end")
    assert verdict
    assert "│ prompts truncated                            │ 1 " in report


def test_a_cut_response_is_warned_of(tmp_path):
    long = {"prompt": "Tell me.", "chosen": "Good question! " * 40, "rejected": "No idea."}
    verdict, report = run(tmp_path, [*PAIRS, long], truncation="keep_end")
    assert verdict
    assert "warning: train: 1 of 3 inspected pairs lost the end-of-turn token of a response to truncation" in report


def test_held_out_prompts_that_training_shows(tmp_path):
    _, report = run(tmp_path, [*PAIRS, *PAIRS], split="50,50")
    assert "warning: eval: the prompts of 2 of 2 held-out pairs are training prompts too" in report


def model_folder(tmp_path: Path, **tokenizer_changes) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(QUICKSTART, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tokenizer_changes))
    return folder


def test_a_token_that_the_model_does_not_have(tmp_path):
    folder = model_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    size = config["vocab_size"]

    def shrink(vocab_size):
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": vocab_size}))

    tokens = AutoTokenizer.from_pretrained(folder)
    end = tokens.convert_tokens_to_ids("<|im_end|>")
    shrink(end)
    verdict, report = run(tmp_path, model_name_or_path=str(folder))
    assert not verdict
    assert f"the end of turn: token '<|im_end|>' has the id {end}, beyond the model's vocab_size {end}" in report
    assert "use the tokenizer of this model" in report
    assert tokens.add_tokens(["It is Lima"]) == 1
    tokens.save_pretrained(folder)
    shrink(size)
    verdict, _ = run(tmp_path, model_name_or_path=str(folder))
    assert verdict == (len(tokens) <= size)
    shrink(len(tokens) - 1)
    verdict, report = run(tmp_path, model_name_or_path=str(folder))
    assert not verdict
    assert "train: 1 of 2 rows cannot be used" in report
    assert "pairs.jsonl:1: malformed: token 'It is Lima' has the id" in report
    shrink(len(tokens))
    assert run(tmp_path, model_name_or_path=str(folder))[0]


def test_what_the_template_does_of_itself_is_noted(tmp_path):
    template = json.loads((QUICKSTART / "tokenizer_config.json").read_text())["chat_template"]
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%Y') }}{{ mood }}\n" + template)
    verdict, report = run(tmp_path, chat_template=str(tmp_path / "t.jinja"), chat_template_kwargs={"mood": "glad"})
    assert verdict
    assert "note: the chat template prints the date, which is always 2024-07-26" in report
    assert "note: the chat template is given mood = 'glad'" in report
    assert "2024glad" in report


def test_a_template_that_doubles_the_bos(tmp_path):
    template = json.loads((QUICKSTART / "tokenizer_config.json").read_text())["chat_template"]
    folder = model_folder(
        tmp_path, bos_token="<|endoftext|>", chat_template="{{ bos_token }}{{ bos_token }}" + template
    )
    verdict, report = run(tmp_path, model_name_or_path=str(folder))
    assert not verdict
    assert "<|endoftext|> twice" in report


def test_absent_weights_model_and_data(tmp_path):
    verdict, report = run(tmp_path, init_from="weights")
    assert not verdict
    assert "has no weights" in report
    assert "Name the capital of Peru." in report  # the data is looked at all the same
    verdict, report = run(tmp_path, model_name_or_path=str(tmp_path / "absent"))
    assert not verdict
    assert report.count("error:") == 2  # the model and its tokenizer
    verdict, report = run(tmp_path, data_path=str(tmp_path / "absent.jsonl"))
    assert not verdict
    assert "absent.jsonl" in report


def test_a_layout_that_the_model_cannot_have(tmp_path):
    verdict, report = run(tmp_path, world_size=3, tensor_model_parallel_size=3)
    assert not verdict
    assert "tensor_model_parallel_size 3 neither divides the model's num_key_value_heads 2" in report


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"simpo_beta": 0.1}, ["simpo_beta 0.1"]),
        ({"gamma_beta_ratio": 1.4}, ["gamma_beta_ratio 1.4"]),
        ({"lr": 2e-6}, ["lr 2e-06: published runs of SimPO use 3e-07 to 1e-06"]),
        ({"lr": 1e-5}, ["lr 1e-05: published runs of SimPO use 3e-07 to 1e-06; ten times as much is known to degrade"]),
        ({"simpo_length_norm": False, "simpo_beta": 2.0}, ["simpo_length_norm"]),
        ({"stage": "dpo", "dpo_beta": 2.5}, ["dpo_beta 2.5"]),
        ({"stage": "dpo", "dpo_beta": 0.1, "dpo_length_norm": True}, ["dpo_beta 0.1: published runs of LN-DPO"]),
        ({"stage": "dpo", "simpo_beta": 99}, ["simpo_beta: no effect, because the stage is dpo"]),
        ({"stage": "orpo", "lr": 8e-6}, []),
        ({"stage": "orpo", "lr": 5e-6, "orpo_lambda": 5}, ["orpo_lambda 5: published runs"]),
        ({"stage": "cpo", "cpo_beta": 2.5}, ["cpo_beta 2.5: its authors use 0.1"]),
        ({"stage": "cpo", "cpo_alpha": 0}, ["cpo_alpha 0: its authors use 1"]),
        ({"stage": "simper"}, []),
        ({"stage": "alphapo", "alphapo_alpha": -1}, ["alphapo_alpha -1: its authors"]),
        ({"stage": "alphapo", "alphapo_gamma_beta_ratio": 1.4}, ["alphapo_gamma_beta_ratio 1.4"]),
        ({"stage": "rainbowpo", "rainbowpo_reference_mix": 0}, ["set stage: simpo"]),
        ({"stage": "alphadpo", "alphadpo_alpha": 1}, ["alphadpo_alpha 1: its authors' runs use 0.05 to 0.2"]),
        ({"init_from": "config", "lr": 1e-3}, ["random weights"]),
    ],
)
def test_settings_outside_the_published_ranges(values, expected):
    warnings = "\n".join(setting_warnings(Config(model_name_or_path="m", data_path="d", **values)))
    assert all(text in warnings for text in expected)
    assert len(warnings.splitlines()) == min(1, len(expected))


@pytest.mark.parametrize(
    ("length", "pairs", "expected"),
    [
        ({}, 127, "do not fill one global batch"),
        ({}, 128, ""),
        ({"train_iters": 4}, 128, "train_iters 4 makes 4.0 passes"),
        ({"train_iters": 3}, 128, ""),
        ({"num_train_epochs": 4}, 500, "num_train_epochs 4 makes 4.0 passes"),
        ({"num_train_epochs": 3}, 500, ""),
    ],
)
def test_run_lengths(length, pairs, expected):
    config = Config(model_name_or_path="m", data_path="d", **length)
    warnings = "".join(run_length_warnings(config, pairs))
    assert expected in warnings
    assert bool(expected) == bool(warnings)
