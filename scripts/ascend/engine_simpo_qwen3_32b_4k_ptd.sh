#!/usr/bin/env bash
# SimPO of Qwen3-32B, all weights, sequences of 4096 tokens, with the engine.
# Two hosts of 8 NPUs of 64 GB: TP 8 x PP 2. On each host set NODE_RANK and MASTER_ADDR.
# Nobody has run this on an NPU yet: its flags are checked, its numbers on the CPU.
set -euo pipefail
NNODES=${NNODES:-2}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/engine.sh
source "$here/engine.sh"

TP=${TP:-8}
PP=${PP:-2}
RUN_ARGS=(
    --seq-length 4096
    --lr 6e-7
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
)

train_with_engine configs/qwen3_8b_simpo.yaml "$@"
