#!/usr/bin/env bash
# A trained Megatron checkpoint -> a Hugging Face folder.
# MODEL_TYPE is MindSpeed-LLM's name of the architecture: llama2 (all Llamas), qwen25, qwen3.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/env.sh
source "$here/env.sh"
# shellcheck source=scripts/ascend/launch.sh
source "$here/launch.sh"
require MINDSPEED_LLM_PATH "root folder of MindSpeed-LLM"
require LOAD_DIR "folder of the Megatron checkpoint (CKPT_SAVE_DIR of training)"
require SAVE_DIR "folder for the Hugging Face model"
require HF_CONFIG_DIR "folder of the original Hugging Face model: its config.json and tokenizer"
MODEL_TYPE=${MODEL_TYPE:-qwen3}
cd "$MINDSPEED_LLM_PATH"

# convert_ckpt_v2.py knows Llama and Qwen2.5 from 26.1.0 on; before, convert_ckpt.py did, under the name llama2
if grep -q "['\"]${MODEL_TYPE}['\"]" convert_ckpt_v2.py; then
    python convert_ckpt_v2.py \
        --load-model-type mg \
        --save-model-type hf \
        --hf-cfg-dir "$HF_CONFIG_DIR" \
        --model-type-hf "$MODEL_TYPE" \
        --load-dir "$LOAD_DIR" \
        --save-dir "$SAVE_DIR" \
        "$@"
else
    extra=()
    if [[ $MODEL_TYPE == qwen25 ]]; then
        extra=(--add-qkv-bias)
    fi
    python convert_ckpt.py \
        --use-mcore-models \
        --model-type GPT \
        --load-model-type mg \
        --save-model-type hf \
        --model-type-hf llama2 \
        --params-dtype bf16 \
        --target-tensor-parallel-size 1 \
        --target-pipeline-parallel-size 1 \
        --load-dir "$LOAD_DIR" \
        --save-dir "$SAVE_DIR" \
        "${extra[@]}" \
        "$@"
fi
