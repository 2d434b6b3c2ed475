# shellcheck shell=bash
# Environment of a training process on Ascend. Source it; every value that is set already wins. CANN and ATB are looked for
# under ASCEND_ROOT; ASCEND_SET_ENV names another set_env.sh of CANN.

# load FILE: source a script that was not written for this shell's options, and that would read "$@".
load() {
    local file=$1 options=$-
    shift
    set +eu # CANN's own scripts read variables that nobody has set
    # shellcheck disable=SC1090
    source "$file"
    [[ $options != *e* ]] || set -e
    [[ $options != *u* ]] || set -u
}

# defaults FILE: export the lines NAME=value of FILE whose NAME is not set.
defaults() {
    local line name
    while IFS= read -r line; do
        if [[ $line =~ ^([A-Z_]+)=(.*)$ ]]; then
            name=${BASH_REMATCH[1]}
            export "$name=${!name:-${BASH_REMATCH[2]}}"
        fi
    done <"$1"
}

ASCEND_ROOT=${ASCEND_ROOT:-/usr/local/Ascend}
if [[ -z ${ASCEND_SET_ENV:-} ]]; then
    # cann since 8.5, ascend-toolkit before
    for ASCEND_SET_ENV in "$ASCEND_ROOT"/{cann,ascend-toolkit}/set_env.sh; do
        [[ ! -f $ASCEND_SET_ENV ]] || break
    done
fi
if [[ -f $ASCEND_SET_ENV ]]; then
    load "$ASCEND_SET_ENV"
elif [[ -z ${ASCEND_HOME_PATH:-} ]]; then
    echo "env.sh: $ASCEND_SET_ENV does not exist; no CANN in $ASCEND_ROOT/cann or $ASCEND_ROOT/ascend-toolkit is used:" \
        "set ASCEND_SET_ENV to the set_env.sh of your CANN" >&2
    return 2
fi
# operators of the transformer library, which torch_npu loads where they are installed
if [[ -f $ASCEND_ROOT/nnal/atb/set_env.sh ]]; then
    load "$ASCEND_ROOT/nnal/atb/set_env.sh"
fi

ENGINE_DEVICE=$(dirname "${BASH_SOURCE[0]}")/../../mindspeed_simpo/device
defaults "$ENGINE_DEVICE/ascend.env"
# DETERMINISTIC=1: the same sums in the same order, run after run; slower.
if [[ ${DETERMINISTIC:-0} == 1 ]]; then
    export DETERMINISTIC # the engine switches torch's deterministic algorithms on
    defaults "$ENGINE_DEVICE/ascend_deterministic.env"
fi
# To find the operator behind an asynchronous error, and only then: export ASCEND_LAUNCH_BLOCKING=1
