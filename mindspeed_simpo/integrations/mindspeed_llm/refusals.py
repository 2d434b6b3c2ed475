"""Combinations of flags that cannot be exact, refused before the model is built. Imports neither torch nor upstream."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator

from pydantic import ValidationError

from mindspeed_simpo.config.options import TaskOptions
from mindspeed_simpo.errors import ConfigError

_TASK_FLAGS = {
    "simpo": ("simpo_beta", "gamma_beta_ratio", "simpo_loss_type", "simpo_label_smoothing", "pref_ftx"),
    "dpo": ("dpo_beta", "dpo_loss_type", "dpo_label_smoothing", "pref_ftx"),
}

_REFUSED: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("use_legacy_models", bool, "legacy models return other logits; add --use-mcore-models"),
    ("ai_framework", lambda value: value == "mindspore", "the plug-in is PyTorch only; remove --ai-framework"),
    ("schedules_method", lambda value: value == "dualpipev", "DualPipeV has a forward step of its own; remove it"),
    ("moe_fb_overlap", bool, "it has a forward step of its own; remove it"),
    ("layerwise_disaggregated_training", bool, "it has a training loop of its own; remove it"),
    ("reset_attention_mask", bool, "pairs are not packed; remove it"),
    ("reset_position_ids", bool, "pairs are not packed; remove it"),
    ("neat_pack", bool, "pairs are not packed; remove it"),
    ("pack", bool, "pairs are not packed; remove it"),
    ("loss_compute_mode", lambda value: value == "chunk", "chunked loss needs labels inside the model; remove it"),
    ("mtp_num_layers", bool, "multi-token prediction has no preference loss; remove it"),
    ("calculate_per_token_loss", bool, "the loss is a mean over pairs, not over tokens; remove it"),
    ("tokenizer_padding_side", lambda value: value == "left", "pairs are padded on the right; set it to right"),
    ("tp_2d", bool, "not in the parity matrix; use --tensor-model-parallel-size alone"),
    ("use_torch_fsdp2", bool, "not in the parity matrix; remove it"),
    ("use_custom_fsdp", bool, "not in the parity matrix; remove it"),
    ("enable_elastic_training", bool, "it averages the loss itself; remove it"),
    ("async_log_allreduce", bool, "it takes the metrics in another form; remove it"),
    ("num_experts", bool, "mixture-of-experts models are not in the parity matrix; use a dense model"),
)
"""Name of the argument, when it is refused, why and what to do."""

_EXACT_CP_ALGORITHMS = ("megatron_cp_algo", "ulysses_cp_algo")


def is_ours(args: Namespace) -> bool:
    """Whether this package's trainer runs: ``--stage simpo``, or ``--stage dpo --dpo-exact``."""
    return args.stage == "simpo" or (args.stage == "dpo" and bool(getattr(args, "dpo_exact", False)))


def task_options(args: Namespace) -> TaskOptions:
    """The objective's options, from upstream's and this package's flags.

    Raises:
        ConfigError: a value out of its range.
    """
    values = {name: getattr(args, name) for name in ("stage", *_TASK_FLAGS[args.stage])}
    try:
        return TaskOptions(**values)
    except ValidationError as error:
        lines = [
            f"--{str(item['loc'][0]).replace('_', '-')} {item['input']}: {item['msg']}"
            for item in error.errors(include_url=False)
        ]
        raise ConfigError("\n".join(lines)) from None


def check(args: Namespace) -> None:
    """Refuse what cannot work with this package's trainers; other stages are left alone.

    Raises:
        ConfigError: one message with every reason and what to change.
    """
    if not is_ours(args):
        used = [flag for flag, on in _our_flags(args) if on]
        if used:
            raise ConfigError(f"{', '.join(used)}: only for --stage simpo or --stage dpo --dpo-exact")
        return
    task_options(args)
    reasons = [*_refused_flags(args), *_refused_parallelism(args), *_refused_schedule(args)]
    if reasons:
        raise ConfigError(f"--stage {args.stage} cannot run like this:\n  - " + "\n  - ".join(reasons))


def _our_flags(args: Namespace) -> Iterator[tuple[str, bool]]:
    yield "--dpo-exact", bool(getattr(args, "dpo_exact", False))
    yield "--pair-schedule two_pass", getattr(args, "pair_schedule", "concat") == "two_pass"
    yield "--fused-logprob", bool(getattr(args, "fused_logprob", False))


def _refused_flags(args: Namespace) -> Iterator[str]:
    if not args.is_pairwise_dataset:
        yield "add --is-pairwise-dataset: the data must be chosen and rejected pairs"
    for name, is_refused, reason in _REFUSED:
        value = getattr(args, name, None)
        if is_refused(value):
            shown = "" if value is True else f" {value}"
            yield f"--{name.replace('_', '-')}{shown}: {reason}"
    if getattr(args, "lora_target_modules", None) and getattr(args, "transformer_impl", "") == "transformer_engine":
        # peft adapts megatron-core's own layers only, and stops in the middle of the model's construction
        yield (
            "--lora-target-modules: MindSpeed-LLM's LoRA does not know the layers of --transformer-impl "
            "transformer_engine; add --transformer-impl local"
        )


def _refused_parallelism(args: Namespace) -> Iterator[str]:
    context = args.context_parallel_size
    algorithm = getattr(args, "context_parallel_algo", "megatron_cp_algo")
    if context > 1 and algorithm not in _EXACT_CP_ALGORITHMS:
        yield f"--context-parallel-algo {algorithm}: use one of {', '.join(_EXACT_CP_ALGORITHMS)}"
    if args.expert_model_parallel_size > 1:
        yield f"--expert-model-parallel-size {args.expert_model_parallel_size}: not in the parity matrix; set it to 1"
    if not _pads_to_need(args):
        return
    slices = context * (2 if algorithm == "megatron_cp_algo" else 1) if context > 1 else 1
    multiple = slices * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    padded = getattr(args, "pad_to_multiple_of", 8)
    if padded % multiple:
        yield (
            f"batches padded to a multiple of {padded} tokens do not divide over tensor and context ranks: "
            f"add --pad-to-multiple-of {_next_multiple(padded, multiple)}"
        )


def _pads_to_need(args: Namespace) -> bool:
    # 2.2.0 has only --variable-seq-lengths; later versions set it themselves, and pad by the other flag
    return bool(getattr(args, "no_pad_to_seq_lengths", args.variable_seq_lengths))


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def _refused_schedule(args: Namespace) -> Iterator[str]:
    two_pass = args.pair_schedule == "two_pass"
    if args.stage == "dpo" and two_pass:
        yield "--pair-schedule two_pass: for --stage simpo only; remove it"
    if args.stage == "dpo" and args.fused_logprob:
        yield "--fused-logprob: for --stage simpo only; remove it"
    virtual_stages = getattr(args, "num_layers_per_virtual_pipeline_stage", None)
    if two_pass and virtual_stages and not hasattr(args, "no_pad_to_seq_lengths"):
        # 2.2.0's own wrapper of this schedule knows micro-batches of whole pairs only
        yield "--pair-schedule two_pass: not with virtual stages here; remove --num-layers-per-virtual-pipeline-stage"
    if two_pass and (args.attention_dropout or args.hidden_dropout):
        yield (
            "--pair-schedule two_pass: the rejected forward runs twice and must not differ; "
            "add --attention-dropout 0 --hidden-dropout 0"
        )
    if not args.fused_logprob:
        return
    if args.logprob_chunk_tokens < 1:
        yield f"--logprob-chunk-tokens {args.logprob_chunk_tokens}: at least 1"
    for name, neutral in (
        ("output_multiplier_scale", None),
        ("output_logit_softcapping", None),
        ("add_output_layer_bias", False),
        ("output_layer_slice_num", 1),
    ):
        value = getattr(args, name, neutral)
        if value and value != neutral:
            flag = name.replace("_", "-")
            yield f"--fused-logprob: the head with --{flag} {value} needs its logits; remove one of them"
