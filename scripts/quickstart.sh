#!/usr/bin/env bash
# From a clean checkout to a trained model on a CPU: sets up .venv, trains configs/quickstart.yaml on two ranks and
# shows what changed. Flags go to `mindspeed-simpo train`: `bash scripts/quickstart.sh --tensor-model-parallel-size 2`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup_env.sh
setup_env requirements.txt

rm -rf outputs/quickstart
mindspeed-simpo train configs/quickstart.yaml --nproc-per-node 2 "$@"
# the same model before its first step, to compare with
mindspeed-simpo train configs/quickstart.yaml --train-iters 0 --eval-iters 0 --output-dir outputs/quickstart/start
python scripts/before_after.py outputs/quickstart outputs/quickstart/start/hf configs/quickstart/held_out.jsonl
