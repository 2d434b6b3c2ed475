"""Every class of bad configuration is one clear message; every shipped configuration is valid."""

from pathlib import Path

import pytest
import yaml

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import load_config, require_training_data
from mindspeed_simpo.config.options import OPTION_GROUPS
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.errors import ConfigError

REPO = Path(__file__).parents[2]
REQUIRED = {"model_name_or_path": "model", "data_path": "pairs.jsonl"}


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message(folder: Path, text: str, overrides: dict | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return str(caught.value)


def with_required(**values) -> str:
    return yaml.safe_dump(REQUIRED | values)


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path):
    config = load_config(path)
    assert config.model_fields_set >= {"model_name_or_path", "data_path", "output_dir"}


def test_defaults_are_the_papers():
    config = Config(**REQUIRED)
    assert (config.stage, config.simpo_beta, config.gamma_beta_ratio, config.pref_ftx) == ("simpo", 2.5, 0.55, 0.0)
    assert config.global_batch_size == 128
    assert config.prompt_limit == 1024


def test_every_key_is_in_one_group():
    grouped = [name for group in OPTION_GROUPS for name in group.model_fields]
    assert sorted(grouped) == sorted(Config.model_fields)
    assert all(Config.model_fields[name].description.endswith(".") for name in grouped)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("simpo_bta", "simpo_beta"),
        ("beta", "simpo_beta"),
        ("gamma_beta", "gamma_beta_ratio"),
        ("learning_rate", "lr"),
        ("simpo_gamma", "gamma_beta_ratio"),
        ("tensor_parallel_size", "tensor_model_parallel_size"),
        ("micro_batchsize", "micro_batch_size"),
        ("colour", None),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path, key, nearest):
    text = message(tmp_path, with_required(**{key: 1}))
    assert f"unknown key `{key}`" in text
    assert "run.yaml" in text
    if nearest is not None:
        assert f"did you mean `{nearest}`?" in text
    else:
        assert "--help` lists all keys" in text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"simpo_beta": 0}, "`simpo_beta`: input should be greater than 0, found 0"),
        ({"simpo_beta": "large"}, "`simpo_beta`: input should be a valid number"),
        ({"simpo_beta": [1]}, "`simpo_beta`: input should be a valid number"),
        ({"simpo_beta": float("nan")}, "`simpo_beta`: input should be a finite number"),
        ({"lr": float("inf")}, "`lr`: input should be a finite number"),
        ({"lr": True}, "`lr`: expected a value, not true or false"),
        ({"gamma_beta_ratio": -0.1}, "`gamma_beta_ratio`: input should be greater than or equal to 0"),
        ({"simpo_label_smoothing": 0.5}, "`simpo_label_smoothing`: input should be less than 0.5"),
        ({"stage": "sft"}, "found 'sft'"),
        ({"orpo_lambda": -0.1}, "`orpo_lambda`: input should be greater than or equal to 0, found -0.1"),
        ({"cpo_beta": 0}, "`cpo_beta`: input should be greater than 0, found 0"),
        ({"cpo_alpha": -1}, "`cpo_alpha`: input should be greater than or equal to 0, found -1"),
        ({"alphapo_alpha": 11}, "`alphapo_alpha`: input should be less than or equal to 10, found 11"),
        ({"rainbowpo_reference_mix": 1.1}, "`rainbowpo_reference_mix`: input should be less than or equal to 1"),
        ({"alphadpo_alpha": -0.1}, "`alphadpo_alpha`: input should be greater than or equal to 0, found -0.1"),
        ({"alphadpo_alpha": float("nan")}, "`alphadpo_alpha`: input should be a finite number"),
        ({"micro_batch_size": 1.5}, "`micro_batch_size`: input should be a valid integer"),
        ({"seed": 0}, "`seed`: input should be greater than or equal to 1"),
        ({"bf16": 3}, "`bf16`: input should be a valid boolean"),
        ({"data_path": []}, "`data_path`: expected a path"),
        ({"data_path": ""}, "`data_path`: expected a path"),
        ({"split": "a,b"}, "`split`: expected two or three comma-separated weights"),
        ({"split": "0,100"}, "`split`: expected two or three weights"),
        ({"split": "90,-5"}, "`split`: expected two or three weights"),
        ({"max_prompt_length": 64, "seq_length": 64}, "max_prompt_length (64) must be below seq_length (64)"),
        ({"lr": 1e-6, "min_lr": 1e-5}, "min_lr (1e-05) is above lr (1e-06)"),
        (
            {"micro_batch_size": 3, "global_batch_size": 8},
            "global_batch_size (8) is not a multiple of micro_batch_size",
        ),
        ({"ref_model": "other"}, "ref_model: SimPO has no reference model: remove ref_model, or set stage to one of"),
        ({"stage": "orpo", "ref_model": "other"}, "ref_model: ORPO has no reference model"),
        ({"simpo_loss_type": "hinge", "simpo_label_smoothing": 0.1}, "simpo_label_smoothing needs"),
        ({"dpo_loss_type": "ipo", "dpo_label_smoothing": 0.1}, "dpo_label_smoothing needs"),
        ({"recompute_granularity": "full"}, "recompute_granularity: full goes with recompute_method"),
        ({"recompute_method": "uniform"}, "recompute_granularity: full goes with recompute_method"),
    ],
)
def test_bad_values_say_key_value_and_expectation(tmp_path, values, expected):
    text = message(tmp_path, with_required(**values))
    assert expected in text
    assert text.startswith(str(tmp_path / "run.yaml"))


def test_all_bad_keys_are_reported_at_once(tmp_path):
    lines = message(tmp_path, "simpo_beta: -1\nlr: 0\ncolour: red\n").splitlines()
    assert len(lines) == 5
    assert sum("is required" in line for line in lines) == 2


def test_flags_override_and_are_blamed_by_their_own_name(tmp_path):
    path = write(tmp_path, with_required(simpo_beta=2.0))
    assert load_config(path, {"simpo_beta": "10"}).simpo_beta == 10.0
    assert message(tmp_path, with_required(), {"simpo_beta": "x"}).startswith("--simpo-beta: input should be")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1e-6\nseed: 3\nlr: 2e-6\n", "run.yaml:3: not valid YAML: the key `lr` appears twice"),
        ("map_keys: {prompt: a, prompt: b}\n", "run.yaml:1: not valid YAML: the key `prompt` appears twice"),
        ("lr: [1\n", "run.yaml:2: not valid YAML"),
        ("\tlr: 1\n", "run.yaml:1: not valid YAML"),
        ("- lr\n", "expected `key: value` lines, found list"),
        ("just text\n", "expected `key: value` lines, found str"),
        ("1: 2\n", "expected `key: value` lines"),
        ("lr: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, expected):
    assert expected in message(tmp_path, text)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(tmp_path / "binary.yaml")


def test_exponents_that_yaml_reads_as_text_are_numbers(tmp_path):
    assert load_config(write(tmp_path, with_required() + "lr: 1e-6\n")).lr == 1e-6


@pytest.mark.parametrize(
    ("values", "world_size", "degrees"),
    [
        ({}, 1, (1, 1, 1)),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 8, (2, 2, 2)),
        ({"micro_batch_size": 4}, 4, (1, 1, 4)),
    ],
)
def test_layout_fills_the_ranks(values, world_size, degrees):
    layout = make_layout(Config(**REQUIRED, **values), world_size)
    assert (layout.tensor, layout.pipeline, layout.data) == degrees


@pytest.mark.parametrize(
    ("values", "world_size", "expected"),
    [
        ({"tensor_model_parallel_size": 4}, 6, "6 ranks cannot hold tensor_model_parallel_size 4"),
        ({"global_batch_size": 8}, 3, "global_batch_size 8 is not a multiple of 3"),
    ],
)
def test_layout_that_does_not_fit(values, world_size, expected):
    with pytest.raises(ConfigError) as caught:
        make_layout(Config(**REQUIRED, **values), world_size)
    assert expected in str(caught.value)


def test_steps_or_epochs(tmp_path):
    assert load_config(write(tmp_path, with_required(num_train_epochs=3))).num_train_epochs == 3
    both = message(tmp_path, with_required(num_train_epochs=2, train_iters=5))
    assert "train_iters (5) and num_train_epochs (2) both say how long to train: remove one of them" in both


@pytest.mark.parametrize("split", ["nan,1", "1e309,1", "1,inf", "0,1", "1,-1", "1,2,3,4", "a"])
def test_a_split_that_divides_nothing_is_refused(tmp_path, split):
    text = message(tmp_path, with_required(split=split))
    assert "`split`: expected two or three" in text
    assert "such as 95,5" in text


def test_a_global_batch_has_a_limit(tmp_path):
    assert "less than or equal to 1000000" in message(tmp_path, with_required(global_batch_size=10**21))


def test_evaluation_data_may_stand_alone(tmp_path):
    config = load_config(write(tmp_path, "model_name_or_path: m\neval_data_path: held_out.jsonl\n"))
    assert config.data_path is None
    with pytest.raises(ConfigError, match=r"run.yaml: `data_path` is required: Training pairs"):
        require_training_data(config, "run.yaml")
    assert "`data_path` is required" in message(tmp_path, "model_name_or_path: m\n")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"chat_template_date": "26 Jul 2024"}, "`chat_template_date`: expected a day as YYYY-MM-DD, found"),
        ({"chat_template_date": "2024-02-30"}, "expected a day as YYYY-MM-DD; day"),
        ({"chat_template_kwargs": {"a": float("nan")}}, "expected values that JSON has"),
        ({"chat_template_kwargs": "x"}, "`chat_template_kwargs`: input should be a valid dictionary"),
    ],
)
def test_template_options(tmp_path, values, words):
    assert words in message(tmp_path, with_required(**values))
