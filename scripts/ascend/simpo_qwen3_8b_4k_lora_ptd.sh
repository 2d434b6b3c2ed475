#!/usr/bin/env bash
# SimPO of Qwen3-8B with LoRA, sequences of 4096 tokens, in MindSpeed-LLM.
# One host of 8 NPUs of 64 GB: TP 2 x DP 4; chosen and rejected one after the other, for half the activations.
# Nobody has run this on an NPU yet: its own flags are checked, its numbers on the CPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/env.sh
source "$here/env.sh"
# shellcheck source=scripts/ascend/launch.sh
source "$here/launch.sh"
enter_mindspeed_llm

TP=${TP:-2}
PP=${PP:-1}
SEQ_LENGTH=${SEQ_LENGTH:-4096}
TRAIN_ITERS=${TRAIN_ITERS:-500}

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --sequence-parallel
)

GPT_ARGS=(
    --use-mcore-models
    --transformer-impl local
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
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
    --make-vocab-size-divisible-by 1
    --untie-embeddings-and-output-weights
    --disable-bias-linear
    --group-query-attention
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --attention-softmax-in-fp32
    --no-gradient-accumulation-fusion
    --tokenizer-type PretrainedFromHF
    --tokenizer-name-or-path "$TOKENIZER_PATH"
)

OPTIMIZE_ARGS=(
    --use-flash-attn
    --use-rotary-position-embeddings
    --use-fused-rotary-pos-emb
    --use-fused-swiglu
    --use-fused-rmsnorm
    --no-masked-softmax-fusion
    --use-distributed-optimizer
)

# micro and global batch sizes count pairs
TRAIN_ARGS=(
    --micro-batch-size 1
    --global-batch-size 128
    --train-iters "$TRAIN_ITERS"
    --lr 5e-6
    --min-lr 5e-7
    --lr-decay-style cosine
    --lr-warmup-fraction 0.1
    --weight-decay 0.0
    --clip-grad 1.0
    --adam-beta1 0.9
    --adam-beta2 0.95
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --initial-loss-scale 4096
    --seed 42
    --bf16
)

DATA_ARGS=(
    --data-path "$DATA_PATH"
    --split '100,0,0'
    --is-instruction-dataset
    --is-pairwise-dataset
    --prompt-type qwen3
    "${PAD_ARGS[@]}"
    --pad-to-multiple-of 64
)

OUTPUT_ARGS=(
    --load "$CKPT_LOAD_DIR"
    --save "$CKPT_SAVE_DIR"
    --finetune
    --no-load-optim
    --no-load-rng
    --ckpt-format torch
    --log-interval 1
    --save-interval 500
    --eval-interval 500
    --eval-iters 0
)

SIMPO_ARGS=(
    --stage simpo
    --simpo-beta 2.5
    --gamma-beta-ratio 0.55
    --simpo-loss-type sigmoid
    --fused-logprob
    --pair-schedule two_pass
    --lora-r 16
    --lora-alpha 32
    --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2
)

torchrun "${DISTRIBUTED_ARGS[@]}" -m mindspeed_simpo.posttrain_gpt \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${GPT_ARGS[@]}" \
    "${OPTIMIZE_ARGS[@]}" \
    "${TRAIN_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${OUTPUT_ARGS[@]}" \
    "${SIMPO_ARGS[@]}" \
    --distributed-backend nccl \
    "$@" |
    tee "logs/simpo_qwen3_8b_4k_lora_ptd.log"
