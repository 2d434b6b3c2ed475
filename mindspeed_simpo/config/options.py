"""The options, group by group: names, types, ranges and units of every key, and what the keys of one group agree on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

ContextParallelAlgo = Literal["gathered", "megatron_cp_algo", "ulysses_cp_algo"]
BatchingName = Literal["auto", "padded", "packed", "prefix_shared"]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _no_path_has_a_null(cls, value: Any) -> Any:
        if "\0" in str(value):
            raise ValueError("expected a text without null characters")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _flags_are_not_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("expected a value, not true or false")
        return value


class TaskOptions(_Options):
    """Objective."""

    stage: Literal["simpo", "dpo"] = Field("simpo", description="Preference objective.")
    simpo_beta: float = Field(2.5, gt=0, description="Reward scale of SimPO, per nat per token.")
    gamma_beta_ratio: float = Field(
        0.55,
        ge=0,
        description="Target reward margin divided by beta, nats per token (the paper's gamma is ratio x beta).",
    )
    simpo_loss_type: Literal["sigmoid", "hinge", "ipo"] = Field("sigmoid", description="Form of the SimPO loss.")
    simpo_label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Probability that a preference label is wrong (sigmoid loss only)."
    )
    pref_ftx: float = Field(
        0.0, ge=0, description="Weight of the supervised term, minus the mean chosen log-probability per token."
    )
    dpo_beta: float = Field(0.1, gt=0, description="Reward scale of DPO, per nat.")
    dpo_loss_type: Literal["sigmoid", "hinge", "ipo"] = Field("sigmoid", description="Form of the DPO loss.")
    dpo_label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Probability that a preference label is wrong (sigmoid loss only)."
    )
    ref_model: str | None = Field(
        None, description="DPO's reference: HF folder or hub id. Default: the weights that training starts from."
    )

    @model_validator(mode="after")
    def _objective_agrees(self) -> TaskOptions:
        if self.stage == "simpo" and self.ref_model is not None:
            raise ValueError("ref_model is DPO's; SimPO has no reference model: remove it or set stage: dpo")
        if self.simpo_label_smoothing and self.simpo_loss_type != "sigmoid":
            raise ValueError("simpo_label_smoothing needs simpo_loss_type: sigmoid")
        if self.dpo_label_smoothing and self.dpo_loss_type != "sigmoid":
            raise ValueError("dpo_label_smoothing needs dpo_loss_type: sigmoid")
        return self


class ModelOptions(_Options):
    """Model."""

    model_name_or_path: str = Field(description="Hugging Face model: a local folder or a hub id.")
    init_from: Literal["weights", "config"] = Field(
        "weights", description="Start from the model's weights, or from random ones of its config.json's shape."
    )
    chat_template: str | None = Field(
        None, description="Jinja file that renders conversations, in place of the tokenizer's own template."
    )


class DataOptions(_Options):
    """Data."""

    data_path: str | list[str] = Field(description="Training pairs: a file, a folder, a hub id, or a list of them.")
    eval_data_path: str | list[str] | None = Field(None, description="Held-out pairs, in the same forms.")
    split: str = Field(
        "100,0", description="Weights of the train and eval parts of data_path, in row order, such as 95,5 or 969,30,1."
    )
    map_keys: dict[str, str | dict[str, str]] | None = Field(
        None, description="Column names of the data: {canonical name: your column}, as MindSpeed-LLM's --map-keys."
    )
    seq_length: int = Field(2048, ge=8, description="Longest sequence (prompt and response), tokens.")
    max_prompt_length: int | None = Field(
        None, ge=1, description="Where truncation stops cutting the prompt, tokens. Default: half of seq_length."
    )
    truncation: Literal["error", "drop", "keep_end", "keep_start"] = Field(
        "error", description="A pair longer than seq_length: refuse, leave out, or keep that end of its prompt."
    )
    data_errors: Literal["fail", "drop"] = Field(
        "fail", description="Malformed, empty or identical pairs: refuse, or leave out and count."
    )
    data_cache_dir: str | None = Field(
        None, description="Folder of tokenised data and reference log-probabilities. Default: ~/.cache/mindspeed_simpo."
    )
    num_workers: int = Field(0, ge=0, le=256, description="Processes that tokenise; 0 means one per core.")

    @field_validator("split")
    @classmethod
    def _split_is_weights(cls, value: str) -> str:
        try:
            weights = [float(part) for part in value.split(",")]
        except ValueError:
            raise ValueError("expected two or three comma-separated weights, such as 95,5") from None
        if not 1 <= len(weights) <= 3 or min(weights) < 0 or weights[0] <= 0:
            raise ValueError("expected two or three weights of at least 0, the first above 0, such as 95,5")
        return value

    @field_validator("data_path", "eval_data_path")
    @classmethod
    def _paths_are_given(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and not all([value] if isinstance(value, str) else value or [""]):
            raise ValueError("expected a path, or a list of at least one path")
        return value

    @model_validator(mode="after")
    def _lengths_agree(self) -> DataOptions:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.seq_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below seq_length ({self.seq_length}): "
                "the response needs room"
            )
        return self

    @property
    def prompt_limit(self) -> int:
        """``max_prompt_length`` with its default, tokens."""
        return self.max_prompt_length if self.max_prompt_length is not None else self.seq_length // 2


class TrainingOptions(_Options):
    """Training."""

    micro_batch_size: int = Field(
        1, ge=1, description="Padded: pairs of one forward and backward on one rank; packed rows have a budget."
    )
    global_batch_size: int = Field(128, ge=1, description="Pairs of one optimizer step, over all ranks.")
    batching: BatchingName = Field(
        "auto",
        description="Sequences in rows of one length; end to end without padding; or that with each prompt once for "
        "chosen and rejected. The gradients are the same. auto: the last of these that the layout allows.",
    )
    max_tokens_per_micro_batch: int | None = Field(
        None,
        ge=1,
        description="With packed and prefix_shared: tokens up to which pairs fill a micro-batch; a pair with more has "
        "its own. Default: 2 x seq_length, which the longest pair needs.",
    )
    train_iters: int | None = Field(None, ge=0, description="Optimizer steps. Default: one pass over the data.")
    lr: float = Field(1e-6, gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay.")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = Field(
        "cosine", description="Shape of the decay after warm-up."
    )
    lr_warmup_fraction: float = Field(0.1, ge=0, lt=1, description="Fraction of train_iters that warms up linearly.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay; norms and biases are exempt.")
    clip_grad: float = Field(1.0, ge=0, description="Largest global gradient L2 norm; 0 means no clipping.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's decay of the first moment.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="Adam's decay of the second moment.")
    adam_eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    seed: int = Field(42, ge=1, lt=2**31, description="Seed of the data order, the initialisation and dropout.")
    bf16: bool = Field(False, description="Compute in bfloat16 with fp32 main parameters and gradients.")
    pair_schedule: Literal["concat", "split", "two_pass"] = Field(
        "concat",
        description="Chosen and rejected in one forward; in two forwards and one backward; or one after the other, "
        "with half the stored activations for one more forward of the rejected. The gradients are the same.",
    )
    fused_logprob: bool = Field(
        True, description="Head and log-probability by chunks of tokens: logits are never stored, but computed twice."
    )
    logprob_chunk_tokens: int = Field(
        512, ge=1, description="With fused_logprob: response tokens whose logits exist at one time."
    )
    recompute_granularity: Literal["full", "selective"] | None = Field(
        None, description="Recompute whole layers, or the attention core alone, in the backward."
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        None,
        description="With full: chunks of recompute_num_layers, or only the first recompute_num_layers of a stage.",
    )
    recompute_num_layers: int | None = Field(None, ge=1, description="With full: see recompute_method.")

    @model_validator(mode="after")
    def _step_agrees(self) -> TrainingOptions:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) is above lr ({self.lr})")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) is not a multiple of "
                f"micro_batch_size ({self.micro_batch_size})"
            )
        full = self.recompute_granularity == "full"
        if full != (self.recompute_method is not None) or full != (self.recompute_num_layers is not None):
            raise ValueError(
                "recompute_granularity: full goes with recompute_method and recompute_num_layers, and they with it"
            )
        return self


class ParallelOptions(_Options):
    """Parallelism."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="Ranks that share each weight matrix (TP).")
    pipeline_model_parallel_size: int = Field(1, ge=1, description="Ranks that share the layers (PP).")
    num_layers_per_virtual_pipeline_stage: int | None = Field(
        None, ge=1, description="Layers of one virtual stage of the interleaved pipeline schedule (VPP). Default: none."
    )
    context_parallel_size: int = Field(1, ge=1, description="Ranks that share each sequence (CP).")
    context_parallel_algo: ContextParallelAlgo = Field(
        "gathered",
        description="How their attention meets: all keys and values gathered (any device), MindSpeed's ring or "
        "MindSpeed's Ulysses (npu only).",
    )
    sequence_parallel: bool = Field(
        False, description="Divide the sequence over the tensor-parallel ranks outside of attention and MLP (SP)."
    )
    use_distributed_optimizer: bool = Field(
        False, description="Shard the optimizer state over the data-parallel ranks."
    )
    overlap_grad_reduce: bool = Field(
        False, description="Reduce gradients over the data-parallel ranks while the last backward still runs."
    )
    device: Literal["auto", "npu", "cuda", "cpu"] = Field(
        "auto", description="Where to run; auto takes the first found."
    )
    distributed_timeout_minutes: float = Field(10.0, gt=0, description="Minutes after which a lost rank ends the run.")

    @model_validator(mode="after")
    def _layout_agrees(self) -> ParallelOptions:
        if self.num_layers_per_virtual_pipeline_stage is not None and self.pipeline_model_parallel_size == 1:
            raise ValueError("num_layers_per_virtual_pipeline_stage needs pipeline_model_parallel_size of at least 2")
        if self.context_parallel_algo != "gathered" and self.device in ("cpu", "cuda"):
            raise ValueError(
                f"context_parallel_algo: {self.context_parallel_algo} runs on npu alone, and device is {self.device}: "
                "set context_parallel_algo: gathered"
            )
        return self


class OutputOptions(_Options):
    """Evaluation and output."""

    output_dir: str = Field("outputs/simpo", description="Folder that the run writes.")
    load: str | None = Field(
        None, description="Checkpoint to resume: a checkpoints folder (its newest is taken) or one iter_* folder."
    )
    save_interval: int = Field(0, ge=0, description="Steps between checkpoints; 0 saves none before the end.")
    save_total_limit: int | None = Field(None, ge=1, description="Newest checkpoints that are kept. Default: all.")
    log_interval: int = Field(1, ge=1, description="Steps between metrics lines.")
    eval_interval: int = Field(0, ge=0, description="Steps between evaluations; 0 evaluates at start and end only.")
    eval_iters: int | None = Field(
        None, ge=0, description="Global batches of one evaluation. Default: all held-out pairs; 0 means no evaluation."
    )
    export_hf: bool = Field(False, description="Write the trained model as a Hugging Face folder, output_dir/hf.")
    wandb_project: str | None = Field(None, description="Mirror the metrics to this Weights & Biases project.")
    swanlab_project: str | None = Field(None, description="Mirror the metrics to this SwanLab project.")


OPTION_GROUPS: tuple[type[_Options], ...] = (
    TaskOptions,
    ModelOptions,
    DataOptions,
    TrainingOptions,
    ParallelOptions,
    OutputOptions,
)
