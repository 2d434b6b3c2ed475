"""The command line as a user types it: exit codes, one clear message, nothing heavy before the checks."""

import json
import os
import subprocess
import sys

import pytest

from mindspeed_simpo.cli import flags, launch
from mindspeed_simpo.cli import main as cli
from mindspeed_simpo.cli.command import without_nproc
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.options import takes_bool
from mindspeed_simpo.errors import PeerLostError

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
HEAVY = ("torch", "transformers", "datasets", "megatron", "numpy", "pyarrow", "optuna", "plotly")
CONFIG = "model_name_or_path: model\ndata_path: pairs.jsonl\nglobal_batch_size: 8\n"


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def clean_environment(**changes) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return kept | {"COLUMNS": "200"} | changes


def run(*words, env=None, timeout=60) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mindspeed_simpo", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env or clean_environment(),
        check=False,
    )


@pytest.fixture
def execute(monkeypatch, capsys):
    """Runs a command line in this process; returns exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)

    def run_here(*words):
        try:
            code = cli.execute(list(map(str, words)))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run_here


def run_in_process(*words) -> tuple[int, list[str]]:
    """Exit code of a fresh interpreter that runs one command line, and the heavy packages that it imported."""
    program = (
        "import json, sys\nfrom mindspeed_simpo.cli import main as cli\n"
        "try:\n    code = cli.execute(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
        f"print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(),
        check=True,
    )
    code, heavy = json.loads(done.stdout.splitlines()[-1])
    return code, heavy


@pytest.mark.parametrize("words", [[], ["train"], ["evaluate"], ["sweep"], ["sample"], ["export"]])
def test_help_is_light(words):
    assert run_in_process(*words, "--help") == (0, [])


def test_a_bad_configuration_is_told_before_anything_heavy(config_file):
    config_file.write_text(CONFIG + "simpo_bata: 3\n", encoding="utf-8")
    assert run_in_process("train", config_file) == (2, [])
    assert run_in_process("check", config_file) == (2, [])


def test_a_bad_layout_is_told_before_anything_heavy(config_file):
    assert run_in_process("train", config_file, "--nproc-per-node", 3) == (2, [])


def test_help_shows_groups_units_ranges_and_defaults():
    done = run("train", "--help", env=clean_environment(COLUMNS="100"))  # wider ones get two columns
    assert done.returncode == 0
    assert done.stderr == ""
    for group in ("Objective", "Model", "Data", "Training", "Parallelism", "Evaluation and output"):
        assert f"─ {group} options ─" in done.stdout
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "--simpo-beta FLOAT Reward scale of SimPO, per nat per token. (> 0; default: 2.5)" in text
    assert "(>= 0, < 0.5; default: 0.0)" in text
    assert "--simpo-loss-type {sigmoid,hinge,ipo}" in text
    assert "--bf16, --no-bf16" in text
    assert "(required, here or in CONFIG)" in text
    for name in Config.model_fields:
        assert f"--{name.replace('_', '-')} " in text.replace(",", " ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--simpo-bata", "3"], ["--simpo-bata", "--simpo-beta"]),
        (["--simpo-beta", "abc"], ["error: --simpo-beta: input should be a valid number", "'abc'"]),
        (["--simpo-beta", "-1"], ["error: --simpo-beta: input should be greater than 0"]),
        (["--simpo-beta"], ["--simpo-beta"]),
        (["--stage", "sft"], ["error: --stage: input should be 'simpo', ", "found 'sft'"]),
        (["--map-keys", "prompt=question"], ["error: --map-keys: input should be a valid dictionary"]),
        (["--micro-batch-size", "3"], ["global_batch_size (8) is not a multiple of micro_batch_size (3)"]),
        (["--tensor-model-parallel-size", "2"], ["1 ranks cannot hold tensor_model_parallel_size 2"]),
        (["--nproc-per-node", "0"], ["error: --nproc-per-node: expected a whole number from 1 to 1024, found '0'"]),
        (["--nproc-per-node", "-1"], ["error: --nproc-per-node: expected a whole number", "'-1'"]),
        (["--nproc-per-node", "abc"], ["error: --nproc-per-node: expected a whole number", "'abc'"]),
        (["--nproc-per-node", "1.5"], ["error: --nproc-per-node: expected a whole number", "'1.5'"]),
        (["--nproc-per-node", "99999"], ["error: --nproc-per-node: expected a whole number from 1 to 1024"]),
        (["--nproc-per-node", "3"], ["global_batch_size 8 is not a multiple of 3"]),
        (["more"], ["more"]),
    ],
)
def test_wrong_flags_exit_2_with_one_message(execute, config_file, words, expected):
    code, stdout, stderr = execute("train", config_file, *words)
    assert code == 2
    assert stdout == ""
    assert "Traceback" not in stderr
    for text in expected:
        assert text in stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "train"),
        (["trian"], "trian"),
        (["train"], "CONFIG"),
        (["train", "absent.yaml"], "error: absent.yaml: cannot read the configuration"),
        (["export", "--output", "x"], "--checkpoint"),
    ],
)
def test_incomplete_command_lines_exit_2(execute, words, expected):
    code, _, stderr = execute(*words)
    assert code == 2
    assert expected in stderr
    assert "Traceback" not in stderr


def test_a_wrong_flag_of_a_process_of_its_own(config_file):
    done = run("train", config_file, "--nproc-per-node", "0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("error: ") == 1


def test_a_reader_that_goes_away_is_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m mindspeed_simpo train --help | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(),
        check=False,
    )
    assert done.stdout.startswith("usage: mindspeed-simpo train")
    assert done.stderr == ""


def test_under_a_launcher_only_rank_0_speaks(config_file):
    config_file.write_text(CONFIG + "simpo_bata: 3\n", encoding="utf-8")
    ranks = [
        run("train", config_file, env=clean_environment(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)))
        for rank in (0, 1)
    ]
    assert [done.returncode for done in ranks] == [2, 2]
    assert "unknown key `simpo_bata`" in ranks[0].stderr
    assert ranks[1].stderr == ""


def test_nproc_per_node_under_a_launcher_is_refused(config_file):
    done = run("train", config_file, "--nproc-per-node", "2", env=clean_environment(RANK="0", WORLD_SIZE="2"))
    assert done.returncode == 2
    assert "leave the flag out" in done.stderr


def test_world_size_of_the_launcher_decides_the_layout(config_file):
    done = run("train", config_file, env=clean_environment(RANK="0", WORLD_SIZE="3"))
    assert done.returncode == 2
    assert "global_batch_size 8 is not a multiple of 3" in done.stderr


def given(*words) -> dict:
    """What the command line hands to the configuration."""
    return flags.given(cli.parse(["train", "run.yaml", *words]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--simpo-beta", "3"], {"simpo_beta": "3"}),
        (["--simpo_beta=3"], {"simpo_beta": "3"}),
        (["--bf16", "--no-export-hf"], {"bf16": True, "export_hf": False}),
        (["--data-path", "a"], {"data_path": "a"}),
        (["--data-path", "a", "b", "--seed", "4"], {"data_path": ["a", "b"], "seed": "4"}),
        (["--map-keys", '{"prompt": "question"}'], {"map_keys": {"prompt": "question"}}),
        (["--load", "None"], {"load": "None"}),
        (["--split", "95,5"], {"split": "95,5"}),
    ],
)
def test_flags_become_keys(words, expected):
    assert given(*words) == expected


def test_every_key_is_a_flag_that_its_default_passes():
    for name, field in Config.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        if takes_bool(field):
            assert given(flag) == {name: True}
        else:
            assert given(flag, "7") == {name: "7"}


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("train a.yaml --nproc-per-node 2 --seed 1", "train a.yaml --seed 1"),
        ("train --nproc_per_node=2 a.yaml", "train a.yaml"),
        ("train a.yaml --seed 1", "train a.yaml --seed 1"),
    ],
)
def test_ranks_get_the_command_line_without_nproc_per_node(words, kept):
    assert without_nproc(words.split()) == kept.split()


@pytest.mark.parametrize(
    ("exit_codes", "code", "said"),
    [
        ({0: PeerLostError.exit_code, 1: 1}, 1, ""),
        ({0: 1, 1: 2}, 1, ""),
        ({0: PeerLostError.exit_code, 3: -9}, 137, "error: rank 3 was killed by SIGKILL"),
        ({2: -11}, 139, "error: rank 2 was killed by SIGSEGV"),
        ({0: -9, 1: 1}, 1, ""),
        ({0: PeerLostError.timeout_exit_code}, 1, ""),
        ({0: PeerLostError.exit_code}, 1, ""),
    ],
)
def test_the_rank_that_failed_of_itself_gives_the_exit_code(exit_codes, code, said, capsys):
    assert launch._report(exit_codes) == code
    assert capsys.readouterr().err.startswith(said)
