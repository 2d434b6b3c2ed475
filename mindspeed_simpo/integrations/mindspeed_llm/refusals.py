"""Combinations of flags that are refused before the model is built. This module imports neither torch nor upstream."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Container, Iterator

from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.integrations.mindspeed_llm import stages
from mindspeed_simpo.objectives import OBJECTIVES, Objective

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
    ("moe_expert_capacity_factor", lambda value: value is not None, "it drops tokens; remove it"),
    ("moe_token_dropping", bool, "it drops tokens; remove it"),
    ("seq_aux", bool, "upstream counts a pair as one sequence there; remove it"),
    ("moe_device_level_aux_loss_coeff", bool, "not in the parity matrix; remove it"),
    ("moe_comm_aux_loss_coeff", bool, "not in the parity matrix; remove it"),
    ("moe_z_loss_coeff", bool, "not in the parity matrix; remove it"),
    ("n_shared_experts", bool, "shared experts are not in the parity matrix; use a model without them"),
    (
        "moe_shared_expert_intermediate_size",
        bool,
        "shared experts are not in the parity matrix; use a model without them",
    ),
    ("moe_tp_extend_ep", bool, "not in the parity matrix; use --expert-tensor-parallel-size 1"),
)
"""Name of the argument, predicate of the refused values, and the reason with what to do."""

_EXACT_ROUTING = {
    "moe_router_load_balancing_type": ("none", "aux_loss"),
    "moe_token_dispatcher_type": ("alltoall", "alltoall_seq"),
}
"""Argument of models with experts -> its values in the parity matrix."""
_EXACT_CP_ALGORITHMS = ("megatron_cp_algo", "ulysses_cp_algo")


def check(args: Namespace) -> None:
    """Refuse flags that this package's trainers do not support; the arguments of upstream's own stages are not checked.

    Raises:
        ConfigError: one message with every reason and what to change.
    """
    objective = stages.objective_of(args)
    if objective is None:
        used = [*_options_in_use(args), *_unread_keys(args, ())]
        if used:
            ours = f"--stage {', '.join(stages.SUPPORTED)} or --stage {stages.UPSTREAM_STAGE} --dpo-exact"
            raise ConfigError(f"{', '.join(used)}: only for {ours}")
        return
    reasons = [f"--stage {args.stage}: {reason}" for reason in [stages.reason_unsupported(objective)] if reason]
    if not reasons:
        stages.task_options(args, objective)
        reasons = [*_refused_keys(args, objective), *_refused_flags(args), *_refused_parallelism(args)]
        reasons += [*_refused_schedule(args, objective), *_refused_experts(args)]
    if reasons:
        raise ConfigError(f"--stage {args.stage} cannot run like this:\n  - " + "\n  - ".join(reasons))


def _options_in_use(args: Namespace) -> Iterator[str]:
    if args.dpo_exact:
        yield "--dpo-exact"
    if args.pair_schedule == "two_pass":
        yield "--pair-schedule two_pass"
    if args.fused_logprob:
        yield "--fused-logprob"


def _unread_keys(args: Namespace, read: Container[str]) -> Iterator[str]:
    """Flags of objectives' keys that are set, but are not among the keys that are read."""
    for objective in OBJECTIVES.values():
        for key, field in objective.keys.model_fields.items():
            if key not in read and key not in stages.UPSTREAM_KEYS and getattr(args, key) != field.default:
                yield f"{stages.flag(key)} {getattr(args, key)}"


def _refused_keys(args: Namespace, objective: Objective) -> Iterator[str]:
    for flag in _unread_keys(args, objective.keys.model_fields):
        yield f"{flag}: a flag of another stage; remove it"
    if args.dpo_exact and args.stage != stages.UPSTREAM_STAGE:
        yield f"--dpo-exact: for --stage {stages.UPSTREAM_STAGE} only; remove it"


def _refused_flags(args: Namespace) -> Iterator[str]:
    if not args.is_pairwise_dataset:
        yield "add --is-pairwise-dataset: the data must be chosen and rejected pairs"
    for name, is_refused, reason in _REFUSED:
        value = getattr(args, name, None)
        if is_refused(value):
            shown = "" if value is True else f" {value}"
            yield f"--{name.replace('_', '-')}{shown}: {reason}"
    engine = getattr(args, "transformer_impl", "") == "transformer_engine"
    if engine and not getattr(args, "use_flash_attn", False) and _is_causal(args):
        # MindSpeed then calls npu_fusion_attention with sparse_mode 2, and the operator takes [2048, 2048] alone there
        yield (
            "--transformer-impl transformer_engine: it hands the NPU's operator a mask of the wrong shape; add "
            "--use-flash-attn or --transformer-impl local"
        )
    if engine and getattr(args, "lora_target_modules", None):
        # the LoRA of MindSpeed-LLM adapts megatron-core's own layers only, and raises while the model is built
        yield (
            "--lora-target-modules: MindSpeed-LLM's LoRA does not know the layers of --transformer-impl "
            "transformer_engine; add --transformer-impl local"
        )


def _is_causal(args: Namespace) -> bool:
    return bool(getattr(args, "attention_mask_type", "causal") == "causal")


def _refused_parallelism(args: Namespace) -> Iterator[str]:
    context = args.context_parallel_size
    algorithm = getattr(args, "context_parallel_algo", "megatron_cp_algo")
    if context > 1 and algorithm not in _EXACT_CP_ALGORITHMS:
        yield f"--context-parallel-algo {algorithm}: use one of {', '.join(_EXACT_CP_ALGORITHMS)}"
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


def _refused_experts(args: Namespace) -> Iterator[str]:
    if not getattr(args, "num_experts", None):
        return
    for name, exact in _EXACT_ROUTING.items():
        value = getattr(args, name)
        if value not in exact:
            yield f"--{name.replace('_', '-')} {value}: not in the parity matrix; use one of {', '.join(exact)}"
    coefficient = f"--moe-aux-loss-coeff {args.moe_aux_loss_coeff}"
    if args.moe_aux_loss_coeff and args.context_parallel_size > 1:
        yield f"{coefficient}: upstream's gradient of it depends on --context-parallel-size; set it to 0"
    if args.moe_aux_loss_coeff and args.pair_schedule == "two_pass":
        yield f"{coefficient}: it is a loss of whole micro-batches, which --pair-schedule two_pass divides; set it to 0"
    adapted = {"linear_fc1", "linear_fc2"}.intersection(getattr(args, "lora_target_modules", None) or ())
    if adapted and args.expert_model_parallel_size > 1:
        yield (
            f"--lora-target-modules {' '.join(sorted(adapted))}: upstream adds up the gradients of different experts "
            "where --expert-model-parallel-size divides them; name linear_qkv and linear_proj alone"
        )


def _pads_to_need(args: Namespace) -> bool:
    # 2.2.0 has only --variable-seq-lengths; later versions derive it and have --no-pad-to-seq-lengths
    return bool(getattr(args, "no_pad_to_seq_lengths", args.variable_seq_lengths))


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def _refused_schedule(args: Namespace, objective: Objective) -> Iterator[str]:
    two_pass = args.pair_schedule == "two_pass"
    if objective.needs_reference:
        # upstream's forward step runs the policy and the reference model, and returns the logits of both
        without = f"only for stages without a reference model ({', '.join(stages.SUPPORTED)}); remove it"
        if two_pass:
            yield f"--pair-schedule two_pass: {without}"
        if args.fused_logprob:
            yield f"--fused-logprob: {without}"
    virtual_stages = getattr(args, "num_layers_per_virtual_pipeline_stage", None)
    if two_pass and virtual_stages and not hasattr(args, "no_pad_to_seq_lengths"):
        # 2.2.0's own wrapper of the interleaved schedule supports only micro-batches of complete pairs
        yield "--pair-schedule two_pass: not with virtual stages here; remove --num-layers-per-virtual-pipeline-stage"
    if two_pass and (args.attention_dropout or args.hidden_dropout):
        yield (
            "--pair-schedule two_pass: the rejected forward runs twice and must not differ; "
            "add --attention-dropout 0 --hidden-dropout 0"
        )
    if args.fused_logprob:
        yield from _refused_head(args)


def _refused_head(args: Namespace) -> Iterator[str]:
    if args.logprob_chunk_tokens is not None and args.logprob_chunk_tokens < 1:
        yield f"--logprob-chunk-tokens {args.logprob_chunk_tokens}: at least 1"
    if getattr(args, "use_ascend_mc2", False) and args.sequence_parallel and args.tensor_model_parallel_size > 1:
        yield "--fused-logprob: the output layer of --use-ascend-mc2 is another one; remove one of them"
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
