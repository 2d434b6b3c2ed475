"""The card of an exported model: what it tells of a run, and what no configuration can make it say."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from mindspeed_simpo.config.file import validate
from mindspeed_simpo.data.mixture import Mixture
from mindspeed_simpo.training.model_card import Trained, Weights, held_out_lines, model_card
from mindspeed_simpo.training.run_facts import data_names, facts_of, model_name

HUB = {"model_name_or_path": "org/base", "data_path": ["org/pairs:train_prefs", "org/pairs:more", "org/others"]}
MODEL = Weights(adapters=False, images=False)


class Pairs(SimpleNamespace):
    """What the card reads of a data set."""

    def __len__(self):
        return sum(self.mixture.found)


def trained_with(facts=True, eval_pairs=None, mixture=None, **values):
    config = validate(HUB | values, where="test")
    train_data = Pairs(mixture=mixture or Mixture.of_all(60_000), sources=("helpful", "harm`less"))
    eval_data = None if eval_pairs is None else Pairs(mixture=Mixture.of_all(eval_pairs))
    found = facts_of(config, device="npu", ranks=8, train_data=train_data, eval_data=eval_data) if facts else None
    return Trained(config, found, step=3, consumed_pairs=384, data_fingerprint="abc: 45 of 30, 15 of 30")


def card_of(evaluations=(), weights=MODEL, **values):
    return ModelCard(model_card(trained_with(**values), evaluations, weights))


def line_of(step, **metrics):
    return {"step": step, "split": "eval", "consumed_pairs": 128 * step, "step_seconds": 1.0, **metrics}


def test_names_of_the_hub_are_metadata():
    card = card_of(
        eval_data_path="org/pairs:test", eval_pairs=5, evaluations=[line_of(0, **{"rewards/accuracies": 0.5})]
    )
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "finetune")
    assert card.data.datasets == ["org/pairs", "org/others"]
    assert card.data.eval_results[0].dataset_type == "org/pairs"
    assert "[`org/pairs:test`](https://huggingface.co/datasets/org/pairs) | 5 |" in card.text
    assert "(https://huggingface.co/org/base)" in card.text
    assert "[arXiv:2405.14734](https://arxiv.org/abs/2405.14734)" in card.text


def test_a_mixture_has_its_counts():
    card = card_of(mixture=Mixture((30, 30), (45, 15)), eval_pairs=4)
    assert "| `helpful` | 30 | 45 |\n| `harm'less` | 30 | 15 |" in card.text
    assert "| held out | a part of the same data sets that is not trained on | 4 |" in card.text
    assert "`abc`" in card.text
    assert "pairs of an epoch" not in card_of().text


def test_adapters_and_images():
    card = card_of(weights=Weights(adapters=True, images=True), lora_r=4, backend="fsdp")
    assert (card.data.library_name, card.data.base_model_relation) == ("peft", "adapter")
    assert (card.data.pipeline_tag, card.data.tags[-1]) == ("image-text-to-text", "lora")
    assert "AutoModelForImageTextToText" in card.text
    assert "PeftModel.from_pretrained(base, name)" in card.text


def test_settings_are_those_of_the_objective_and_those_that_were_set():
    card = card_of(stage="dpo", dpo_beta=0.01, simpo_beta=9.0, chat_template_kwargs={"enable_thinking": False}, lr=3e-7)
    for row in (
        "| `stage` | `dpo` |",
        "| `dpo_beta` | `0.01` |",
        "| `lr` | `3e-07` |",
        "| `global_batch_size` | `128` |",
    ):
        assert row in card.text
    assert "| `chat_template_kwargs` | `enable_thinking: false` |" in card.text
    assert "simpo_beta" not in card.text
    assert "lora_r" not in card.text
    assert "map_keys" not in card.text


def test_no_local_path_and_no_text_of_a_user_gets_out_of_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret"
    names = "ba`se\n---\nlicense: mit", "pa|irs.jsonl"
    for name in ("models", "data"):
        (secret / name).mkdir(parents=True)
    (secret / "models" / names[0]).mkdir()
    (secret / "data" / names[1]).write_text("")
    card = card_of(
        model_name_or_path=str(secret / "models" / names[0]),
        data_path=str(secret / "data" / names[1]),
        chat_template=str(secret / "own.jinja"),
        split="90,10",
        eval_pairs=4,
        evaluations=[line_of(1, **{"rewards/accuracies": 1.0, "source/a|b`c/loss": 0.5})],
    )
    assert "secret" not in card.content
    assert (card.data.base_model, card.data.datasets, card.data.license) == (None, None, None)
    assert "# `ba'se --- license: mit` with SimPO" in card.text
    assert "| training | `pa\\|irs.jsonl` | 60000 |" in card.text
    assert "| held out | the second part of split `90,10` | 4 |" in card.text
    assert "| `source/a\\|b'c/loss` | 0.5 |" in card.text
    assert "| `chat_template` | `own.jinja` |" in card.text


@pytest.mark.parametrize(
    ("path", "name", "on_hub"),
    [
        ("org/name", "org/name", True),
        ("/a/.cache/huggingface/hub/models--org--name/snapshots/0a1b", "org/name", True),
        (".", "here", False),
    ],
)
def test_names_of_models(tmp_path, monkeypatch, path, name, on_hub):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert model_name(path).model_dump() == {"name": name, "on_hub": on_hub}


def test_entries_of_data_may_be_records():
    entries = ["org/pairs", SimpleNamespace(path="/data/pairs.jsonl", weight=2.0), SimpleNamespace(path="org/pairs")]
    assert [named.name for named in data_names(entries)] == ["org/pairs", "pairs.jsonl"]
    assert data_names(None) == []


def test_names_of_data_that_is_gone_are_not_taken_for_ids():
    assert [named.on_hub for named in data_names(["/gone/pairs", "gone/pairs.jsonl", "org/pairs:train"])] == [
        False,
        False,
        True,
    ]


def test_a_checkpoint_of_an_earlier_version_has_a_card_too():
    card = card_of(facts=False, data_path="/data/pairs.jsonl")
    assert "| training | `pairs.jsonl` | not recorded |" in card.text
    assert "version of the export" in card.text
    assert "No evaluation of held-out pairs is recorded." in card.text


def test_evaluations_up_to_the_step_of_the_weights(tmp_path):
    assert held_out_lines(tmp_path, 2) == []
    lines = [line_of(0, loss=1.0), {"step": 1, "split": "train"}, line_of(1, loss=0.5), line_of(2, loss=0.25)]
    lines += [{"step": 1, "split": "alarm", "alarm": "nan"}, line_of(3, loss=0.1)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "spl'
    (tmp_path / "metrics.jsonl").write_text(text)
    found = held_out_lines(tmp_path, 2)
    assert [line["step"] for line in found] == [0, 1, 2]
    assert "| `loss` | 1 | 0.25 |" in card_of(evaluations=found).text
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe")
    assert held_out_lines(tmp_path, 2) == []
