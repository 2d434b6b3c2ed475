# shellcheck shell=bash
# What every launch script here needs. Source it after env.sh.

# One host: set nothing. Several: on each set NNODES, NODE_RANK (0, 1, ...) and MASTER_ADDR (of node 0).
NPUS_PER_NODE=${NPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}
if ((NNODES > 1)); then
    # HCCL finds its peers through this interface; on hosts with several it may choose one that the peers cannot reach
    [[ -z ${HCCL_SOCKET_IFNAME:-} ]] || export HCCL_SOCKET_IFNAME
    [[ -z ${GLOO_SOCKET_IFNAME:-} ]] || export GLOO_SOCKET_IFNAME
    if [[ $MASTER_ADDR == localhost ]]; then
        echo "$0: NNODES is $NNODES: set MASTER_ADDR to the address of node 0" >&2
        exit 2
    fi
fi

# shellcheck disable=SC2034 # for the scripts that source this file
DISTRIBUTED_ARGS=(
    --nproc_per_node "$NPUS_PER_NODE"
    --nnodes "$NNODES"
    --node_rank "$NODE_RANK"
    --master_addr "$MASTER_ADDR"
    --master_port "$MASTER_PORT"
)

# require NAME WHAT: the variable must name something.
require() {
    if [[ -z ${!1:-} ]]; then
        echo "$0: set $1: $2" >&2
        exit 2
    fi
}

# Everything that a plug-in script reads, and MindSpeed-LLM's root as working directory.
enter_mindspeed_llm() {
    require MINDSPEED_LLM_PATH "root folder of MindSpeed-LLM, with Megatron-LM's megatron/ in it"
    require CKPT_LOAD_DIR "folder of the Megatron checkpoint to start from (see ckpt_convert_hf2mcore.sh)"
    require CKPT_SAVE_DIR "folder for the checkpoints of this run"
    require DATA_PATH "prefix of the preprocessed pairs (see data_convert_pairwise.sh)"
    require TOKENIZER_PATH "Hugging Face folder of the tokenizer"
    cd "$MINDSPEED_LLM_PATH" || exit 2
    mkdir -p logs
    # renamed after 2.2.0
    # shellcheck disable=SC2034
    if grep -q no_pad_to_seq_lengths mindspeed_llm/legacy/data/data_samplers.py; then
        PAD_ARGS=(--no-pad-to-seq-lengths)
    else
        PAD_ARGS=(--variable-seq-lengths)
    fi
}

# Everything that an engine script reads, and this repository's root as working directory.
enter_repository() {
    require MODEL_PATH "Hugging Face folder of the model"
    require DATA_PATH "file or folder of preference pairs"
    require OUTPUT_DIR "folder that the run writes"
    cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
}
