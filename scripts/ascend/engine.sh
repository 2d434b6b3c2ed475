# shellcheck shell=bash
# Training with the engine of this package. A launch script sources this file and sets
#   TP, PP     the layout; what the user has set wins
#   RUN_ARGS   flags of the run: longest sequence, learning rate, recompute

# shellcheck source=scripts/ascend/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# train_with_engine CONFIG FLAGS...: start the ranks; FLAGS come last and win.
train_with_engine() {
    local config=$1
    shift
    require MODEL_PATH "Hugging Face folder of the model"
    require DATA_PATH "file or folder of preference pairs"
    require OUTPUT_DIR "folder that the run writes"
    cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2

    torchrun "${DISTRIBUTED_ARGS[@]}" -m mindspeed_simpo train "$config" \
        --device npu \
        --model-name-or-path "$MODEL_PATH" \
        --data-path "$DATA_PATH" \
        --output-dir "$OUTPUT_DIR" \
        --tensor-model-parallel-size "$TP" \
        --pipeline-model-parallel-size "$PP" \
        --sequence-parallel \
        --use-distributed-optimizer \
        --micro-batch-size 1 \
        --global-batch-size 128 \
        --bf16 \
        "${RUN_ARGS[@]}" \
        "$@"
}
