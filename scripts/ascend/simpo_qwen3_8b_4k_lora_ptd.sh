#!/usr/bin/env bash
# SimPO of Qwen3-8B with LoRA, sequences of 4096 tokens, in MindSpeed-LLM.
# One host of 8 NPUs of 64 GB: TP 2 x DP 4; chosen and rejected one after the other, for half the activations.
# Nobody has run this on an NPU yet: its own flags are checked, its numbers on the CPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/plugin.sh
source "$here/plugin.sh"

TP=${TP:-2}
PP=${PP:-1}
SEQ_LENGTH=${SEQ_LENGTH:-4096}

MODEL_ARGS=(
    --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec
    --kv-channels 128
    --qk-layernorm
    --num-layers 36
    --hidden-size 4096
    --ffn-hidden-size 12288
    --num-attention-heads 32
    --num-query-groups 8
    --padded-vocab-size 151936
    --rotary-base 1000000
    --norm-epsilon 1e-6
    --prompt-type qwen3
)

RUN_ARGS=(
    --lr 5e-6
    --min-lr 5e-7
    --pair-schedule two_pass
    --lora-r 16
    --lora-alpha 32
    --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2
)

train_in_mindspeed_llm "$@"
