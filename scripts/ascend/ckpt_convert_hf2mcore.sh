#!/usr/bin/env bash
# A Hugging Face folder -> a Megatron checkpoint of TP x PP parts, for CKPT_LOAD_DIR.
# MODEL_TYPE and MINDSPEED_LLM_PATH: see convert.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/convert.sh
source "$here/convert.sh"

require LOAD_DIR "Hugging Face folder"
require SAVE_DIR "folder for the Megatron checkpoint"

DIRECTION_ARGS=(
    --load-model-type hf
    --save-model-type mg
    --target-tensor-parallel-size "${TP:-2}"
    --target-pipeline-parallel-size "${PP:-4}"
)
V2_ONLY_ARGS=()
LEGACY_ARGS=(--tokenizer-model "${TOKENIZER_MODEL:-$LOAD_DIR/tokenizer.json}")

convert_checkpoint "$@"
