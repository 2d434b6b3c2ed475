#!/usr/bin/env bash
# Preference pairs -> MindSpeed-LLM's tokenised pairs, with its own preprocessing.
# (mindspeed-simpo encode writes the same files from any form that this package reads.)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/launch.sh
source "$here/launch.sh"
require MINDSPEED_LLM_PATH "root folder of MindSpeed-LLM"
require INPUT "JSON, JSONL or Parquet file of pairs"
require TOKENIZER_PATH "Hugging Face folder of the tokenizer"
require OUTPUT_PREFIX "prefix of the files to write; --data-path of training"
mkdir -p "$(dirname "$OUTPUT_PREFIX")"
cd "$MINDSPEED_LLM_PATH"

# HANDLER: AlpacaStylePairwiseHandler or SharegptStylePairwiseHandler. Pairs of SEQ_LENGTH tokens and more are dropped.
python preprocess_data.py \
    --input "$INPUT" \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --output-prefix "$OUTPUT_PREFIX" \
    --handler-name "${HANDLER:-AlpacaStylePairwiseHandler}" \
    --prompt-type "${PROMPT_TYPE:-llama3}" \
    --map-keys "${MAP_KEYS:-{\"prompt\":\"question\",\"query\":\"\",\"system\":\"system\"\}}" \
    --seq-length "${SEQ_LENGTH:-8192}" \
    --workers "${WORKERS:-4}" \
    --log-interval 1000
