#!/usr/bin/env bash
# All checks, as continuous integration runs them: style, types, import contracts, tests, and the tests of the ranks
# again with the older megatron-core line.
#
#   bash scripts/test.sh                    everything
#   bash scripts/test.sh lint               style, types and import contracts
#   bash scripts/test.sh core012            the tests of the ranks that depend on it with megatron-core 0.12.1
#   bash scripts/test.sh unit [ARGUMENT...] one folder of tests (unit, ranks, e2e, upstream), arguments to pytest
#   bash scripts/test.sh torch271           the tests with what an Ascend host has: Python 3.10, torch 2.7.1, megatron-core
#                                           0.12.1, in .venv-torch271; arguments to pytest in the place of "tests"
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if [ "${1:-}" = torch271 ]; then
    VENV=.venv-torch271 TORCH=2.7.1 NEWEST_PYTHON=3.10
fi
. scripts/setup_env.sh
setup_env requirements-dev.txt || exit 1
case "${1:-all}" in all | unit | e2e) setup_browser ;; esac

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

lint() {
    local failed=0
    ruff check . || failed=1
    ruff format --check . || failed=1
    mypy || failed=1
    lint-imports || failed=1
    return $failed
}

with_old_core() {
    setup_old_core || return 1
    PYTHONPATH="$PWD/$OLD_CORE" python -m pytest -m "not newest_core" "$@"
}

core012() {
    with_old_core tests/ranks "$@"
}

torch271() {
    [ $# -gt 0 ] || set -- tests
    with_old_core "$@"
}

case "${1:-all}" in
lint) lint ;;
core012) core012 "${@:2}" ;;
torch271) torch271 "${@:2}" ;;
unit | ranks | e2e | upstream) python -m pytest "tests/$1" "${@:2}" ;;
all)
    status=0 topologies=tests/ranks/test_topologies.py
    setup_old_core || exit 1 # once, not by both of what follows
    # tests of one process and tests that wait leave a core idle: lint and the tests of the ranks run beside them
    others=$(mktemp)
    set -m # a process group of its own, which is ended as a whole
    (
        other_status=0
        python -m pytest tests --ignore=tests/ranks || other_status=1
        core012 --ignore="$topologies" || other_status=1
        exit $other_status
    ) >"$others" 2>&1 &
    pid=$!
    set +m
    trap 'kill -- -$pid 2>/dev/null; rm -f "$others"' EXIT
    lint || status=1
    python -m pytest tests/ranks || status=1
    with_old_core "$topologies" || status=1
    wait $pid || status=1
    cat "$others"
    exit $status
    ;;
*)
    echo "error: expected lint, core012, torch271, unit, ranks, e2e, upstream or nothing, found $1" >&2
    exit 2
    ;;
esac
