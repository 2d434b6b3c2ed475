"""Every option of the toolkit: one flat key space, validated before anything heavy is imported.

A YAML key ``simpo_beta`` is the flag ``--simpo-beta``. Names are Megatron's and MindSpeed-LLM's wherever they have one.
The option groups below are only for reading and for ``--help``; :class:`Config` holds all keys side by side.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from mindspeed_simpo import claims
from mindspeed_simpo.errors import ConfigError

ContextParallelAlgo = Literal["gathered", "megatron_cp_algo", "ulysses_cp_algo"]
BatchingName = Literal["padded", "packed", "prefix_shared"]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _no_path_has_a_null(cls, value: Any) -> Any:
        if "\0" in str(value):
            raise ValueError("expected a text without null characters")
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


class TrainingOptions(_Options):
    """Training."""

    micro_batch_size: int = Field(
        1, ge=1, description="Pairs of one forward and backward on one data-parallel rank; packed rows have a budget."
    )
    global_batch_size: int = Field(128, ge=1, description="Pairs of one optimizer step, over all ranks.")
    batching: BatchingName = Field(
        "padded",
        description="Sequences in rows of one length; end to end without padding; or that with each prompt once for "
        "chosen and rejected. The gradients are the same.",
    )
    max_tokens_per_micro_batch: int | None = Field(
        None,
        ge=1,
        description="With packed and prefix_shared: tokens up to which pairs fill a micro-batch; a pair with more has "
        "its own. Default: 2 x micro_batch_size x seq_length.",
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
        False, description="Head and log-probability by chunks of tokens: logits are never stored, but computed twice."
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


class Config(TaskOptions, ModelOptions, DataOptions, TrainingOptions, ParallelOptions, OutputOptions):
    """All options, side by side; what no single key can tell is checked here."""

    @field_validator("*", mode="before")
    @classmethod
    def _flags_are_not_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("expected a value, not true or false")
        return value

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
    def _keys_agree(self) -> Config:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.seq_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below seq_length ({self.seq_length}): "
                "the response needs room"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) is above lr ({self.lr})")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) is not a multiple of "
                f"micro_batch_size ({self.micro_batch_size})"
            )
        if self.max_tokens_per_micro_batch is not None and self.batching == "padded":
            raise ValueError(
                "max_tokens_per_micro_batch needs batching: packed or prefix_shared; padded micro-batches hold "
                "micro_batch_size pairs"
            )
        if self.stage == "simpo" and self.ref_model is not None:
            raise ValueError("ref_model is DPO's; SimPO has no reference model: remove it or set stage: dpo")
        if self.simpo_label_smoothing and self.simpo_loss_type != "sigmoid":
            raise ValueError("simpo_label_smoothing needs simpo_loss_type: sigmoid")
        if self.dpo_label_smoothing and self.dpo_loss_type != "sigmoid":
            raise ValueError("dpo_label_smoothing needs dpo_loss_type: sigmoid")
        if self.num_layers_per_virtual_pipeline_stage is not None and self.pipeline_model_parallel_size == 1:
            raise ValueError("num_layers_per_virtual_pipeline_stage needs pipeline_model_parallel_size of at least 2")
        if self.context_parallel_algo != "gathered" and self.device in ("cpu", "cuda"):
            raise ValueError(
                f"context_parallel_algo: {self.context_parallel_algo} runs on npu alone, and device is {self.device}: "
                "set context_parallel_algo: gathered"
            )
        full = self.recompute_granularity == "full"
        if full != (self.recompute_method is not None) or full != (self.recompute_num_layers is not None):
            raise ValueError(
                "recompute_granularity: full goes with recompute_method and recompute_num_layers, and they with it"
            )
        return self

    @property
    def prompt_limit(self) -> int:
        """``max_prompt_length`` with its default, tokens."""
        return self.max_prompt_length if self.max_prompt_length is not None else self.seq_length // 2

    @property
    def token_budget(self) -> int:
        """``max_tokens_per_micro_batch`` with its default: ``micro_batch_size`` pairs of the longest sequences."""
        if self.max_tokens_per_micro_batch is not None:
            return self.max_tokens_per_micro_batch
        return 2 * self.micro_batch_size * self.seq_length

    def virtual_stages(self, num_layers: int) -> int | None:
        """Virtual stages of each pipeline stage of a model with ``num_layers`` layers; None where stages are whole."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return None
        return num_layers // (self.pipeline_model_parallel_size * self.num_layers_per_virtual_pipeline_stage)

    @property
    def sequence_multiple(self) -> int:
        """What the padded length of a sequence must be a multiple of, so that every rank gets equal parts."""
        tensor = self.tensor_model_parallel_size if self.sequence_parallel else 1
        context = 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1
        return tensor * context

    def layout(self, world_size: int) -> Layout:
        """Divide ``world_size`` ranks into the configured axes.

        Raises:
            ConfigError: where the layout does not fill the ranks, the global batch does not divide, or the parity
                matrix does not have the combination.
        """
        tensor, pipeline = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        context = self.context_parallel_size
        model_ranks = tensor * pipeline * context
        if world_size % model_ranks:
            raise ConfigError(
                f"{world_size} ranks cannot hold tensor_model_parallel_size {tensor} x pipeline_model_parallel_size "
                f"{pipeline} x context_parallel_size {context} = {model_ranks}: "
                f"start a multiple of {model_ranks} ranks (--nproc-per-node), or change the sizes"
            )
        data_parallel_size = world_size // model_ranks
        pairs_at_once = data_parallel_size * self.micro_batch_size
        if self.global_batch_size % pairs_at_once:
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} is not a multiple of {pairs_at_once} = "
                f"{data_parallel_size} data-parallel ranks x micro_batch_size {self.micro_batch_size}"
            )
        num_microbatches = self.global_batch_size // pairs_at_once
        if self.num_layers_per_virtual_pipeline_stage is not None and num_microbatches % pipeline:
            raise ConfigError(
                f"num_layers_per_virtual_pipeline_stage: the interleaved schedule needs a multiple of "
                f"pipeline_model_parallel_size {pipeline} micro-batches, found {num_microbatches} = global_batch_size "
                f"{self.global_batch_size} / ({data_parallel_size} data-parallel ranks x micro_batch_size "
                f"{self.micro_batch_size})"
            )
        self._refuse_what_is_not_claimed(data_parallel_size)
        return Layout(
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            data=data_parallel_size,
            num_microbatches=num_microbatches,
        )

    def _refuse_what_is_not_claimed(self, data_parallel_size: int) -> None:
        topology = claims.Topology(
            tensor=self.tensor_model_parallel_size,
            context=self.context_parallel_size,
            pipeline=self.pipeline_model_parallel_size,
            data=data_parallel_size,
            sequence_parallel=self.sequence_parallel,
            virtual_stages=self.num_layers_per_virtual_pipeline_stage is not None,
            distributed_optimizer=self.use_distributed_optimizer,
        )
        values = {option.key: getattr(self, option.key) for option in claims.OPTIONS}
        fields = type(self).model_fields
        refused = claims.refusal(
            topology, {key: value for key, value in values.items() if value != fields[key].default}
        )
        if refused is not None:
            raise ConfigError(refused)


class Layout(BaseModel):
    """Degrees of each parallel axis; their product is the number of ranks."""

    model_config = ConfigDict(frozen=True)

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    num_microbatches: int = 1


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a YAML file, lay ``overrides`` (from flags) over it and validate the whole.

    Raises:
        ConfigError: one message that names the file, every bad key, what was found and what was expected.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        # a value that YAML allows and Python does not: a 13th month, too many digits, lists in lists without end
        raise ConfigError(f"{path}: not a readable value: {str(error).splitlines()[0]}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(raw).__name__}")
    overrides = overrides or {}
    return validate(raw | overrides, where=str(path), flags=overrides)


def validate(values: dict[str, Any], where: str, flags: Iterable[str] = ()) -> Config:
    """Build a :class:`Config` from plain values; ``where`` starts the message of a key that no flag has set.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    try:
        return Config(**values)
    except ValidationError as error:
        lines = [_explain(item, where, set(flags)) for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


_OTHER_NAMES = {
    "beta": "simpo_beta",
    "gamma": "gamma_beta_ratio",
    "simpo_gamma": "gamma_beta_ratio",
    "cpo_alpha": "pref_ftx",
    "label_smoothing": "simpo_label_smoothing",
    "loss_type": "simpo_loss_type",
    "learning_rate": "lr",
    "max_length": "seq_length",
    "max_steps": "train_iters",
    "packing": "batching",
    "train_file": "data_path",
    "per_device_train_batch_size": "micro_batch_size",
}
"""What other trainers call a key."""


class _StrictLoader(yaml.SafeLoader):
    """YAML without aliases, which can blow a few lines up to gigabytes, or twice the same key, of which one is lost."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported here", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key `{key_node.value}` appears twice", problem_mark=key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _explain(item: Any, where: str, flags: set[str]) -> str:
    key = str(item["loc"][0]) if item["loc"] else ""
    if item["type"] == "extra_forbidden":
        known = [_OTHER_NAMES[key]] if key in _OTHER_NAMES else list(Config.model_fields)
        nearest = known if len(known) == 1 else difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        hint = f"did you mean `{nearest[0]}`?" if nearest else "`mindspeed-simpo train --help` lists all keys"
        return f"{where}: unknown key `{key}`; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{where}: `{key}` is required: {Config.model_fields[key].description}"
    if not key:
        return f"{where}: {message}"
    place = f"--{key.replace('_', '-')}" if key in flags else f"{where}: `{key}`"
    return f"{place}: {message[0].lower()}{message[1:]}, found {_brief(item['input'])}"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
