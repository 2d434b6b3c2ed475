#!/usr/bin/env bash
# The parity matrix with both lines of megatron-core: every layout that the project claims, against a dense oracle.
#
#   bash scripts/parity.sh --quick            the rows of continuous integration
#   bash scripts/parity.sh                    all rows
#   bash scripts/parity.sh --write-docs       all rows, into the tables of docs/numerics.md
#   bash scripts/parity.sh --only "TP2 CP2"   rows whose name has this in it
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
. scripts/setup_env.sh
setup_env requirements-dev.txt || exit 1
setup_old_core || exit 1

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
status=0
python -m scripts.parity "$@" || status=$?
PYTHONPATH="$PWD/$OLD_CORE" python -m scripts.parity "$@" || status=$?
exit $status
