"""The options, group by group: name, type, default, range, unit and help of every key, and the checks of each group."""

from __future__ import annotations

import copy
import json
import math
import re
from datetime import date
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
DEFAULT_TEMPLATE_DATE = "2024-07-26"
CPU_CHUNK_TOKENS = 512

Effect = Literal["result", "arithmetic", "layout", "none"]
"""What a change of the option's value affects.

``result``: the result of training, by definition. ``arithmetic``: the operations that compute the same result;
``config.supported`` must claim each value. ``layout``: the division of the work over ranks. ``none``: nothing that
training computes."""


def _option(default: Any = ..., *, effect: Effect, **facts: Any) -> Any:
    return Field(default, json_schema_extra={"effect": effect}, **facts)


def effect_of(field: FieldInfo) -> Effect:
    """The declared effect of an option.

    Raises:
        TypeError: where the option declares no effect or an unknown one.
    """
    extra = field.json_schema_extra
    effect = extra.get("effect") if isinstance(extra, dict) else None
    if effect not in get_args(Effect):
        raise TypeError(f"an option must declare its effect, one of {', '.join(get_args(Effect))}; found {effect!r}")
    return effect  # type: ignore[return-value]


def takes_bool(field: FieldInfo) -> bool:
    """Whether an option's values are true and false."""
    return bool in (field.annotation, *get_args(field.annotation))


class _Options(BaseModel):
    """Base of the option groups; creating a subclass raises TypeError where a field declares no effect."""

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
        if isinstance(value, bool) and not takes_bool(cls.model_fields[str(info.field_name)]):
            raise ValueError("expected a value, not true or false")
        return value


class _TaskOptions(_Options):
    """Checks of the objectives' keys; :func:`_task_fields` adds the keys from the registry of objectives."""

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
        """The objective that ``stage`` selects."""
        return OBJECTIVES[self.stage]

    def keys_of(self, objective: Objective) -> Keys:
        """The values of one objective's keys.

        Raises:
            ValueError: where the values contradict each other.
        """
        try:
            return objective.keys(**{name: getattr(self, name) for name in objective.keys.model_fields})
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _task_fields() -> dict[str, Any]:
    fields: dict[str, Any] = {
        "stage": (
            Literal[tuple(OBJECTIVES)],
            _option(DEFAULT_STAGE, effect="result", description="Preference objective to train with."),
        )
    }
    for objective in OBJECTIVES.values():
        for name, key in objective.keys.model_fields.items():
            assert name not in fields, f"{objective.stage} and another objective both declare the key {name}"
            field = copy.copy(key)
            field.json_schema_extra = {"effect": "result"}
            fields[name] = (key.annotation, field)
    weight = (
        "Weight of the supervised (SFT) term that is added to the loss: the negative log-likelihood of the chosen "
        "response, nats per token. 0 adds none."
    )
    reference = (
        "Frozen reference model of objectives that need one: a Hugging Face folder or hub id. Default: the weights "
        "that "
        "training starts from."
    )
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

    model_name_or_path: str = _option(
        effect="result", description="Hugging Face model to train, with its tokenizer: a local folder or a hub id."
    )
    init_from: Literal["weights", "config"] = _option(
        "weights",
        effect="result",
        description="Initial weights: those of the model, or random ones in the shape that its config.json gives.",
    )
    chat_template: str | None = _option(
        None,
        effect="result",
        description="Jinja file of a chat template that replaces the tokenizer's own.",
    )


class AdapterOptions(_Options):
    """Adapters (LoRA)."""

    lora_r: int = _option(
        0,
        ge=0,
        effect="result",
        description="Rank of the adapters (LoRA) of the projections; with a rank, only the adapters are trained, and "
        "the model's own weights are frozen. 0 trains all weights, without adapters.",
    )
    lora_alpha: float | None = _option(
        None,
        gt=0,
        effect="result",
        description="Scale of the adapters: their product is multiplied by lora_alpha / lora_r. Default: 2 x lora_r.",
    )
    lora_dropout: float = _option(
        0.0,
        ge=0,
        lt=1,
        effect="result",
        description="Dropout of the adapters' inputs. Only 0 is supported: no mask is the same for a prompt that two "
        "responses share and for its two copies, so the result would depend on batching and layout.",
    )
    lora_target_modules: str | list[str] = _option(
        "all-linear",
        effect="result",
        description="Projections that have adapters, by their Hugging Face names as in peft, such as q_proj v_proj; "
        "all-linear for every projection of every layer.",
    )
    lora_load: str | None = _option(
        None,
        effect="result",
        description="Adapters to start from: a folder that peft or `export` wrote, of the same rank and modules. "
        "Default: new adapters, whose product is zero.",
    )

    @field_validator("lora_target_modules")
    @classmethod
    def _modules_are_given(cls, value: str | list[str]) -> str | list[str]:
        if not all([value] if isinstance(value, str) else value or [""]):
            raise ValueError("expected all-linear, or a list of at least one name, such as q_proj")
        return value

    @model_validator(mode="after")
    def _adapters_agree(self) -> AdapterOptions:
        without_rank = [
            name
            for name, field in AdapterOptions.model_fields.items()
            if name != "lora_r" and getattr(self, name) != field.default
        ]
        if not self.lora_r and without_rank:
            raise ValueError(
                f"{', '.join(without_rank)}: there are no adapters without a rank: set lora_r, such as 16, or remove "
                f"{'it' if len(without_rank) == 1 else 'them'}"
            )
        if self.lora_dropout:
            raise ValueError(
                f"lora_dropout ({self.lora_dropout}) is not supported: a prompt that two responses share would have "
                "one mask and its two copies would have two, so that the result would depend on batching and layout: "
                "set lora_dropout: 0"
            )
        return self

    @property
    def lora_alpha_in_use(self) -> float:
        """``lora_alpha`` with its default."""
        return 2.0 * self.lora_r if self.lora_alpha is None else self.lora_alpha


class DataOptions(_Options):
    """Data."""

    data_path: str | list[str] | None = _option(
        None,
        effect="result",
        description="Training pairs: a file, a folder, a hub id, or a list of these. `evaluate` with eval_data_path "
        "needs none.",
    )
    eval_data_path: str | list[str] | None = _option(
        None,
        effect="result",
        description="Evaluation pairs, in the same forms as data_path. Default: the eval part of split, if any.",
    )
    split: str = _option(
        "100,0",
        effect="result",
        description="Relative sizes of the train and eval parts of data_path, in the order of the data, such as "
        "95,5; a "
        "third part, as in 969,30,1, is not used.",
    )
    map_keys: dict[str, str | dict[str, str]] | None = _option(
        None,
        effect="result",
        description="Column names of the data: {canonical name: column}, as in MindSpeed-LLM's --map-keys.",
    )
    chat_template_kwargs: dict[str, Any] | None = _option(
        None,
        effect="result",
        description="Variables for the chat template, such as {enable_thinking: false}; the template must read them.",
    )
    chat_template_date: str = _option(
        DEFAULT_TEMPLATE_DATE,
        effect="result",
        description="Day, YYYY-MM-DD, that a chat template which prints today's date takes for today.",
    )
    seq_length: int = _option(
        2048, ge=8, effect="result", description="Largest length of a sequence (prompt and one response), tokens."
    )
    max_prompt_length: int | None = _option(
        None,
        ge=1,
        effect="result",
        description="Length below which truncation does not cut a prompt, tokens. Default: half of seq_length.",
    )
    truncation: Literal["error", "drop", "keep_end", "keep_start"] = _option(
        "error",
        effect="result",
        description="Pairs longer than seq_length: error ends the run, drop leaves them out, keep_end and "
        "keep_start cut the "
        "prompt and keep its end or its start.",
    )
    data_errors: Literal["fail", "drop"] = _option(
        "fail",
        effect="result",
        description="Malformed examples, empty responses and identical responses: fail ends the run, drop leaves these "
        "examples out and reports their number.",
    )
    data_cache_dir: str | None = _option(
        None,
        effect="none",
        description="Folder for cached token ids and reference log-probabilities. Default: ~/.cache/mindspeed_simpo.",
    )
    num_workers: int = _option(
        0, ge=0, le=256, effect="none", description="Worker processes for tokenisation; 0 means one per CPU core."
    )

    @field_validator("split")
    @classmethod
    def _split_is_weights(cls, value: str) -> str:
        try:
            weights = [float(part) for part in value.split(",")]
        except ValueError:
            raise ValueError("expected two or three comma-separated weights, such as 95,5") from None
        if not math.isfinite(sum(weights)):
            raise ValueError("expected two or three finite weights, such as 95,5")
        if not 1 <= len(weights) <= 3 or min(weights) < 0 or weights[0] <= 0:
            raise ValueError("expected two or three weights of at least 0, the first above 0, such as 95,5")
        return value

    @field_validator("chat_template_date")
    @classmethod
    def _is_a_day(cls, value: str) -> str:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", value) is None:
            raise ValueError("expected a day as YYYY-MM-DD")
        try:
            date.fromisoformat(value)
        except ValueError as error:
            raise ValueError(f"expected a day as YYYY-MM-DD; {error}") from None
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _is_plain(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected values that JSON has (texts, numbers, true, false, lists); {error}") from None
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
        description="Pairs per micro-batch on one data-parallel rank with batching: padded; packed and "
        "prefix_shared fill "
        "micro-batches up to max_tokens_per_micro_batch instead.",
    )
    global_batch_size: int = _option(
        128, ge=1, le=1_000_000, effect="result", description="Pairs per optimizer step, over all ranks."
    )
    batching: BatchingName = _option(
        "auto",
        effect="arithmetic",
        description="How sequences form a micro-batch. padded: one row each, padded to one length; packed: "
        "concatenated in "
        "one row without padding; prefix_shared: packed, with each prompt once for chosen and rejected. The "
        "gradients are "
        "the same. auto: prefix_shared, packed or padded, the first that model and layout support.",
    )
    max_tokens_per_micro_batch: int | None = _option(
        None,
        ge=1,
        effect="arithmetic",
        description="With batching: packed or prefix_shared, the number of tokens up to which a micro-batch is "
        "filled with "
        "pairs; a larger pair forms its own micro-batch. Default: 2 x seq_length, the size of the longest pair.",
    )
    train_iters: int | None = _option(
        None,
        ge=0,
        effect="result",
        description="Number of optimizer steps. Default: num_train_epochs passes over the training data.",
    )
    num_train_epochs: int | None = _option(
        None,
        ge=1,
        effect="result",
        description="Passes over the training data, instead of train_iters. The last batch of a pass may have fewer "
        "pairs; its loss is the mean over them. Default: 1.",
    )
    lr: float = _option(1e-6, gt=0, effect="result", description="Peak learning rate.")
    min_lr: float = _option(
        0.0, ge=0, effect="result", description="Learning rate at the end of the decay; at most lr."
    )
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = _option(
        "cosine", effect="result", description="Shape of the learning-rate decay after warm-up."
    )
    lr_warmup_fraction: float = _option(
        0.1, ge=0, lt=1, effect="result", description="Fraction of train_iters with linear learning-rate warm-up."
    )
    weight_decay: float = _option(
        0.0, ge=0, effect="result", description="Decoupled weight decay (AdamW); norm weights and biases are exempt."
    )
    clip_grad: float = _option(
        1.0,
        ge=0,
        effect="result",
        description="Largest L2 norm of the global gradient, above which it is scaled down; 0 means no clipping.",
    )
    adam_beta1: float = _option(0.9, ge=0, lt=1, effect="result", description="Adam's decay rate of the first moment.")
    adam_beta2: float = _option(
        0.95, ge=0, lt=1, effect="result", description="Adam's decay rate of the second moment."
    )
    adam_eps: float = _option(
        1e-8, gt=0, effect="result", description="Adam's epsilon, added to the square root of the second moment."
    )
    seed: int = _option(
        42, ge=1, lt=2**31, effect="result", description="Seed of the data order and of random initial weights."
    )
    bf16: bool | None = _option(
        None,
        effect="result",
        description="Compute in bfloat16, with main parameters, gradients and optimizer state in fp32. Default: true "
        "on npu and cuda, false on cpu.",
    )
    pair_schedule: Literal["concat", "split", "two_pass"] = _option(
        "concat",
        effect="arithmetic",
        description="How chosen and rejected pass through the model. concat: one forward and one backward; split: two "
        "forwards and one backward; two_pass: one after the other, with half of the stored activations and one more "
        "forward of the rejected. The gradients are the same.",
    )
    fused_logprob: bool = _option(
        True,
        effect="arithmetic",
        description="Compute output layer and log-probabilities in chunks of tokens: the logits are not stored, and "
        "the "
        "backward computes them again.",
    )
    logprob_chunk_tokens: int | None = _option(
        None,
        ge=1,
        effect="arithmetic",
        description="With fused_logprob, response tokens per chunk, whose logits are in memory at the same time. "
        "Default: 512 on cpu; on npu and cuda 4096, or as many as have fp32 logits of 1 GiB on a rank.",
    )
    recompute_granularity: Literal["full", "selective"] | None = _option(
        None,
        effect="arithmetic",
        description="Activation recomputation in the backward: full for whole layers, selective for the attention "
        "core. "
        "Default: none.",
    )
    recompute_method: Literal["uniform", "block"] | None = _option(
        None,
        effect="arithmetic",
        description="With recompute_granularity: full. uniform recomputes all layers, in blocks of "
        "recompute_num_layers; block "
        "recomputes only the first recompute_num_layers layers of each pipeline rank.",
    )
    recompute_num_layers: int | None = _option(
        None,
        ge=1,
        effect="arithmetic",
        description="With recompute_granularity: full, a number of layers; see recompute_method.",
    )

    @property
    def bf16_in_use(self) -> bool:
        """``bf16``; before :func:`~mindspeed_simpo.config.resolution.resolve` its default is that of CPUs."""
        return bool(self.bf16)

    @property
    def chunk_tokens_in_use(self) -> int:
        """``logprob_chunk_tokens``; before :func:`~mindspeed_simpo.config.resolution.resolve` as on CPUs."""
        return CPU_CHUNK_TOKENS if self.logprob_chunk_tokens is None else self.logprob_chunk_tokens

    @model_validator(mode="after")
    def _step_agrees(self) -> TrainingOptions:
        if self.train_iters is not None and self.num_train_epochs is not None:
            raise ValueError(
                f"train_iters ({self.train_iters}) and num_train_epochs ({self.num_train_epochs}) both say how long to "
                "train: remove one of them"
            )
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
        1, ge=1, effect="layout", description="Ranks over which each weight matrix is sharded (TP)."
    )
    pipeline_model_parallel_size: int = _option(
        1, ge=1, effect="layout", description="Ranks over which the layers are divided (PP)."
    )
    num_layers_per_virtual_pipeline_stage: int | None = _option(
        None,
        ge=1,
        effect="layout",
        description="Layers per model chunk of the interleaved pipeline schedule (VPP). Default: the schedule without "
        "interleaving.",
    )
    context_parallel_size: int = _option(
        1, ge=1, effect="layout", description="Ranks over which each sequence is sharded (CP)."
    )
    context_parallel_algo: ContextParallelAlgo = _option(
        "gathered",
        effect="arithmetic",
        description="Attention over context-parallel ranks. gathered: all-gather of keys and values, on any device; "
        "megatron_cp_algo: MindSpeed's ring attention, npu only; ulysses_cp_algo: MindSpeed's Ulysses, npu only.",
    )
    sequence_parallel: bool = _option(
        False,
        effect="layout",
        description="Shard the activations outside of attention and MLP along the sequence over the tensor-parallel "
        "ranks (SP).",
    )
    use_distributed_optimizer: bool = _option(
        False, effect="layout", description="Shard the optimizer state over the data-parallel ranks (ZeRO-1)."
    )
    expert_model_parallel_size: int = _option(
        1,
        ge=1,
        effect="layout",
        description="Ranks over which the experts of each layer are divided (EP), among the ranks of tensor, context "
        "and data parallelism.",
    )
    expert_tensor_parallel_size: int | None = _option(
        None,
        ge=1,
        effect="layout",
        description="Ranks over which each expert's weights are sharded (ETP). Default: tensor_model_parallel_size.",
    )
    overlap_grad_reduce: bool = _option(
        False,
        effect="arithmetic",
        description="Overlap the gradient reduction over the data-parallel ranks with the last backward of a step.",
    )
    device: Literal["auto", "npu", "cuda", "cpu"] = _option(
        "auto", effect="arithmetic", description="Device to run on; auto takes the first found of npu, cuda and cpu."
    )
    distributed_timeout_minutes: float = _option(
        10.0,
        gt=0,
        effect="none",
        description="Timeout of a collective, minutes, after which a run with a lost rank ends.",
    )

    @model_validator(mode="after")
    def _virtual_pipeline_needs_pipeline(self) -> ParallelOptions:
        if self.num_layers_per_virtual_pipeline_stage is not None and self.pipeline_model_parallel_size == 1:
            raise ValueError("num_layers_per_virtual_pipeline_stage needs pipeline_model_parallel_size of at least 2")
        return self


class OutputOptions(_Options):
    """Evaluation and output."""

    output_dir: str = _option("outputs/simpo", effect="none", description="Folder for everything that the run writes.")
    load: str | None = _option(
        None,
        effect="none",
        description="Checkpoint to resume from: a checkpoints folder (the newest checkpoint) or one iter_* folder; "
        "auto: the newest whole checkpoint of output_dir, or a run from the start where there is none. Default: a run "
        "from the start.",
    )
    save_interval: int = _option(
        0, ge=0, effect="none", description="Optimizer steps between checkpoints; 0 saves only at the end."
    )
    save_total_limit: int | None = _option(
        None, ge=1, effect="none", description="Number of checkpoints that are kept, the newest ones. Default: all."
    )
    async_save: bool = _option(
        False,
        effect="none",
        description="Write checkpoints in the background: training goes on as soon as each rank has copied its shard "
        "to host memory.",
    )
    log_interval: int = _option(1, ge=1, effect="none", description="Optimizer steps between lines of metrics.")
    eval_interval: int = _option(
        0,
        ge=0,
        effect="none",
        description="Optimizer steps between evaluations; 0 evaluates only before the first and after the last step.",
    )
    eval_iters: int | None = _option(
        None,
        ge=0,
        effect="none",
        description="Largest number of global batches per evaluation; 0 means no evaluation. Default: all "
        "evaluation pairs.",
    )
    export_hf: bool = _option(
        False,
        effect="none",
        description="Write the trained model to output_dir/hf as a Hugging Face folder at the end.",
    )
    wandb_project: str | None = _option(
        None, effect="none", description="Weights & Biases project that also receives the metrics. Default: none."
    )
    swanlab_project: str | None = _option(
        None, effect="none", description="SwanLab project that also receives the metrics. Default: none."
    )


OPTION_GROUPS: tuple[type[_Options], ...] = (
    TaskOptions,
    ModelOptions,
    AdapterOptions,
    DataOptions,
    TrainingOptions,
    ParallelOptions,
    OutputOptions,
)
