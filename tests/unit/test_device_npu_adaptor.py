"""Versions of MindSpeed and megatron-core, the environment and the command line, where the engine opens an NPU."""

import json
import os
import subprocess
import sys

import pytest

from mindspeed_simpo.device import npu_environment
from tests.unit.test_ascend_scripts import REPOSITORY

FLAGS = ["train", "config.yaml", "--context-parallel-size", "2", "--context-parallel-algo", "gathered"]
PARSES = """
import argparse
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--context-parallel-algo", choices=["megatron_cp_algo", "ulysses_cp_algo"])
args, unknown = parser.parse_known_args()
if unknown:
    raise TypeError(unknown)
"""
OPENS = """
import json, os, sys
from mindspeed_simpo.device import npu_adaptor, npu_environment
from mindspeed_simpo.errors import ConfigError
npu_environment.set_defaults(timeout_minutes=10.0)
try:
    npu_adaptor.install_adaptor()
except ConfigError as error:
    sys.exit(str(error))
assert "mindspeed.megatron_adaptor" in sys.modules
print(json.dumps([sys.argv[1:], dict(os.environ)]))
"""


@pytest.fixture
def opened(tmp_path):
    """Open an NPU in a process whose packages are these; returns (code, stdout, stderr)."""

    def call(adaptor=PARSES, core="0.12.1", mindspeed="0.12.1", **environment):
        files = {"torch_npu/__init__.py": "", "mindspeed/__init__.py": "", "mindspeed/megatron_adaptor.py": adaptor}
        if core is not None:
            files |= {"megatron/core/__init__.py": "", "megatron/core/package_info.py": f"__version__ = '{core}'"}
        if mindspeed is not None:
            files["setup.py"] = f"import sys\n__version__ = '{mindspeed}'\n"
        for name, text in files.items():
            path = tmp_path / "packages" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if core is None:
            # hides the megatron-core that is installed here
            (tmp_path / "packages/megatron").mkdir()
            (tmp_path / "packages/megatron/__init__.py").write_text("")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HCCL", "PYTHONWARNINGS"))}
        process = subprocess.run(
            [sys.executable, "-c", OPENS, *FLAGS],
            env=kept | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "packages"), str(REPOSITORY)])} | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return process.returncode, process.stdout, process.stderr

    return call


def test_the_adaptor_does_not_see_the_engines_command_line(opened):
    code, out, err = opened()
    assert code == 0, err
    assert json.loads(out)[0] == FLAGS


def test_the_environment_has_its_defaults_and_the_users_values(opened):
    code, out, err = opened(STREAMS_PER_DEVICE="8", DETERMINISTIC="1")
    assert code == 0, err
    found = json.loads(out)[1]
    wanted = npu_environment.defaults("ascend") | npu_environment.defaults("ascend_deterministic")
    wanted |= {"STREAMS_PER_DEVICE": "8", "HCCL_EXEC_TIMEOUT": "540"}
    assert wanted == {name: found.get(name) for name in wanted}
    assert json.loads(opened(HCCL_EXEC_TIMEOUT="100")[1])[1]["HCCL_EXEC_TIMEOUT"] == "100"


@pytest.mark.parametrize(
    ("core", "mindspeed"),
    [("0.16.1", "0.12.1"), ("0.12.1", "0.16.0"), ("0.14.0", "0.14.1"), ("0.15.3", None)],
)
def test_versions_that_do_not_belong_together(core, mindspeed, opened):
    code, _, err = opened(core=core, mindspeed=mindspeed)
    written_for = f"written for megatron-core {mindspeed}" if mindspeed else "of an unknown version"
    assert code == 1
    assert f"found megatron-core {core} and a MindSpeed {written_for}: these two do not belong together" in err
    assert "core_r0.12.1 with megatron-core 0.12.1" in err
    assert "core_r0.16.0 with megatron-core 0.16.1" in err


@pytest.mark.parametrize(
    ("adaptor", "message"),
    [
        ("from megatron.core import absent", "fails with ImportError: cannot import name 'absent'"),
        ("import os; os.absent", "fails with AttributeError"),
        ("import megatron.core.absent", "fails with No module named 'megatron.core.absent'"),
        ("import megatron.training", "put a checkout of Megatron-LM, tag core_v0.12.1, on PYTHONPATH"),
        ("import absent_package", "needs the Python package absent_package"),
        ("import mindspeed.absent", "needs MindSpeed, which cannot be imported (No module named 'mindspeed.absent')"),
    ],
)
def test_an_adaptor_that_fails(adaptor, message, opened):
    code, _, err = opened(adaptor=adaptor, mindspeed=None)
    assert code == 1
    assert message in err
    assert "Traceback" not in err


def test_no_megatron_core(opened):
    code, _, err = opened(core=None)
    assert code == 1
    assert "needs megatron-core, which is not installed" in err


AUTOLOADED = """
import os
from mindspeed_simpo.cli import launch
launch.prepare_process()
import sys
import torch
early = "torch_npu" in sys.modules
from mindspeed_simpo.device import find_device
assert find_device() == "cpu"
print(early, sys.modules["torch_npu"].SEEN.get("TASK_QUEUE_ENABLE"))
"""


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "False 2"), ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}, "True None")]
)
def test_torch_does_not_import_torch_npu_before_the_environment_is_set(given, expected, tmp_path):
    package = "import os, types, torch\nSEEN = dict(os.environ)\ntorch.npu = types.SimpleNamespace(is_available=bool)\n"
    files = {
        "torch_npu/__init__.py": package + "def _autoload():\n    pass\n",
        "torch_npu-2.7.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.7.1\n",
        "torch_npu-2.7.1.dist-info/entry_points.txt": "[torch.backends]\ntorch_npu = torch_npu:_autoload\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    unset = ("TASK_QUEUE_ENABLE", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    environment = kept | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])} | given
    process = subprocess.run(
        [sys.executable, "-c", AUTOLOADED], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert process.stdout.strip() == expected, process.stderr


def test_the_environment_of_cuda(monkeypatch):
    import torch

    from mindspeed_simpo.device import cuda_environment

    names = (*cuda_environment._ALLOCATOR, "CUDA_DEVICE_MAX_CONNECTIONS")
    for name in names:  # set first, so that what is deleted now is deleted after the test, too
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def found():
        return {name: os.environ[name] for name in names if name in os.environ}

    cuda_environment.set_defaults(one_queue=True)
    assert found() == {}, "this torch has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    cuda_environment.set_defaults(one_queue=False)
    expected = {
        "PYTORCH_ALLOC_CONF" if torch.__version__ >= (2, 9) else "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"
    }
    assert found() == expected
    cuda_environment.set_defaults(one_queue=True)
    assert found() == expected | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    given = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    cuda_environment.set_defaults(one_queue=True)
    assert found() == given
