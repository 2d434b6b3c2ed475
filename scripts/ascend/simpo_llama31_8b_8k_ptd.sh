#!/usr/bin/env bash
# SimPO of Llama-3.1-8B, all weights, sequences of 8192 tokens, in MindSpeed-LLM.
# One host of 8 NPUs of 64 GB: TP 2 x PP 4.
# Nobody has run this on an NPU yet: its own flags are checked, its numbers on the CPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/plugin.sh
source "$here/plugin.sh"

TP=${TP:-2}
PP=${PP:-4}
SEQ_LENGTH=${SEQ_LENGTH:-8192}

MODEL_ARGS=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --num-query-groups 8
    --padded-vocab-size 128256
    --rotary-base 500000
    --rope-scaling-type llama3
    --rope-scaling-factor 8.0
    --low-freq-factor 1.0
    --high-freq-factor 4.0
    --original-max-position-embeddings 8192
    --norm-epsilon 1e-5
    --prompt-type llama3
)

RUN_ARGS=(
    --lr 1e-6
    --min-lr 1e-7
)

train_in_mindspeed_llm "$@"
