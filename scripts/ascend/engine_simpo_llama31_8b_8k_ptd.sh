#!/usr/bin/env bash
# SimPO of Llama-3.1-8B, all weights, sequences of 8192 tokens, with the engine.
# One host of 8 NPUs of 64 GB: TP 2 x PP 4.
# Nobody has run this on an NPU yet: its flags are checked, its numbers on the CPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ascend/engine.sh
source "$here/engine.sh"

TP=${TP:-2}
PP=${PP:-4}
RUN_ARGS=(--seq-length 8192)

train_with_engine configs/llama3_8b_instruct_simpo.yaml "$@"
