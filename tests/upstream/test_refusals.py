"""Each refusal, with MindSpeed-LLM's own parser and validation: before anything is built, and what the message says."""

import json
import subprocess
import sys

import pytest

from mindspeed_simpo.objectives import OBJECTIVES
from tests.upstream.harness import (
    BASE_FLAGS,
    MODEL_FLAGS,
    environment,
    launch,
    make_pairs,
    needs_upstream,
    no_pad_flag,
    upstream_file,
    write_data,
)

pytestmark = needs_upstream

PROGRAM = """
import contextlib, io, json, os, sys
cases = json.loads(sys.argv[1])
sys.argv[1:] = ["--stage", "simpo"]
from mindspeed_simpo.integrations.mindspeed_llm import hooks
hooks.install()
from mindspeed_llm import megatron_adaptor
from megatron.training import initialize
answers = []
for case in cases:
    sys.argv[1:] = case
    # Megatron's own check of FSDP
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8" if any("fsdp" in word for word in case) else "1"
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            initialize.validate_args(initialize.parse_args(None, False), {})
        answers.append("accepted")
    except (Exception, SystemExit) as error:
        answers.append(f"{type(error).__name__}: {error} {printed.getvalue()[-300:]}")
print("ANSWERS " + json.dumps(answers))
"""
MOE = "--num-experts 4 --moe-token-dispatcher-type alltoall"
LORA = "--transformer-impl local --lora-r 4 --lora-alpha 8 --lora-target-modules linear_fc1"
CP2 = "--transformer-impl local --context-parallel-size 2 --use-flash-attn"
MC2 = "--use-ascend-mc2 --tensor-model-parallel-size 2 --sequence-parallel"
CASES = {
    "": "accepted",
    "--use-legacy-models --ckpt-format torch": "--use-legacy-models: legacy models return other logits",
    "--schedules-method dualpipev": "--schedules-method dualpipev: DualPipeV has a forward step of its own",
    "--moe-fb-overlap": "--moe-fb-overlap: it has a forward step of its own",
    "--layerwise-disaggregated-training": "--layerwise-disaggregated-training: it has a training loop of its own",
    "--reset-attention-mask": "--reset-attention-mask: pairs are not packed",
    "--reset-position-ids": "--reset-position-ids: pairs are not packed",
    "--neat-pack --reset-attention-mask --reset-position-ids": "--neat-pack: pairs are not packed",
    "--pack": "--pack: pairs are not packed",
    "--loss-compute-mode chunk": "--loss-compute-mode chunk: chunked loss needs labels inside the model",
    "--mtp-num-layers 1": "--mtp-num-layers 1: multi-token prediction has no preference loss",
    "--calculate-per-token-loss": "--calculate-per-token-loss: the loss is a mean over pairs",
    "--tokenizer-padding-side left": "--tokenizer-padding-side left: pairs are padded on the right",
    "--tp-2d": "--tp-2d: not in the parity matrix",
    "--use-torch-fsdp2": "--use-torch-fsdp2: not in the parity matrix",
    "--use-custom-fsdp --use-distributed-optimizer": "--use-custom-fsdp: not in the parity matrix",
    "--enable-elastic-training": "--enable-elastic-training: it averages the loss itself",
    "--async-log-allreduce": "--async-log-allreduce: it takes the metrics in another form",
    MOE: "accepted",
    f"{MOE} --expert-model-parallel-size 2 --micro-batch-size 1": "accepted",
    f"{MOE} --moe-token-dispatcher-type allgather": "--moe-token-dispatcher-type allgather: not in the parity matrix",
    f"{MOE} --moe-router-load-balancing-type softmax_topk": "--moe-router-load-balancing-type softmax_topk: not in the",
    f"{MOE} --moe-expert-capacity-factor 1.0": "--moe-expert-capacity-factor 1.0: it drops tokens",
    f"{MOE} --moe-z-loss-coeff 0.1": "--moe-z-loss-coeff 0.1: not in the parity matrix",
    f"{MOE} --seq-aux": "--seq-aux: upstream counts a pair as one sequence there",
    f"{MOE} --n-shared-experts 1": "--n-shared-experts 1: shared experts are not in the parity matrix",
    f"{MOE} --moe-aux-loss-coeff 0.1 {CP2}": "upstream's gradient of it depends on --context-parallel-size",
    f"{MOE} --moe-aux-loss-coeff 0.1 --pair-schedule two_pass": "it is a loss of whole micro-batches",
    f"{MOE} {LORA} --expert-model-parallel-size 2": "upstream adds up the gradients of different experts",
    f"{CP2} --context-parallel-algo hybrid_cp_algo": "--context-parallel-algo hybrid_cp_algo: use one of megatron_cp",
    f"{CP2} --context-parallel-algo kvallgather_cp_algo": "--context-parallel-algo kvallgather_cp_algo: use one of",
    f"{CP2} --context-parallel-algo adaptive_cp_algo": "--context-parallel-algo adaptive_cp_algo: use one of",
    f"{CP2} NO_PAD --tensor-model-parallel-size 4 --sequence-parallel": "add --pad-to-multiple-of 16",
    "--pair-schedule two_pass --hidden-dropout 0.1": "add --attention-dropout 0 --hidden-dropout 0",
    "--fused-logprob --logprob-chunk-tokens 0": "--logprob-chunk-tokens 0: at least 1",
    "--fused-logprob --output-logit-softcapping 30": "the head with --output-logit-softcapping 30.0 needs its logits",
    "--fused-logprob --add-output-layer-bias": "the head with --add-output-layer-bias True needs its logits",
    MC2: "accepted",
    f"{MC2} --fused-logprob": "--fused-logprob: the output layer of --use-ascend-mc2 is another one",
    "--lora-target-modules linear_qkv --transformer-impl local": "accepted",
    "--simpo-beta 0": "--simpo-beta 0.0: Input should be greater than 0",
    "--simpo-label-smoothing 0.6": "--simpo-label-smoothing 0.6:",
    "--simpo-loss-type cubic": "invalid choice: 'cubic'",
    "--simpo-label-smoothing 0.1 --simpo-loss-type hinge": "simpo_label_smoothing needs simpo_loss_type: sigmoid",
    "--stage orpo --orpo-lambda -1": "--orpo-lambda -1.0: Input should be greater than or equal to 0",
    "--stage cpo --cpo-beta 0": "--cpo-beta 0.0: Input should be greater than 0",
    "--stage alphapo --simpo-beta 2": "--simpo-beta 2.0: a flag of another stage; remove it",
    "--stage simper --dpo-exact": "--dpo-exact: for --stage dpo only",
    "--stage sft --orpo-lambda 0.2": "--orpo-lambda 0.2: only for --stage simpo",
    "--stage sft --dpo-exact": "--dpo-exact: only for --stage simpo",
    "--stage sft --pair-schedule two_pass": "--pair-schedule two_pass: only for --stage simpo",
    "--stage dpo --fused-logprob": "--fused-logprob: only for --stage simpo",
    "--stage dpo --dpo-length-norm": "--dpo-length-norm True: only for --stage simpo",
    "--stage dpo --dpo-exact --pair-schedule two_pass": "--pair-schedule two_pass: only for stages without a reference",
    "--stage dpo --dpo-exact --fused-logprob": "--fused-logprob: only for stages without a reference",
}
CASES |= {
    f"--stage {stage}": "accepted"
    if not each.needs_reference
    else f"--stage {stage}: {each.title} needs a reference model, which MindSpeed-LLM builds for --stage dpo alone"
    for stage, each in OBJECTIVES.items()
    if stage != "dpo"
}
TWO_PASS_VPP = (
    "--pair-schedule two_pass --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
    "--micro-batch-size 1 --global-batch-size 8"
)
LORA = "--lora-r 4 --lora-target-modules linear_qkv linear_proj"
OUTSIDE = ("unpaired", "unfused", TWO_PASS_VPP, LORA)
"""Answers that depend on the version, or on what is missing."""
PAIRS = make_pairs(8)


def command_line(flags):
    sizes = "--micro-batch-size 1 --global-batch-size 8 --train-iters 2 --stage simpo"
    return f"{MODEL_FLAGS} {BASE_FLAGS} {sizes} {flags}".replace("NO_PAD", no_pad_flag()).split()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each command line is answered, in one process of 8 imagined ranks; the first two lack a flag."""
    data = write_data(tmp_path_factory.mktemp("refusals"), PAIRS)
    unpaired, unfused = (
        [word for word in command_line("") if word != flag] for flag in ("--is-pairwise-dataset", "--use-flash-attn")
    )
    lines = [unpaired + data, unfused + data, *(command_line(flags) + data for flags in (*OUTSIDE[2:], *CASES))]
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(lines)],
        env=environment() | {"RANK": "0", "WORLD_SIZE": "8"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "ANSWERS " in process.stdout, process.stderr[-3000:]
    return dict(zip([*OUTSIDE, *CASES], json.loads(process.stdout.split("ANSWERS ")[1]), strict=True))


@pytest.mark.parametrize("flags", CASES)
def test_answer(answers, flags):
    answer, wanted = answers[flags], CASES[flags]
    if "unrecognized arguments" in answer or ("invalid choice" in answer and "invalid choice" not in wanted):
        pytest.skip(f"this MindSpeed-LLM does not know it: {answer[-200:]}")
    assert wanted in answer


def test_data_that_are_not_pairs(answers):
    assert "add --is-pairwise-dataset" in answers["unpaired"]


def test_two_pass_with_virtual_stages_is_refused_by_2_2_0_alone(answers):
    refused = no_pad_flag() == "--variable-seq-lengths"
    assert ("two_pass: not with virtual stages here" if refused else "accepted") in answers[TWO_PASS_VPP]


def test_what_transformer_engine_cannot_do_is_refused_where_it_is_the_default(answers):
    # since 26.0.0
    local = "default='local'" in upstream_file("mindspeed_llm/training/arguments.py").read_text()
    assert ("accepted" if local else "add --transformer-impl local") in answers[LORA]
    assert ("accepted" if local else "add --use-flash-attn or --transformer-impl local") in answers["unfused"]


def test_a_refusal_is_one_message_before_the_model(tmp_path):
    flags = command_line("--reset-position-ids --calculate-per-token-loss") + write_data(tmp_path / "data", PAIRS)
    run = launch(tmp_path / "run", flags, 2, entry=["-m", "mindspeed_simpo.posttrain_gpt"])
    assert run.code != 0
    assert run.text.count("mindspeed_simpo: --stage simpo cannot run like this:") == 1
    assert "building GPT model" not in run.text
    assert "ConfigError" not in run.text, "a traceback"
