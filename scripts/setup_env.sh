# shellcheck shell=bash
# Sourced by the other scripts: `setup_env FILE...` makes the folder VENV (default: .venv) with the packages of requirement
# files FILE and of this project, and puts its programs first in PATH. Where nothing changed since the last time it does
# nothing. TORCH names another version of torch than the files do, NEWEST_PYTHON a lower limit than 3.12.

VENV=${VENV:-.venv}
NEWEST_PYTHON=${NEWEST_PYTHON:-3.12}

find_python() {
    local candidate
    # pyenv's command python3.10 fails where another version is chosen
    for candidate in "${PYTHON:-}" python3 python python3.12 python3.11 python3.10 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[0-2].*/bin/python; do
        if [ -n "$candidate" ] && "$candidate" -c '
import ensurepip, sys, venv
newest = tuple(map(int, sys.argv[1].split(".")))
raise SystemExit(not (3, 10) <= sys.version_info[:2] <= newest)' "$NEWEST_PYTHON" >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: found no Python from 3.10 to $NEWEST_PYTHON with the venv module; name one with PYTHON=..." >&2
    return 1
}

setup_env() {
    local wanted="" stamp file
    # A file that includes another (requirements-dev.txt) changes with it.
    wanted="$( (cat requirements.txt "$@" pyproject.toml && echo "${TORCH:-}") | sha256sum | cut -d ' ' -f 1)"
    stamp="$VENV/.requirements-$wanted"
    if [ ! -e "$stamp" ]; then
        local python
        if ! "$VENV/bin/python" -c 'import pip' >/dev/null 2>&1; then
            python="$(find_python)" || return 1
            echo "setting up $VENV with $("$python" --version)" >&2
            rm -rf "$VENV"
            "$python" -m venv "$VENV" || return 1
        fi
        local requirements=()
        if [ -n "${TORCH:-}" ]; then
            cat requirements.txt "$@" | sed "/^-r /d; s/^torch==.*/torch==$TORCH/" >"$VENV/requirements.txt"
            requirements=(-r "$VENV/requirements.txt")
        else
            for file in "$@"; do requirements+=(-r "$file"); done
        fi
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "${requirements[@]}" || return 1
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable . || return 1
        touch "$stamp"
    fi
    export PATH="$PWD/$VENV/bin:$PATH"
    unset PYTHONHOME PYTHONPATH
}

# The older line of megatron-core that the project supports, beside the one in VENV; its folder goes into PYTHONPATH.
OLD_CORE=$VENV/megatron-core-0.12.1

setup_old_core() {
    if [ ! -e "$OLD_CORE/.complete" ]; then
        # Its metadata drags in packages that it does not need here.
        rm -rf "$OLD_CORE"
        python -m pip install --quiet --disable-pip-version-check --no-deps --target "$OLD_CORE" megatron-core==0.12.1 ||
            return 1
        touch "$OLD_CORE/.complete"
    fi
}

# Chromium for the tests of pages, which skip with a reason where there is none.
setup_browser() {
    if [ -n "${CHROMIUM:-}" ] || command -v chromium chromium-headless-shell chromium-browser google-chrome >/dev/null; then
        return
    fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        (apt-get update && apt-get install --yes --no-install-recommends chromium-headless-shell) >/dev/null 2>&1
    else
        "$VENV/bin/python" -m playwright install chromium >/dev/null 2>&1
    fi || echo "no Chromium could be installed: the tests of pages are skipped" >&2
}
