"""The plug-in's hooks against the smallest MindSpeed-LLM that has their seams (``tests/fakes/seams``)."""

import importlib.util
import json

import pytest
import torch

from mindspeed_simpo.objectives import METRICS, OBJECTIVES
from tests.objectives import OBJECTIVES as FORMS
from tests.objectives import stage_of
from tests.oracle_objectives import Options, Scores, score
from tests.unit.plugin_seams import PAIRWISE, SEAMS, SIMPO, entry, execute

PROGRAM = """
import json, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
cases = json.loads(sys.argv[1])
sys.argv[1:] = cases[0]
from mindspeed_simpo.integrations.mindspeed_llm import hooks
hooks.install()
hooks.install()
from mindspeed_llm import megatron_adaptor
from mindspeed_llm.tasks.posttrain.launcher import AutoTrainer
from megatron.core.pipeline_parallel import schedules
results = []
for case in cases:
    sys.argv[1:] = case
    schedules.seen.clear()
    try:
        trainer = AutoTrainer().trainer
        trainer.train()
    except Exception as error:
        results.append({"error": f"{type(error).__name__}: {error}"})
        continue
    results.append({
        "trainer": type(trainer).__name__,
        "args": vars(trainer.args),
        "rows": schedules.seen[:],
        "gradients": {name: p.grad.tolist() for name, p in trainer.model.named_parameters()},
        "backwards": trainer.model.backwards,
        "names": list(trainer.model.state_dict()),
        "losses": [{k: [v[0].item(), v[1].item()] for k, v in m.items()} for m in trainer.losses],
    })
print("RESULT " + json.dumps(results))
"""
STILL = ["--attention-dropout", "0", "--hidden-dropout", "0"]
TWO_PASS = ["--pair-schedule", "two_pass", *STILL]
SERVED = [form for form in FORMS if not OBJECTIVES[stage_of(form)].needs_reference]
WITH_REFERENCE = [stage for stage, objective in OBJECTIVES.items() if objective.needs_reference and stage != "dpo"]
BELOW_RANGE = {
    f"{key} of {stage}": (stage, key, getattr(item, "gt", getattr(item, "ge", None)) - 1)
    for stage, objective in OBJECTIVES.items()
    if not objective.needs_reference
    for key, field in objective.keys.model_fields.items()
    for item in field.metadata
    if hasattr(item, "gt") or hasattr(item, "ge")
}
"""Name of the case -> stage, key and a value that is too small."""
REFUSED = {
    "keys that do not agree": (
        [*SIMPO, "--simpo-loss-type", "hinge", "--simpo-label-smoothing", "0.1"],
        "simpo_label_smoothing needs simpo_loss_type: sigmoid",
    ),
    "a flag of another stage": (
        [*SIMPO, "--alphapo-alpha", "0.5"],
        "--alphapo-alpha 0.5: a flag of another stage; remove it",
    ),
    "a flag without its stage": (["--stage", "sft", "--no-simpo-length-norm"], "--simpo-length-norm False: only for"),
    "a flag of the exact stage": (
        ["--stage", "dpo", "--dpo-length-norm", *PAIRWISE],
        "--dpo-length-norm True: only for --stage simpo",
    ),
    "exact without its stage": ([*SIMPO, "--dpo-exact"], "--dpo-exact: for --stage dpo only; remove it"),
    "two_pass with a reference": (
        ["--stage", "dpo", "--dpo-exact", *PAIRWISE, *TWO_PASS],
        "--pair-schedule two_pass: only for stages without a reference model (simpo",
    ),
    "fused with a reference": (
        ["--stage", "dpo", "--dpo-exact", "--fused-logprob", *PAIRWISE],
        "--fused-logprob: only for stages without a reference model (simpo",
    ),
}


def flags(form):
    """The command line of a form of the tests' objectives."""
    keys = FORMS[form]
    words = ["--stage", stage_of(form), *PAIRWISE]
    for key, value in keys.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif key != "stage":
            words += [f"--{name}", str(value)]
    return words


@pytest.fixture(scope="module")
def runs():
    """Results of several command lines, in one process, and what it printed."""
    cases = {
        "concat": SIMPO,
        "two_pass": [*SIMPO, *TWO_PASS],
        "fused": [*SIMPO, "--fused-logprob"],
        "fused two_pass": [*SIMPO, "--fused-logprob", *TWO_PASS],
        "one micro-batch": [*SIMPO, "--micro-batch-size", "4"],
        "dpo exact": ["--stage", "dpo", "--dpo-exact", *PAIRWISE],
        "dpo exact of means": ["--stage", "dpo", "--dpo-exact", "--dpo-length-norm", "--dpo-beta", "5", *PAIRWISE],
        "given": [*SIMPO, "--gamma-beta-ratio=1.4", "--simpo-beta", "2"],
        "dpo": ["--stage", "dpo", "--tensor-model-parallel-size", "2", *PAIRWISE],
    }
    cases |= {f"form {form}": flags(form) for form in SERVED}
    cases |= {f"form {form} two_pass": [*flags(form), *TWO_PASS] for form in SERVED}
    cases |= {stage: ["--stage", stage, *PAIRWISE] for stage in WITH_REFERENCE}
    cases |= {
        name: ["--stage", stage, f"--{key.replace('_', '-')}", str(value), *PAIRWISE]
        for name, (stage, key, value) in BELOW_RANGE.items()
    }
    cases |= {name: command for name, (command, _) in REFUSED.items()}
    process = execute(["-c", PROGRAM, json.dumps(list(cases.values()))])
    assert "RESULT " in process.stdout, process.stderr[-3000:]
    text, result = process.stdout.split("RESULT ")
    return dict(zip(cases, json.loads(result), strict=True)), text


def stand_in_model():
    spec = importlib.util.spec_from_file_location("stand_in_model", SEAMS / "mindspeed_llm" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dense_gradients(num_pairs=4, micro_batch_size=2, **keys):
    """Loss and gradients of the mean over pairs, row by row, with plain log_softmax in fp64."""
    module = stand_in_model()
    model = module.GPTModel()
    batches = module.batches(type("Args", (), {"micro_batch_size": micro_batch_size}))
    losses = []
    for _ in range(num_pairs // micro_batch_size):
        batch = next(batches)
        logits = model(batch["input_ids"], None, None)
        sums, counts, reference = [], [], []
        for row, labels in enumerate(batch["labels"]):
            places = [t for t in range(1, len(labels)) if labels[t] != -100]
            rows = torch.stack([logits[row, t - 1] for t in places])
            ids = labels[places][:, None]
            sums.append(rows.log_softmax(-1).gather(1, ids).sum())
            reference.append((0.5 * rows.detach()).log_softmax(-1).gather(1, ids).sum().item())
            counts.append(len(places))
        for chosen in range(micro_batch_size):
            both = [chosen, chosen + micro_batch_size]
            scores = Scores(*(tuple(values[row] for row in both) for values in (sums, counts, reference)))
            losses.append(score(scores, Options(**keys))[0])
    loss = torch.stack(losses).mean()
    # the stand-in's schedule scales the loss by 8, as for fp16
    (8 * loss).backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def error(found, wanted):
    return max(((torch.tensor(found[n], dtype=torch.float64) - w).norm() / w.norm()).item() for n, w in wanted.items())


def check(result, **keys):
    """Compare loss and gradients with the dense ones."""
    loss, gradients = dense_gradients(**keys)
    assert error(result["gradients"], gradients) < 1e-6
    assert sum(m["lm loss"][0] for m in result["losses"]) / 4 == pytest.approx(loss, rel=1e-6)
    assert [m["lm loss"][1] for m in result["losses"]] == [2, 2]


@pytest.mark.parametrize("name", ["concat", "two_pass", "fused", "fused two_pass"])
def test_every_schedule_has_the_dense_gradient(runs, name):
    assert runs[0][name]["trainer"] == "PairTrainer"
    check(runs[0][name], pref_ftx=0.3)


@pytest.mark.parametrize("schedule", ["", " two_pass"])
@pytest.mark.parametrize("form", SERVED)
def test_every_objective_has_the_dense_gradient(runs, form, schedule):
    result = runs[0][f"form {form}{schedule}"]
    check(result, **FORMS[form])
    own = OBJECTIVES[stage_of(form)].metrics
    assert [list(metrics) for metrics in result["losses"]] == [["lm loss", *METRICS[1:], *own]] * 2


def test_flags_have_the_defaults_of_the_registry(runs):
    keys = {key: field.default for each in OBJECTIVES.values() for key, field in each.keys.model_fields.items()}
    found = runs[0]["one micro-batch"]["args"]
    assert {key: found[key] for key in keys} == keys


def test_help_has_the_texts_and_ranges_of_the_registry():
    process = entry("--help")
    assert process.returncode == 0, process.stderr
    text = " ".join(process.stdout.split())
    for objective in OBJECTIVES.values():
        for key, field in objective.keys.model_fields.items():
            assert f"--{key.replace('_', '-')}" in text
            # upstream's own flags have upstream's texts
            assert key.startswith("dpo_") or " ".join(field.description.split()) in text
    assert "(>= 0, < 0.5)" in text


@pytest.mark.parametrize("stage", WITH_REFERENCE)
def test_other_objectives_with_a_reference_are_refused_by_name(runs, stage):
    title = OBJECTIVES[stage].title
    assert f"  - --stage {stage}: {title} needs a reference model" in runs[0][stage]["error"]
    assert f"mindspeed-simpo train and stage: {stage}" in runs[0][stage]["error"]


@pytest.mark.parametrize("name", BELOW_RANGE)
def test_a_value_out_of_range_is_refused_by_its_flag(runs, name):
    _, key, value = BELOW_RANGE[name]
    wanted = f"ConfigError: --{key.replace('_', '-')} {float(value)}: Input should be greater than"
    assert runs[0][name]["error"].startswith(wanted)


@pytest.mark.parametrize("name", REFUSED)
def test_flags_that_nothing_reads_are_refused(runs, name):
    assert REFUSED[name][1] in runs[0][name]["error"]


@pytest.mark.parametrize(
    ("name", "keys"), [("dpo exact", {}), ("dpo exact of means", {"dpo_length_norm": True, "dpo_beta": 5.0})]
)
def test_dpo_exact_has_the_dense_gradient(runs, name, keys):
    assert runs[0][name]["trainer"] == "ExactDPOTrainer"
    check(runs[0][name], stage="dpo", **keys)
    assert runs[0][name]["rows"] == [8], "policy and reference, chosen and rejected, of 2 pairs"


def test_the_schedule_knows_the_rows(runs):
    assert runs[0]["concat"]["rows"] == [4]
    assert runs[0]["one micro-batch"]["rows"] == [8]


def test_two_pass_is_a_sweep_and_halves(runs):
    assert runs[0]["two_pass"]["rows"] == [2, 2], "half of the rows at a time"
    assert runs[0]["two_pass"]["backwards"] == 2 * runs[0]["concat"]["backwards"] == 4


def test_the_fused_head_leaves_the_names_of_weights(runs):
    assert runs[0]["fused"]["names"] == runs[0]["concat"]["names"]


def test_metrics_are_exact_sums(runs):
    metrics = {
        name: sum(m[name][0] for m in runs[0]["concat"]["losses"]) / 4 for name in runs[0]["concat"]["losses"][0]
    }
    assert metrics["rewards/margins"] == pytest.approx(
        metrics["rewards/chosen"] - metrics["rewards/rejected"], abs=1e-6
    )
    assert metrics["rewards/chosen"] == pytest.approx(2.5 * metrics["logps/chosen"], rel=1e-6)
    assert metrics["sft_loss"] == pytest.approx(-metrics["logps/chosen"], rel=1e-6)


def test_the_line_shows_negative_metrics(runs):
    lines = [line for line in runs[1].splitlines() if line.startswith(" simpo iteration        1/       1 |")]
    assert len(lines) == 6 + 2 * sum(stage_of(form) == "simpo" for form in SERVED)
    assert all("| logps/chosen: -" in line and "| rewards/rejected: -" in line for line in lines)


def test_the_default_that_differs_is_said_unless_the_flag_is_given(runs):
    lines = [line for line in runs[1].splitlines() if "--gamma-beta-ratio is 0.55" in line]
    assert len(lines) == 5 + 2 * sum(stage_of(form) == "simpo" for form in SERVED)


def test_upstreams_dpo_is_left_alone_but_warned_of(runs):
    assert runs[0]["dpo"] == {"error": "AssertionError: dpo's own loss"}
    assert runs[1].count("Add --dpo-exact") == 1
