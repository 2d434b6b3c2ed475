#!/usr/bin/env bash
# SimPO of Qwen3-32B, all weights, sequences of 4096 tokens, with the engine.
# Two hosts of 8 NPUs of 64 GB: TP 8 x PP 2. On each host set NODE_RANK and MASTER_ADDR.
# Nobody has run this on an NPU yet: its flags are checked, its numbers on the CPU.
set -euo pipefail
NNODES=${NNODES:-2}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/env.sh
source "$here/env.sh"
# shellcheck source=scripts/ascend/launch.sh
source "$here/launch.sh"
enter_repository

torchrun "${DISTRIBUTED_ARGS[@]}" -m mindspeed_simpo train configs/qwen3_8b_simpo.yaml \
    --device npu \
    --model-name-or-path "$MODEL_PATH" \
    --data-path "$DATA_PATH" \
    --output-dir "$OUTPUT_DIR" \
    --seq-length 4096 \
    --tensor-model-parallel-size "${TP:-8}" \
    --pipeline-model-parallel-size "${PP:-2}" \
    --sequence-parallel \
    --use-distributed-optimizer \
    --micro-batch-size 1 \
    --global-batch-size 128 \
    --bf16 \
    --lr 6e-7 \
    --recompute-granularity full \
    --recompute-method uniform \
    --recompute-num-layers 1 \
    "$@"
