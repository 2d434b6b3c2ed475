# shellcheck shell=bash
# The environment, the ranks and the questions that every script of this folder has. The scripts source it.

# shellcheck source=scripts/ascend/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" || exit 2

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
