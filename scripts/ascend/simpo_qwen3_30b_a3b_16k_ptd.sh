#!/usr/bin/env bash
# SimPO of Qwen3-30B-A3B, all weights, sequences of 16384 tokens, in MindSpeed-LLM.
# Two hosts of 8 NPUs of 64 GB: TP 2 x PP 2 x DP 4, EP 8. On each host set NODE_RANK and MASTER_ADDR.
# Nobody has run this on an NPU yet: its own flags are checked, its numbers on the CPU.
set -euo pipefail
NNODES=${NNODES:-2}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/plugin.sh
source "$here/plugin.sh"

TP=${TP:-2}
PP=${PP:-2}
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
    --expert-tensor-parallel-size 1
    --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall
    --lr 6e-7
    --min-lr 6e-8
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
)

train_in_mindspeed_llm "$@"
