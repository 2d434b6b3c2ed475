#!/usr/bin/env bash
# What is right, and how fast it is, on this host's NPU or GPU, in under 8 minutes and without a network: one JSON, one
# page. Exit code 0 where numerics held. Installs nothing: runs the `python` on PATH, or PYTHON, which has torch,
# megatron-core and this package's dependencies. See docs/device_report.md.
#
#   bash scripts/device_report.sh                               the first of npu, cuda and cpu that there is
#   bash scripts/device_report.sh --output FOLDER --minutes 4   default: outputs/device_report, 8 minutes
set -uo pipefail
here=$PWD # a relative --output is meant from where the user is
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-$(command -v python || command -v python3)}
if [ -z "$python" ]; then
    echo "error: found no python; name one with PYTHON=..." >&2
    exit 2
fi
# megatron-core and MindSpeed may lie on PYTHONPATH already
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$python" - <<'PYTHON' || exit 2
import importlib.util
import sys

names = {
    "torch": "torch",
    "megatron.core": "megatron-core",
    "transformers": "transformers",
    "pydantic": "pydantic",
    "jaxtyping": "jaxtyping",
    "safetensors": "safetensors",
    "peft": "peft",
    "datasets": "datasets",
}


def is_there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


absent = [package for name, package in names.items() if not is_there(name)]
if absent:
    sys.exit(
        f"error: {sys.executable} has no {', '.join(absent)}: run the script with the python of the environment that "
        "trains (PYTHON=/path/to/python), or install the packages; on Ascend see docs/ascend.md"
    )
PYTHON
exec "$python" -m scripts.device_report --relative-to "$here" "$@"
