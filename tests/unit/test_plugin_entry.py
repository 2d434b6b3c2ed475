"""The plug-in's entry point and its ``.pth`` line: what each refuses, and that each leaves other programs alone."""

import shutil
from pathlib import Path

from tests.unit.plugin_seams import SEAMS, SIMPO, entry, execute

PTH = Path(__file__).resolve().parents[2] / "mindspeed_simpo/integrations/mindspeed_llm/mindspeed_simpo.pth"
PTH_LINE = PTH.read_text()


def test_refusals_are_one_message_and_exit_code_2():
    layers = ("--mtp-num-layers", "1", "--num-experts", "8", "--transformer-impl", "transformer_engine")
    process = entry("--stage", "simpo", *layers)
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    assert [line for line in process.stderr.splitlines() if line.startswith("  - ")] == [
        "  - add --is-pairwise-dataset: the data must be chosen and rejected pairs",
        "  - --mtp-num-layers 1: multi-token prediction has no preference loss; remove it",
        "  - --transformer-impl transformer_engine: it hands the NPU's operator a mask of the wrong shape; add "
        "--use-flash-attn or --transformer-impl local",
        "  - --moe-token-dispatcher-type allgather: not in the parity matrix; use one of alltoall, alltoall_seq",
    ]


def test_a_missing_seam_is_named(tmp_path):
    shutil.copytree(SEAMS, tmp_path / "seams")
    launcher = tmp_path / "seams/mindspeed_llm/tasks/posttrain/launcher.py"
    launcher.write_text(launcher.read_text().replace("def get_trainer(stage)", "def make_trainer(stage)"))
    package = tmp_path / "seams/megatron/core/package_info.py"
    package.write_text(package.read_text().replace("12", "14"))
    features = tmp_path / "seams/mindspeed_llm/features_manager/__init__.py"
    features.write_text(features.read_text().replace("--pref-ftx", "--sft-weight"))
    process = entry(*SIMPO, seams=tmp_path / "seams")
    assert process.returncode == 2
    assert [line for line in process.stderr.splitlines() if line.startswith("  - ")] == [
        "  - mindspeed_llm's DPOFeature with a flag --pref-ftx",
        "  - mindspeed_llm.tasks.posttrain.launcher.get_trainer(stage)",
        "  - megatron.core 0.12 (found 0.14)",
    ]


def test_an_old_mindspeed_llm_is_refused(tmp_path):
    shutil.copytree(SEAMS, tmp_path / "seams")
    package = tmp_path / "seams/mindspeed_llm"
    shutil.rmtree(package / "features_manager")
    (package / "__init__.py").write_text("megatron_adaptor = None\n")
    (package / "tasks/posttrain/launcher.py").write_text("def get_trainer(stage): pass\n")
    process = entry(*SIMPO, seams=tmp_path / "seams")
    assert process.returncode == 2
    assert "2.1.0 or older" in process.stderr


def test_another_backend_is_refused():
    process = entry(*SIMPO, TRAINING_BACKEND="mindspeed_fsdp")
    assert process.returncode == 2
    assert "TRAINING_BACKEND=mindspeed_fsdp" in process.stderr


def test_without_mindspeed_llm_the_message_says_where_to_start(tmp_path):
    process = entry(*SIMPO, seams=tmp_path)
    assert process.returncode == 2
    assert "cannot import mindspeed_llm: start from MindSpeed-LLM's root folder" in process.stderr


def test_the_pth_line_is_inert_without_its_variable(tmp_path):
    shutil.copytree(SEAMS, tmp_path / "seams")
    program = PTH_LINE + "import sys; print([n for n in sys.modules if n.startswith('mindspeed_simpo')])"
    assert execute(["-c", program], MINDSPEED_SIMPO="0").stdout == "[]\n"
    loaded = execute(["-c", program], MINDSPEED_SIMPO="1").stdout
    assert "mindspeed_simpo.integrations.mindspeed_llm.hooks" in loaded
    assert "mindspeed_simpo.integrations.mindspeed_llm.trainer" not in loaded


def test_the_pth_line_serves_an_unmodified_script():
    script = PTH_LINE + (
        "import sys; sys.argv[1:] = ['--stage', 'simpo']\n"
        "from mindspeed_llm import megatron_adaptor\n"
        "from mindspeed_llm.tasks.posttrain.launcher import AutoTrainer\n"
        "AutoTrainer()\n"
    )
    process = execute(["-c", script], MINDSPEED_SIMPO="1")
    assert "ConfigError: --stage simpo cannot run like this" in process.stderr
    assert "invalid choice: 'simpo'" in execute(["-c", script]).stderr
