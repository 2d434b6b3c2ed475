#!/usr/bin/env bash
# SimPO of Qwen3-30B-A3B, all weights, sequences of 16384 tokens, with the engine.
# Two hosts of 8 NPUs of 64 GB: TP 2 x PP 2 x DP 4, EP 8. On each host set NODE_RANK and MASTER_ADDR.
# Nobody has run this on an NPU yet: its flags are checked, its numbers on the CPU.
set -euo pipefail
NNODES=${NNODES:-2}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/engine.sh
source "$here/engine.sh"

TP=${TP:-2}
PP=${PP:-2}
RUN_ARGS=(
    --expert-model-parallel-size "${EP:-8}"
    --expert-tensor-parallel-size 1
    --seq-length 16384
    --lr 6e-7
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
)

train_with_engine configs/qwen3_8b_simpo.yaml "$@"
