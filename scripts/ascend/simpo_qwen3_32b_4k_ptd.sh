#!/usr/bin/env bash
# SimPO of Qwen3-32B, all weights, sequences of 4096 tokens, in MindSpeed-LLM.
# Two hosts of 8 NPUs of 64 GB: TP 8 x PP 2. On each host set NODE_RANK and MASTER_ADDR.
# Nobody has run this on an NPU yet: its own flags are checked, its numbers on the CPU.
set -euo pipefail
NNODES=${NNODES:-2}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/plugin.sh
source "$here/plugin.sh"

TP=${TP:-8}
PP=${PP:-2}
SEQ_LENGTH=${SEQ_LENGTH:-4096}

MODEL_ARGS=(
    --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec
    --kv-channels 128
    --qk-layernorm
    --num-layers 64
    --hidden-size 5120
    --ffn-hidden-size 25600
    --num-attention-heads 64
    --num-query-groups 8
    --padded-vocab-size 151936
    --rotary-base 1000000
    --norm-epsilon 1e-6
    --prompt-type qwen3
)

RUN_ARGS=(
    --lr 6e-7
    --min-lr 6e-8
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
)

train_in_mindspeed_llm "$@"
