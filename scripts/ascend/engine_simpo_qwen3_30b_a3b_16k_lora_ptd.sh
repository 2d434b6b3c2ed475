#!/usr/bin/env bash
# SimPO of Qwen3-30B-A3B, LoRA of its attention, sequences of 16384 tokens, with the engine.
# One host of 8 NPUs of 64 GB: DP 8, EP 8.
# Nobody has run this on an NPU yet: its flags are checked, its numbers on the CPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/engine.sh
source "$here/engine.sh"

TP=${TP:-1}
PP=${PP:-1}
RUN_ARGS=(
    --expert-model-parallel-size "${EP:-8}"
    --seq-length 16384
    --lr 5e-6
    --lora-r 16
    --lora-alpha 32
    --lora-target-modules q_proj k_proj v_proj o_proj
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
)

train_with_engine configs/qwen3_8b_simpo.yaml "$@"
