# shellcheck shell=bash
# Training with the plug-in in MindSpeed-LLM. A launch script sources this file and sets
#   TP, PP, SEQ_LENGTH   the layout and the longest sequence; what the user has set wins
#   MODEL_ARGS           flags of the model: shape, rotary embedding, chat template
#   RUN_ARGS             flags of the run: learning rate, schedule, recompute, overlap, adapters

# shellcheck source=scripts/ascend/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# One collective may take this long: rank 0 preprocesses data or saves while the others wait. Of HCCL's own time-out, which
# names the collective, and that of the process groups (--distributed-timeout-minutes) the shorter one ends the run.
export HCCL_EXEC_TIMEOUT=${HCCL_EXEC_TIMEOUT:-3600}
TIMEOUT_MINUTES=$((HCCL_EXEC_TIMEOUT / 54))

# MindSpeed-LLM's root as working directory, and everything that the user has to name.
enter_mindspeed_llm() {
    require MINDSPEED_LLM_PATH "root folder of MindSpeed-LLM, with Megatron-LM's megatron/ in it"
    require CKPT_LOAD_DIR "folder of the Megatron checkpoint to start from (see ckpt_convert_hf2mcore.sh)"
    require CKPT_SAVE_DIR "folder for the checkpoints of this run"
    require DATA_PATH "prefix of the preprocessed pairs (see data_convert_pairwise.sh)"
    require TOKENIZER_PATH "Hugging Face folder of the tokenizer"
    cd "$MINDSPEED_LLM_PATH" || exit 2
    mkdir -p logs
}

# train_in_mindspeed_llm FLAGS...: start the ranks; FLAGS come last and win.
train_in_mindspeed_llm() {
    enter_mindspeed_llm

    local layout_args=(
        --tensor-model-parallel-size "$TP"
        --pipeline-model-parallel-size "$PP"
        --sequence-parallel
        --use-distributed-optimizer
    )

    local gpt_args=(
        --use-mcore-models
        --transformer-impl local
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

    local operator_args=(
        --use-flash-attn
        --use-rotary-position-embeddings
        --use-fused-rotary-pos-emb
        --use-fused-swiglu
        --use-fused-rmsnorm
        --no-masked-softmax-fusion
    )

    # micro and global batch sizes count pairs
    local train_args=(
        --micro-batch-size 1
        --global-batch-size 128
        --train-iters "${TRAIN_ITERS:-500}"
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

    local data_args=(
        --data-path "$DATA_PATH"
        --split '100,0,0'
        --is-instruction-dataset
        --is-pairwise-dataset
        --pad-to-multiple-of 64
    )
    # MindSpeed-LLM renamed this flag after 2.2.0
    if grep -q no_pad_to_seq_lengths mindspeed_llm/legacy/data/data_samplers.py; then
        data_args+=(--no-pad-to-seq-lengths)
    else
        data_args+=(--variable-seq-lengths)
    fi

    local output_args=(
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
        --distributed-timeout-minutes "$TIMEOUT_MINUTES"
    )
    if [[ ${DETERMINISTIC:-0} == 1 ]]; then
        output_args+=(--npu-deterministic)
    fi

    local simpo_args=(
        --stage simpo
        --simpo-beta 2.5
        --gamma-beta-ratio 0.55
        --simpo-loss-type sigmoid
        --fused-logprob
    )

    torchrun "${DISTRIBUTED_ARGS[@]}" -m mindspeed_simpo.posttrain_gpt \
        "${layout_args[@]}" \
        "${gpt_args[@]}" \
        "${MODEL_ARGS[@]}" \
        "${operator_args[@]}" \
        "${train_args[@]}" \
        "${data_args[@]}" \
        "${output_args[@]}" \
        "${simpo_args[@]}" \
        "${RUN_ARGS[@]}" \
        --distributed-backend nccl \
        "$@" |
        tee "logs/$(basename "${BASH_SOURCE[-1]}" .sh).log"
}
