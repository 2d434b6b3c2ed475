#!/usr/bin/env bash
# SimPO of Qwen2.5-7B, all weights, sequences of 4096 tokens, with the engine.
# One host of 8 NPUs of 64 GB: TP 4 x DP 2.
# Nobody has run this on an NPU yet: its flags are checked, its numbers on the CPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/engine.sh
source "$here/engine.sh"

TP=${TP:-4}
PP=${PP:-1}
RUN_ARGS=(--seq-length 4096)

train_with_engine configs/qwen3_8b_simpo.yaml "$@"
