"""The options of parallelism, and of what a run writes."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from mindspeed_simpo.config.options.base import BackendName, ContextParallelAlgo, Options, option

_OF_MEGATRON = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "context_parallel_algo",
    "sequence_parallel",
    "use_distributed_optimizer",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "overlap_grad_reduce",
    "use_ascend_mc2",
    "overlap_param_gather",
)
_OF_FSDP = ("fsdp_shard_size", "fsdp_cpu_offload", "freeze_vision")


class ParallelOptions(Options):
    """Parallelism."""

    backend: BackendName = option(
        "megatron",
        effect="arithmetic",
        description="What builds and shards the model. megatron: megatron-core, for the families of docs/models.md and "
        "large clusters; fsdp: the model class of transformers, sharded by PyTorch's FSDP2, for every causal model.",
    )
    fsdp_shard_size: int | None = option(
        None,
        ge=1,
        effect="layout",
        description="With backend: fsdp, ranks that divide the parameters; the other ranks hold copies, as is usual "
        "for several hosts. Default: all ranks.",
    )
    fsdp_cpu_offload: bool = option(
        False,
        effect="layout",
        description="With backend: fsdp, hold parameters, gradients and optimizer state in host memory.",
    )
    freeze_vision: bool = option(
        True,
        effect="result",
        description="With backend: fsdp and a model that takes images, train embedding, decoder and output layer only, "
        "not the vision tower and its projection; false trains all weights.",
    )
    tensor_model_parallel_size: int = option(
        1, ge=1, effect="layout", description="Ranks over which each weight matrix is sharded (TP)."
    )
    pipeline_model_parallel_size: int = option(
        1, ge=1, effect="layout", description="Ranks over which the layers are divided (PP)."
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None,
        ge=1,
        effect="layout",
        description="Layers per model chunk of the interleaved pipeline schedule (VPP). Default: the schedule without "
        "interleaving.",
    )
    context_parallel_size: int = option(
        1, ge=1, effect="layout", description="Ranks over which each sequence is sharded (CP)."
    )
    context_parallel_algo: ContextParallelAlgo = option(
        "gathered",
        effect="arithmetic",
        description="Attention over context-parallel ranks. gathered: all-gather of keys and values, on any device; "
        "megatron_cp_algo: MindSpeed's ring attention, npu only; ulysses_cp_algo: MindSpeed's Ulysses, npu only.",
    )
    sequence_parallel: bool = option(
        False,
        effect="layout",
        description="Shard the activations outside of attention and MLP along the sequence over the tensor-parallel "
        "ranks (SP).",
    )
    use_ascend_mc2: bool = option(
        False,
        effect="arithmetic",
        description="Compute the projections of attention and MLP with torch_npu's operators that overlap a product "
        "with its all-gather or reduce-scatter (MC2); npu only, with bf16, sequence_parallel and "
        "tensor_model_parallel_size 2, 4 or 8.",
    )
    use_distributed_optimizer: bool = option(
        False, effect="layout", description="Shard the optimizer state over the data-parallel ranks (ZeRO-1)."
    )
    expert_model_parallel_size: int = option(
        1,
        ge=1,
        effect="layout",
        description="Ranks over which the experts of each layer are divided (EP), among the ranks of tensor, context "
        "and data parallelism.",
    )
    expert_tensor_parallel_size: int | None = option(
        None,
        ge=1,
        effect="layout",
        description="Ranks over which each expert's weights are sharded (ETP). Default: tensor_model_parallel_size.",
    )
    overlap_grad_reduce: bool = option(
        False,
        effect="arithmetic",
        description="Overlap the gradient reduction over the data-parallel ranks with the last backward of a step.",
    )
    overlap_param_gather: bool = option(
        False,
        effect="arithmetic",
        description="Overlap the all-gather of the updated parameters over the data-parallel ranks with the next "
        "forward. Needs use_distributed_optimizer and overlap_grad_reduce.",
    )
    device: Literal["auto", "npu", "cuda", "cpu"] = option(
        "auto", effect="arithmetic", description="Device to run on; auto takes the first found of npu, cuda and cpu."
    )
    distributed_timeout_minutes: float = option(
        10.0,
        gt=0,
        effect="none",
        description="Timeout of a collective, minutes, after which a run with a lost rank ends.",
    )

    @model_validator(mode="after")
    def _backend_has_the_options(self) -> ParallelOptions:
        of_others = _OF_FSDP if self.backend == "megatron" else _OF_MEGATRON
        given = [name for name in of_others if getattr(self, name) != type(self).model_fields[name].default]
        if given:
            other = "fsdp" if self.backend == "megatron" else "megatron"
            raise ValueError(
                f"{', '.join(given)}: only backend: {other} has {'it' if len(given) == 1 else 'them'}: remove "
                f"{'it' if len(given) == 1 else 'them'}, or set backend: {other}"
            )
        return self

    @model_validator(mode="after")
    def _overlapped_gather_has_what_it_needs(self) -> ParallelOptions:
        absent = [name for name in ("use_distributed_optimizer", "overlap_grad_reduce") if not getattr(self, name)]
        if self.overlap_param_gather and absent:
            raise ValueError(
                f"overlap_param_gather needs {' and '.join(f'{name}: true' for name in absent)}: set "
                f"{'it' if len(absent) == 1 else 'them'}, or remove overlap_param_gather"
            )
        return self

    @model_validator(mode="after")
    def _virtual_pipeline_needs_pipeline(self) -> ParallelOptions:
        if self.num_layers_per_virtual_pipeline_stage is not None and self.pipeline_model_parallel_size == 1:
            raise ValueError("num_layers_per_virtual_pipeline_stage needs pipeline_model_parallel_size of at least 2")
        return self


class OutputOptions(Options):
    """Evaluation and output."""

    output_dir: str = option("outputs/simpo", effect="none", description="Folder for everything that the run writes.")
    load: str | None = option(
        None,
        effect="none",
        description="Checkpoint to resume from: a checkpoints folder (the newest checkpoint) or one iter_* folder; "
        "auto: the newest whole checkpoint of output_dir, or a run from the start where there is none. Default: a run "
        "from the start.",
    )
    save_interval: int = option(
        0, ge=0, effect="none", description="Optimizer steps between checkpoints; 0 saves only at the end."
    )
    save_total_limit: int | None = option(
        None,
        ge=1,
        effect="none",
        description="Number of checkpoints that are kept, the newest ones; the best one of "
        "metric_for_best_model is kept beside them. Default: all.",
    )
    async_save: bool = option(
        False,
        effect="none",
        description="Write checkpoints in the background: training goes on as soon as each rank has copied its shard "
        "to host memory.",
    )
    log_interval: int = option(1, ge=1, effect="none", description="Optimizer steps between lines of metrics.")
    eval_interval: int = option(
        0,
        ge=0,
        effect="none",
        description="Optimizer steps between evaluations; 0 evaluates only before the first and after the last step.",
    )
    eval_iters: int | None = option(
        None,
        ge=0,
        effect="none",
        description="Largest number of global batches per evaluation; 0 means no evaluation. Default: all "
        "evaluation pairs.",
    )
    export_hf: bool = option(
        False,
        effect="none",
        description="Write the trained model to output_dir/hf as a Hugging Face folder at the end: that of the last "
        "step, or of the best checkpoint where metric_for_best_model is set.",
    )
    wandb_project: str | None = option(
        None, effect="none", description="Weights & Biases project that also receives the metrics. Default: none."
    )
    swanlab_project: str | None = option(
        None, effect="none", description="SwanLab project that also receives the metrics. Default: none."
    )
