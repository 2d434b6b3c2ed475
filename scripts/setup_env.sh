# shellcheck shell=bash
# Sourced by the other scripts: `setup_env FILE...` makes .venv with the packages of requirement files FILE and of this
# project, and puts its programs first in PATH. Where nothing changed since the last time it does nothing.

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python python3.12 python3.11 python3.10; do
        if [ -n "$candidate" ] && "$candidate" -c '
import ensurepip, sys, venv
raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: found no Python 3.10, 3.11 or 3.12 with the venv module; name one with PYTHON=..." >&2
    return 1
}

setup_env() {
    local wanted="" stamp file
    # A file that includes another (requirements-dev.txt) changes with it.
    wanted="$(cat requirements.txt "$@" pyproject.toml | sha256sum | cut -d ' ' -f 1)"
    stamp=".venv/.requirements-$wanted"
    if [ ! -e "$stamp" ]; then
        local python
        if ! .venv/bin/python -c 'import pip' >/dev/null 2>&1; then
            python="$(find_python)" || return 1
            echo "setting up .venv with $("$python" --version)" >&2
            rm -rf .venv
            "$python" -m venv .venv || return 1
        fi
        local requirements=()
        for file in "$@"; do requirements+=(-r "$file"); done
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "${requirements[@]}" || return 1
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . || return 1
        touch "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
    unset PYTHONHOME PYTHONPATH
}

# The older line of megatron-core that the project supports, beside the one in .venv; its folder goes into PYTHONPATH.
OLD_CORE=.venv/megatron-core-0.12.1

setup_old_core() {
    if [ ! -e "$OLD_CORE/.complete" ]; then
        # Its metadata drags in packages that it does not need here.
        rm -rf "$OLD_CORE"
        python -m pip install --quiet --disable-pip-version-check --no-deps --target "$OLD_CORE" megatron-core==0.12.1 ||
            return 1
        touch "$OLD_CORE/.complete"
    fi
}
