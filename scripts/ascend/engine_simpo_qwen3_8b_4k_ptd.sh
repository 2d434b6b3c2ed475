#!/usr/bin/env bash
# SimPO of Qwen3-8B, all weights, sequences of 4096 tokens, with the engine.
# One host of 8 NPUs of 64 GB: TP 4 x DP 2.
# Nobody has run this on an NPU yet: its flags are checked, its numbers on the CPU.
set -euo pipefail
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
    --tensor-model-parallel-size "${TP:-4}" \
    --pipeline-model-parallel-size "${PP:-1}" \
    --sequence-parallel \
    --use-distributed-optimizer \
    --micro-batch-size 1 \
    --global-batch-size 128 \
    --bf16 \
    "$@"
