"""The options, group by group: names, types, ranges and units of every key, and what the keys of one group agree on."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from mindspeed_simpo.objectives import DEFAULT_STAGE, OBJECTIVES, Keys, Objective

ContextParallelAlgo = Literal["gathered", "megatron_cp_algo", "ulysses_cp_algo"]
BatchingForm = Literal["padded", "packed", "prefix_shared"]
BatchingName = Literal["auto", BatchingForm]


Effect = Literal["result", "arithmetic", "layout", "none"]
"""What another value of an option changes: the result, compared with the oracle at the same value; how the same result
is computed (then ``config.supported`` must claim the value); how ranks are divided; nothing that is computed."""


def _option(default: Any = ..., *, effect: Effect, **facts: Any) -> Any:
    return Field(default, json_schema_extra={"effect": effect}, **facts)


def effect_of(field: FieldInfo) -> Effect:
    """What the option declares.

    Raises:
        TypeError: where it declares nothing.
    """
    extra = field.json_schema_extra
    effect = extra.get("effect") if isinstance(extra, dict) else None
    if effect not in get_args(Effect):
        raise TypeError(f"an option declares its effect, one of {', '.join(get_args(Effect))}; found {effect!r}")
    return effect  # type: ignore[return-value]


class _Options(BaseModel):
    """Refuses a field that does not declare its effect when the class is made."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for name, field in cls.model_fields.items():
            try:
                effect_of(field)
            except TypeError as error:
                raise TypeError(f"{cls.__name__}.{name}: {error}") from None

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


class _TaskOptions(_Options):
    """What the keys of the objectives have to agree on; their fields come from the registry, below."""

    if TYPE_CHECKING:
        stage: str
        pref_ftx: float
        ref_model: str | None

    @model_validator(mode="after")
    def _objective_agrees(self) -> _TaskOptions:
        for objective in OBJECTIVES.values():
            self.keys_of(objective)
        if self.ref_model is not None and not self.objective.needs_reference:
            others = ", ".join(name for name, objective in OBJECTIVES.items() if objective.needs_reference)
            raise ValueError(
                f"ref_model: {self.objective.title} has no reference model: remove ref_model, or set stage to one of "
                f"{others}"
            )
        return self

    @property
    def objective(self) -> Objective:
        """What ``stage`` names."""
        return OBJECTIVES[self.stage]

    def keys_of(self, objective: Objective) -> Keys:
        """The values of one objective's keys.

        Raises:
            ValueError: where they do not agree.
        """
        try:
            return objective.keys(**{name: getattr(self, name) for name in objective.keys.model_fields})
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _task_fields() -> dict[str, Any]:
    fields: dict[str, Any] = {
        "stage": (
            Literal[tuple(OBJECTIVES)],
            _option(DEFAULT_STAGE, effect="result", description="Preference objective."),
        )
    }
    for objective in OBJECTIVES.values():
        for name, key in objective.keys.model_fields.items():
            assert name not in fields, f"{objective.stage} and another objective both declare the key {name}"
            field = copy.copy(key)
            field.json_schema_extra = {"effect": "result"}
            fields[name] = (key.annotation, field)
    weight = "Weight of the supervised term, minus the mean chosen log-probability per token."
    reference = "Reference model: HF folder or hub id. Default: the weights that training starts from."
    return fields | {
        "pref_ftx": (float, _option(0.0, effect="result", ge=0, description=weight)),
        "ref_model": (str | None, _option(None, effect="result", description=reference)),
    }


if TYPE_CHECKING:

    class TaskOptions(_TaskOptions):
        """Objective."""

else:
    TaskOptions = create_model("TaskOptions", __base__=_TaskOptions, __doc__="Objective.", **_task_fields())


class ModelOptions(_Options):
    """Model."""

    model_name_or_path: str = _option(effect="result", description="Hugging Face model: a local folder or a hub id.")
    init_from: Literal["weights", "config"] = _option(
        "weights",
        effect="result",
        description="Start from the model's weights, or from random ones of its config.json's shape.",
    )
    chat_template: str | None = _option(
        None,
        effect="result",
        description="Jinja file that renders conversations, in place of the tokenizer's own template.",
    )


class DataOptions(_Options):
    """Data."""

    data_path: str | list[str] = _option(
        effect="result", description="Training pairs: a file, a folder, a hub id, or a list of them."
    )
    eval_data_path: str | list[str] | None = _option(
        None, effect="result", description="Held-out pairs, in the same forms."
    )
    split: str = _option(
        "100,0",
        effect="result",
        description="Weights of the train and eval parts of data_path, in row order, such as 95,5 or 969,30,1.",
    )
    map_keys: dict[str, str | dict[str, str]] | None = _option(
        None,
        effect="result",
        description="Column names of the data: {canonical name: your column}, as MindSpeed-LLM's --map-keys.",
    )
    seq_length: int = _option(
        2048, ge=8, effect="result", description="Longest sequence (prompt and response), tokens."
    )
    max_prompt_length: int | None = _option(
        None,
        ge=1,
        effect="result",
        description="Where truncation stops cutting the prompt, tokens. Default: half of seq_length.",
    )
    truncation: Literal["error", "drop", "keep_end", "keep_start"] = _option(
        "error",
        effect="result",
        description="A pair longer than seq_length: refuse, leave out, or keep that end of its prompt.",
    )
    data_errors: Literal["fail", "drop"] = _option(
        "fail", effect="result", description="Malformed, empty or identical pairs: refuse, or leave out and count."
    )
    data_cache_dir: str | None = _option(
        None,
        effect="none",
        description="Folder of tokenised data and reference log-probabilities. Default: ~/.cache/mindspeed_simpo.",
    )
    num_workers: int = _option(
        0, ge=0, le=256, effect="none", description="Processes that tokenise; 0 means one per core."
    )

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

    micro_batch_size: int = _option(
        1,
        ge=1,
        effect="arithmetic",
        description="Padded: pairs of one forward and backward on one rank; packed rows have a budget.",
    )
    global_batch_size: int = _option(
        128, ge=1, effect="result", description="Pairs of one optimizer step, over all ranks."
    )
    batching: BatchingName = _option(
        "auto",
        effect="arithmetic",
        description="Sequences in rows of one length; end to end without padding; or that with each prompt once for "
        "chosen and rejected. The gradients are the same. auto: the last of these that the layout allows.",
    )
    max_tokens_per_micro_batch: int | None = _option(
        None,
        ge=1,
        effect="arithmetic",
        description="With packed and prefix_shared: tokens up to which pairs fill a micro-batch; a pair with more has "
        "its own. Default: 2 x seq_length, which the longest pair needs.",
    )
    train_iters: int | None = _option(
        None, ge=0, effect="result", description="Optimizer steps. Default: one pass over the data."
    )
    lr: float = _option(1e-6, gt=0, effect="result", description="Peak learning rate.")
    min_lr: float = _option(0.0, ge=0, effect="result", description="Learning rate at the end of the decay.")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = _option(
        "cosine", effect="result", description="Shape of the decay after warm-up."
    )
    lr_warmup_fraction: float = _option(
        0.1, ge=0, lt=1, effect="result", description="Fraction of train_iters that warms up linearly."
    )
    weight_decay: float = _option(
        0.0, ge=0, effect="result", description="Decoupled weight decay; norms and biases are exempt."
    )
    clip_grad: float = _option(
        1.0, ge=0, effect="result", description="Largest global gradient L2 norm; 0 means no clipping."
    )
    adam_beta1: float = _option(0.9, ge=0, lt=1, effect="result", description="Adam's decay of the first moment.")
    adam_beta2: float = _option(0.95, ge=0, lt=1, effect="result", description="Adam's decay of the second moment.")
    adam_eps: float = _option(1e-8, gt=0, effect="result", description="Adam's epsilon.")
    seed: int = _option(
        42, ge=1, lt=2**31, effect="result", description="Seed of the data order, the initialisation and dropout."
    )
    bf16: bool = _option(
        False, effect="result", description="Compute in bfloat16 with fp32 main parameters and gradients."
    )
    pair_schedule: Literal["concat", "split", "two_pass"] = _option(
        "concat",
        effect="arithmetic",
        description="Chosen and rejected in one forward; in two forwards and one backward; or one after the other, "
        "with half the stored activations for one more forward of the rejected. The gradients are the same.",
    )
    fused_logprob: bool = _option(
        True,
        effect="arithmetic",
        description="Head and log-probability by chunks of tokens: logits are never stored, but computed twice.",
    )
    logprob_chunk_tokens: int = _option(
        512,
        ge=1,
        effect="arithmetic",
        description="With fused_logprob: response tokens whose logits exist at one time.",
    )
    recompute_granularity: Literal["full", "selective"] | None = _option(
        None, effect="arithmetic", description="Recompute whole layers, or the attention core alone, in the backward."
    )
    recompute_method: Literal["uniform", "block"] | None = _option(
        None,
        effect="arithmetic",
        description="With full: chunks of recompute_num_layers, or only the first recompute_num_layers of a stage.",
    )
    recompute_num_layers: int | None = _option(
        None, ge=1, effect="arithmetic", description="With full: see recompute_method."
    )

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

    tensor_model_parallel_size: int = _option(
        1, ge=1, effect="layout", description="Ranks that share each weight matrix (TP)."
    )
    pipeline_model_parallel_size: int = _option(
        1, ge=1, effect="layout", description="Ranks that share the layers (PP)."
    )
    num_layers_per_virtual_pipeline_stage: int | None = _option(
        None,
        ge=1,
        effect="layout",
        description="Layers of one virtual stage of the interleaved pipeline schedule (VPP). Default: none.",
    )
    context_parallel_size: int = _option(1, ge=1, effect="layout", description="Ranks that share each sequence (CP).")
    context_parallel_algo: ContextParallelAlgo = _option(
        "gathered",
        effect="arithmetic",
        description="How their attention meets: all keys and values gathered (any device), MindSpeed's ring or "
        "MindSpeed's Ulysses (npu only).",
    )
    sequence_parallel: bool = _option(
        False,
        effect="layout",
        description="Divide the sequence over the tensor-parallel ranks outside of attention and MLP (SP).",
    )
    use_distributed_optimizer: bool = _option(
        False, effect="layout", description="Shard the optimizer state over the data-parallel ranks."
    )
    overlap_grad_reduce: bool = _option(
        False,
        effect="arithmetic",
        description="Reduce gradients over the data-parallel ranks while the last backward still runs.",
    )
    device: Literal["auto", "npu", "cuda", "cpu"] = _option(
        "auto", effect="arithmetic", description="Where to run; auto takes the first found."
    )
    distributed_timeout_minutes: float = _option(
        10.0, gt=0, effect="none", description="Minutes after which a lost rank ends the run."
    )

    @model_validator(mode="after")
    def _stages_agree(self) -> ParallelOptions:
        if self.num_layers_per_virtual_pipeline_stage is not None and self.pipeline_model_parallel_size == 1:
            raise ValueError("num_layers_per_virtual_pipeline_stage needs pipeline_model_parallel_size of at least 2")
        return self


class OutputOptions(_Options):
    """Evaluation and output."""

    output_dir: str = _option("outputs/simpo", effect="none", description="Folder that the run writes.")
    load: str | None = _option(
        None,
        effect="none",
        description="Checkpoint to resume: a checkpoints folder (its newest is taken) or one iter_* folder.",
    )
    save_interval: int = _option(
        0, ge=0, effect="none", description="Steps between checkpoints; 0 saves none before the end."
    )
    save_total_limit: int | None = _option(
        None, ge=1, effect="none", description="Newest checkpoints that are kept. Default: all."
    )
    log_interval: int = _option(1, ge=1, effect="none", description="Steps between metrics lines.")
    eval_interval: int = _option(
        0, ge=0, effect="none", description="Steps between evaluations; 0 evaluates at start and end only."
    )
    eval_iters: int | None = _option(
        None,
        ge=0,
        effect="none",
        description="Global batches of one evaluation. Default: all held-out pairs; 0 means no evaluation.",
    )
    export_hf: bool = _option(
        False, effect="none", description="Write the trained model as a Hugging Face folder, output_dir/hf."
    )
    wandb_project: str | None = _option(
        None, effect="none", description="Mirror the metrics to this Weights & Biases project."
    )
    swanlab_project: str | None = _option(
        None, effect="none", description="Mirror the metrics to this SwanLab project."
    )


OPTION_GROUPS: tuple[type[_Options], ...] = (
    TaskOptions,
    ModelOptions,
    DataOptions,
    TrainingOptions,
    ParallelOptions,
    OutputOptions,
)
