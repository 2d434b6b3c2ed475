# shellcheck shell=bash
# Environment of a training process on Ascend. Source it; every value that is set already wins.

ASCEND_SET_ENV=${ASCEND_SET_ENV:-/usr/local/Ascend/ascend-toolkit/set_env.sh}
if [[ -f $ASCEND_SET_ENV ]]; then
    set +u # CANN's own script reads variables that nobody has set
    # shellcheck disable=SC1090
    source "$ASCEND_SET_ENV"
    set -u
fi

# Megatron orders communication against computation by one hardware queue; sequence parallelism relies on it.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Pairs differ in length: without growing segments the allocator fragments and runs out of memory.
export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
# Seconds to connect: the first rank to arrive waits while others still load a checkpoint from shared storage.
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-3600}
# Seconds that one collective may take: rank 0 preprocesses data or saves while the others wait.
export HCCL_EXEC_TIMEOUT=${HCCL_EXEC_TIMEOUT:-3600}
# Threads stay on the cores next to their NPU; kernels are then launched without jumps between sockets.
export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}
# Operators are queued and launched by a second thread: fewer gaps between small kernels.
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}
# As in MindSpeed-LLM's scripts: silent-error detection looks for spikes, which preference gradients may have.
export NPU_ASD_ENABLE=${NPU_ASD_ENABLE:-0}
# Streams of overlapping communication share a device; the default is too low for TP, DP and PP groups together.
export STREAMS_PER_DEVICE=${STREAMS_PER_DEVICE:-32}

# DETERMINISTIC=1: the same sums in the same order, run after run; slower.
if [[ ${DETERMINISTIC:-0} == 1 ]]; then
    export HCCL_DETERMINISTIC=true
    export LCCL_DETERMINISTIC=1
    # a multi-core reduction would add in the order in which cores finish
    export ATB_MATMUL_SHUFFLE_K_ENABLE=0
fi
# To find the operator behind an asynchronous error, and only then: export ASCEND_LAUNCH_BLOCKING=1
