# shellcheck shell=bash
# Conversion of checkpoints with MindSpeed-LLM's programs. A script sources this file, requires LOAD_DIR and SAVE_DIR, and
# sets
#   DIRECTION_ARGS   flags of both programs: the kinds of checkpoint to load and to save
#   V2_ONLY_ARGS     flags of convert_ckpt_v2.py alone
#   LEGACY_ARGS      flags of convert_ckpt.py alone
# MODEL_TYPE is MindSpeed-LLM's name of the architecture: llama2 (all Llamas), qwen25, qwen3.

# shellcheck source=scripts/ascend/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
require MINDSPEED_LLM_PATH "root folder of MindSpeed-LLM"

# convert_checkpoint FLAGS...: FLAGS come last and win.
convert_checkpoint() {
    local model_type=${MODEL_TYPE:-qwen3}
    local common_args=("${DIRECTION_ARGS[@]}" --load-dir "$LOAD_DIR" --save-dir "$SAVE_DIR")
    cd "$MINDSPEED_LLM_PATH" || exit 2

    # convert_ckpt_v2.py knows Llama and Qwen2.5 from 26.1.0 on; before, convert_ckpt.py did, under the name llama2
    if grep -q "['\"]${model_type}['\"]" convert_ckpt_v2.py; then
        python convert_ckpt_v2.py \
            --model-type-hf "$model_type" \
            "${common_args[@]}" \
            "${V2_ONLY_ARGS[@]}" \
            "$@"
    else
        if [[ $model_type == qwen25 ]]; then
            LEGACY_ARGS+=(--add-qkv-bias)
        fi
        python convert_ckpt.py \
            --use-mcore-models \
            --model-type GPT \
            --model-type-hf llama2 \
            --params-dtype bf16 \
            "${common_args[@]}" \
            "${LEGACY_ARGS[@]}" \
            "$@"
    fi
}
