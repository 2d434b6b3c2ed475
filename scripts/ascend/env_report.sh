#!/usr/bin/env bash
# Versions and settings that a bug report needs; changes nothing. Run it in MindSpeed-LLM's root, where there is one.
set -uo pipefail

line() { printf '%-22s %s\n' "$1" "$2"; }
first_line() { "$@" 2>/dev/null | head -n 1; }
or_none() { if [[ -n $1 ]]; then echo "$1"; else echo "not found"; fi; }

root=${ASCEND_ROOT:-/usr/local/Ascend}
cann=""
for file in "${ASCEND_HOME_PATH:-$root/cann}"/{*/,}ascend_*_install.info \
    "$root"/{cann,ascend-toolkit/latest}/{*/,}ascend_*_install.info; do
    if [[ -f $file ]]; then
        cann="$(sed -n 's/^version=//p' "$file" | head -n 1) ($(dirname "$file"))"
        break
    fi
done
atb=""
if [[ -f $root/nnal/atb/set_env.sh ]]; then
    atb="$root/nnal/atb"
fi
driver=""
if [[ -f $root/driver/version.info ]]; then
    driver=$(sed -n 's/^Version=//p' "$root/driver/version.info" | head -n 1)
fi

line "date" "$(date -u +%Y-%m-%dT%H:%MZ)"
line "system" "$(uname -srm)"
line "processors" "$(nproc)"
line "npu-smi" "$(or_none "$(first_line npu-smi -v)")"
line "NPUs" "$(or_none "$(npu-smi info -l 2>/dev/null | sed -n 's/.*Total Count *: *//p')")"
line "driver" "$(or_none "$driver")"
line "CANN" "$(or_none "$cann")"
line "ATB" "$(or_none "$atb")"

python=$(command -v python || command -v python3)
line "python" "$(or_none "$(first_line "$python" --version)") (${python:-none})"
"$python" - <<'PYTHON'
import importlib.metadata
import importlib.util

for name in (
    "torch",
    "torch_npu",
    "megatron_core",
    "mindspeed",
    "mindspeed_llm",
    "transformers",
    "peft",
    "datasets",
    "mindspeed_simpo",
):
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    try:
        spec = importlib.util.find_spec(name if name != "megatron_core" else "megatron.core")
    except ModuleNotFoundError:
        spec = None
    where = next(iter(spec.submodule_search_locations or []), spec.origin) if spec else None
    print(f"{name:22s} {version}" + (f" ({where})" if where else ""))
PYTHON

for name in MINDSPEED_LLM_PATH MINDSPEED_PATH MEGATRON_LM_PATH; do
    folder=${!name:-}
    commit=""
    if [[ -n $folder ]]; then
        commit=$(git -C "$folder" log -1 --format='%h %cs' 2>/dev/null)
    fi
    line "$name" "${folder:-not set}${commit:+ ($commit)}"
done
env | grep -E '^(ASCEND|ATB|CLOSE_MATMUL|DETERMINISTIC|HCCL|NPU|PYTORCH_NPU|TASK_QUEUE|CPU_AFFINITY|STREAMS_PER|CUDA_DEVICE_MAX|TRAINING_BACKEND|MINDSPEED_SIMPO|OMP_)' |
    sort || true
