#!/usr/bin/env bash
# SimPO of Qwen2.5-7B, all weights, sequences of 4096 tokens, in MindSpeed-LLM.
# One host of 8 NPUs of 64 GB: TP 4 x DP 2; chosen and rejected one after the other, for half the activations.
# Nobody has run this on an NPU yet: its own flags are checked, its numbers on the CPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/plugin.sh
source "$here/plugin.sh"

TP=${TP:-4}
PP=${PP:-1}
SEQ_LENGTH=${SEQ_LENGTH:-4096}

MODEL_ARGS=(
    --num-layers 28
    --hidden-size 3584
    --ffn-hidden-size 18944
    --num-attention-heads 28
    --num-query-groups 4
    --padded-vocab-size 152064
    --add-qkv-bias
    --rotary-base 1000000
    --norm-epsilon 1e-6
    --prompt-type qwen
)

RUN_ARGS=(
    --lr 1e-6
    --min-lr 1e-7
    --pair-schedule two_pass
    --overlap-grad-reduce
    --overlap-param-gather
)

train_in_mindspeed_llm "$@"
