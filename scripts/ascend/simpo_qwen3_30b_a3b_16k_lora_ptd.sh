#!/usr/bin/env bash
# SimPO of Qwen3-30B-A3B with LoRA of its attention, sequences of 16384 tokens, in MindSpeed-LLM.
# One host of 8 NPUs of 64 GB: DP 8, EP 8; chosen and rejected one after the other, for half the activations.
# Nobody has run this on an NPU yet: its own flags are checked, its numbers on the CPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/plugin.sh
source "$here/plugin.sh"

TP=${TP:-1}
PP=${PP:-1}
SEQ_LENGTH=${SEQ_LENGTH:-16384}

MODEL_ARGS=(
    --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec
    --kv-channels 128
    --qk-layernorm
    --num-layers 48
    --hidden-size 2048
    --ffn-hidden-size 6144
    --num-attention-heads 32
    --num-query-groups 4
    --padded-vocab-size 151936
    --rotary-base 1000000
    --norm-epsilon 1e-6
    --prompt-type qwen3
    --num-experts 128
    --moe-router-topk 8
    --moe-intermediate-size 768
    --norm-topk-prob
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.0
)

RUN_ARGS=(
    --expert-model-parallel-size "${EP:-8}"
    --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall_seq
    --lr 5e-6
    --min-lr 5e-7
    --pair-schedule two_pass
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
    --lora-r 16
    --lora-alpha 32
    --lora-target-modules linear_qkv linear_proj
)

train_in_mindspeed_llm "$@"
