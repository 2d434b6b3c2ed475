#!/usr/bin/env bash
# A trained Megatron checkpoint -> a Hugging Face folder.
# MODEL_TYPE and MINDSPEED_LLM_PATH: see convert.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/convert.sh
source "$here/convert.sh"

require LOAD_DIR "folder of the Megatron checkpoint (CKPT_SAVE_DIR of training)"
require SAVE_DIR "folder for the Hugging Face model"
require HF_CONFIG_DIR "folder of the original Hugging Face model: its config.json and tokenizer"

DIRECTION_ARGS=(--load-model-type mg --save-model-type hf)
V2_ONLY_ARGS=(--hf-cfg-dir "$HF_CONFIG_DIR")
LEGACY_ARGS=(--target-tensor-parallel-size 1 --target-pipeline-parallel-size 1)

convert_checkpoint "$@"
