"""Sweeps without a training: what is swept, what is refused, who runs which trial, the page in a browser."""

import json
import os
import time

import pytest

from mindspeed_simpo.cli import main as cli
from mindspeed_simpo.config.recipes import recipes, sweep_path
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.studies.sweep import ledger as ledgers
from mindspeed_simpo.studies.sweep.plan import Goal, better, make_plan, write_config
from mindspeed_simpo.studies.sweep.results import Results, Row, collect, write_json
from mindspeed_simpo.studies.sweep.space import Range, read_space
from mindspeed_simpo.studies.sweep.trial import outcome
from tests.browser import open_browser, open_page
from tests.ranks.launcher import _context as context

optuna = pytest.importorskip("optuna")
FLAGS = {"model_name_or_path": "model", "data_path": "a.jsonl", "eval_data_path": "b.jsonl", "global_batch_size": 8}
ACCURACY = Goal("rewards/accuracies", minimize=False, max_fall=0.5)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in FLAGS.items()), encoding="utf-8")
    return path


@pytest.fixture
def plan_of(tmp_path, config_file):
    def make(*grid, search=(), file=None, trials=None, goal=ACCURACY, ranks=1, **flags):
        flags = {"output_dir": str(tmp_path / "sweep")} | flags
        plan = make_plan(str(config_file), flags, read_space(grid, search, file, "simpo"), goal, trials, ranks)
        plan.folder.mkdir(exist_ok=True)
        return plan

    return make


def test_values_are_those_of_the_keys(plan_of):
    plan = plan_of("simpo-beta=2,10", "lr=3e-7,1e-6", "simpo_length_norm=true,false", "max_prompt_length=null,100")
    assert plan.size == 16
    assert plan.combinations()[0] == {
        "simpo_beta": 2.0, "lr": 3e-7, "simpo_length_norm": True, "max_prompt_length": None
    }  # fmt: skip
    assert len({json.dumps(params) for params in plan.combinations()}) == 16
    adapters = plan_of("lora_target_modules=[q_proj, v_proj],all-linear", lora_r=8)
    labels = [params["lora_target_modules"] for params in adapters.combinations()]
    assert labels == ['["q_proj", "v_proj"]', "all-linear"]
    assert adapters.keys_of({"lora_target_modules": labels[0]}) == {"lora_target_modules": ["q_proj", "v_proj"]}
    searched = plan_of("simpo_beta=2,10", search=["lr=1e-7:1e-5:log", "train_iters=1:9"], trials=5)
    assert searched.space.search == {"lr": Range(1e-7, 1e-5, True, False), "train_iters": Range(1, 9, False, True)}
    assert searched.size == 5
    assert plan_of("simpo_beta=2,10", trials=7).size == 2


def test_the_shipped_sweep_runs_with_every_recipe_of_simpo(plan_of):
    space = read_space([], [], sweep_path("simpo_ablations"), "simpo")
    assert dict(space.points) == {
        "simpo": {},
        "without_length_normalisation": {"simpo_length_norm": False},
        "without_margin": {"gamma_beta_ratio": 0.0},
    }
    assert len(recipes()) > 5
    for recipe in recipes():
        values = {"eval_data_path": "held_out.jsonl"}
        plan = make_plan(recipe.name, values, space, ACCURACY, None, 8)
        assert [plan.config_of(params).gamma_beta_ratio for params in plan.combinations()][2] == 0
    both = plan_of("simpo_beta=0.1,2.5", file=sweep_path("simpo_ablations"))
    assert both.size == 6
    assert both.config_of({"point": "without_margin", "simpo_beta": 0.1}).simpo_beta == 0.1


def test_a_sweep_file(plan_of, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("grid: {simpo_beta: [2, 10]}\nsearch: {lr: {low: 1e-7, high: 1e-5, log: true}}\n")
    plan = plan_of(file=file, trials=3)
    assert plan.space.grid == {"simpo_beta": (2.0, 10.0)}
    assert plan.space.search == {"lr": Range(1e-7, 1e-5, True, False)}
    for text, said in (
        ("grids: {a: [1]}", "unknown section `grids`"),
        ("points: {a: 3}", "points: a: expected `key: value` lines"),
        ("points: {a: {simpo_bata: 3}}", "did you mean `simpo_beta`?"),
        ("points: {a: {lr: 1}}\ngrid: {lr: [1]}", "stands in"),
        ("search: {lr: [1, 2]}", "expected {low: LOW, high: HIGH}"),
        ("grid: [", "own.yaml:1: not valid YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError) as failed:
            plan_of(file=file)
        assert said in str(failed.value)
        assert "own.yaml" in str(failed.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "nothing to sweep"),
        ("--grid simpo_beta", "expected KEY=..."),
        ("--grid simpo_beta=2,,3", "expected values with commas"),
        ("--grid simpo_bata=2", "--grid simpo_bata: unknown key `simpo_bata`; did you mean `simpo_beta`?"),
        ("--grid beta=2", "did you mean `simpo_beta`?"),
        ("--grid lr=1e-6 --grid simpo_beta=2,-1", "--grid simpo_beta: input should be greater than 0, found -1.0"),
        ("--grid lr=1e-6,fast", "--grid lr: input should be a valid number"),
        ("--grid lr=1e-6 --grid lr=1e-7", "`lr` stands in --grid lr already"),
        ("--grid lr=1e-6,0.000001", "the value 1e-06 appears twice"),
        ("--grid lr=1e-6 --lr 1e-7", "--lr: `lr` is swept by --grid lr"),
        ("--grid micro_batch_size=1,2", "does not change what training is to compute"),
        ("--grid output_dir=a,b", "the sweep sets it"),
        ("--grid lr=1e-6 --load x", "--load: the sweep sets it"),
        ("--grid eval_data_path=a,b", "changes the held-out pairs"),
        ("--grid dpo_beta=1,2", "`dpo_beta` has no effect with stage: simpo"),
        ("--grid stage=simpo,dpo --grid dpo_beta=1,2", "are the same training"),
        ("--grid simpo_loss_type=sigmoid,hinge --simpo-label-smoothing 0.1", "(with simpo_loss_type hinge)"),
        ("--grid global_batch_size=8,9 --micro-batch-size 2", "(with global_batch_size 9)"),
        ("--grid global_batch_size=8,9 --nproc-per-node 2", "global_batch_size 9"),
        ("--search lr=1e-7:1e-5", "say how many to draw by --trials N"),
        ("--search lr=1e-5:1e-7 --trials 3", "expected LOW below HIGH"),
        ("--search lr=0:1:log --trials 3", "both above 0"),
        ("--search simpo_label_smoothing=0:0.7 --trials 3", "--search simpo_label_smoothing: input should be less"),
        ("--search simpo_length_norm=0:1 --trials 3", "is no number"),
        ("--search lr=1 --trials 3", "expected KEY=LOW:HIGH"),
        ("--grid lr=1e-6 --trials 0", "--trials: expected a whole number"),
        ("--grid lr=1e-6 --max-logps-fall -1", "--max-logps-fall: expected nats per token"),
        ("--grid lr=1e-6 --direction up", "--direction: expected maximize or minimize"),
        ("--grid lr=1e-6 --metric accuracies", "did you mean rewards/accuracies?"),
        ("--grid lr=1e-6 --eval-iters 0", "eval_iters: 0 means no evaluation"),
        ("--grid lr=1e-6 --storage nonsense", "--storage: cannot open the database"),
        ("--grid lr=1e-6 --storage sqlite:////absent/folder/a.db", "--storage: cannot open the database"),
        ("--file simpo_ablation", "did you mean simpo_ablations?"),
    ],
)
def test_what_is_refused_before_anything_starts(words, said, config_file, tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert cli.execute(["sweep", str(config_file), *words.split()]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("trial_*"))


def test_without_held_out_pairs_nothing_starts(config_file, tmp_path, capsys):
    config_file.write_text("model_name_or_path: m\ndata_path: a.jsonl\n")
    words = ["sweep", str(config_file), "--output-dir", str(tmp_path / "out")]
    assert cli.execute([*words, "--grid", "lr=1e-6"]) == 2
    assert "no held-out pairs" in capsys.readouterr().err
    assert cli.execute([*words, "--grid", "data_path=a,b", "--split", "9,1"]) == 2
    assert "each trial's own data_path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_directions():
    assert better("rewards/accuracies") == better("source/a/rewards/margins") == "maximize"
    assert better("loss") == better("sft_loss") == better("source/a/loss") == "minimize"


def evaluations(accuracy=0.5, fall=0.1):
    return [
        {"step": 0, "split": "eval", "rewards/accuracies": 0.5, "logps/chosen": -1.0},
        {"step": 2, "split": "eval", "rewards/accuracies": accuracy, "logps/chosen": -1.0 - fall},
    ]


def opened(plan, url=None):
    return ledgers.Ledger(plan, url or f"sqlite:///{plan.folder / 'sweep.db'}", "sweep")


def run_all(plan, url, ran):
    ledger = opened(plan, url)
    while (claimed := ledger.claim()) is not None:
        slot, trial = claimed
        params = ledger.parameters(trial)
        ran.put((slot, json.dumps(params)))
        time.sleep(0.02)
        ledger.finish(trial, evaluations(), 1.0)
    ledger.close()


@pytest.mark.parametrize("trials", [None, 5])
def test_two_processes_run_every_trial_once(plan_of, tmp_path, trials):
    plan = plan_of("simpo_beta=2,2.5,10", "lr=3e-7,1e-6", trials=trials)
    ran = context.Queue()
    processes = [context.Process(target=run_all, args=(plan, f"sqlite:///{tmp_path}/a.db", ran)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    done = sorted(ran.get(timeout=5) for _ in range(plan.size))
    assert ran.empty()
    assert [slot for slot, _ in done] == list(range(plan.size))
    assert len({params for _, params in done}) == plan.size  # draws leave out what was drawn before
    if trials is None:
        assert [json.loads(params) for _, params in done] == plan.combinations()
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/a.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * plan.size


def claim_and_die(plan):
    ledger = opened(plan)
    _, trial = ledger.claim()
    ledger.parameters(trial)
    os._exit(9)


def test_the_trial_of_a_dead_process_goes_on(plan_of):
    plan = plan_of("simpo_beta=2,10", trials=2)
    process = context.Process(target=claim_and_die, args=(plan,))
    process.start()
    process.join(60)
    ledger = opened(plan)
    drawn = ledger.trials()[0].params
    slot, other = ledger.claim()
    assert slot == 1
    assert not ledger.is_finished
    ledger.finish(other, evaluations(), 1.0)
    assert ledger.claim() is None  # still taken: nobody has looked whether its process lives
    ledger.release_dead()
    slot, trial = ledger.claim()
    assert (slot, ledger.parameters(trial)) == (0, drawn)
    second = opened(plan)
    second.release_dead()
    assert second.claim() is None  # this process lives
    assert ledger.beat(trial)
    ledger.release(trial._trial_id)
    assert not ledger.beat(trial)
    assert second.claim()[0] == 0
    second.close()
    ledger.close()


def test_the_trial_of_a_silent_host_goes_on(plan_of, monkeypatch):
    plan = plan_of("simpo_beta=2,10")
    with monkeypatch.context() as patched:
        patched.setattr(ledgers.socket, "gethostname", lambda: "far")
        far = opened(plan)
        far_trial = far.claim()[1]
    near = opened(plan)
    near.release_dead()
    assert near.claim()[0] == 1  # the other host has given a sign of life
    near.close()
    monkeypatch.setattr("mindspeed_simpo.studies.sweep.database.GRACE_S", 1)
    late = opened(plan)
    time.sleep(2.1)
    late.release_dead()
    assert late.claim()[0] == 0
    assert not far.beat(far_trial)
    far.finish(far_trial, evaluations(), 1.0)  # too late: the trial counts once, for the process that has it now
    assert late.trials()[0].state.name == "RUNNING"
    far.close()
    late.close()


def test_failed_trials_are_not_run_again_unless_asked(plan_of):
    plan = plan_of("simpo_beta=2,10")
    ledger = opened(plan)
    ledger.fail(ledger.claim()[1], "loss is not finite")
    ledger.finish(ledger.claim()[1], evaluations(0.75), 1.0)
    assert ledger.is_finished
    assert ledger.claim() is None
    rows = collect(plan, ledger.trials(), "sweep").rows
    assert [(row.slot, row.state, row.error) for row in rows] == [
        (1, "complete", None), (0, "failed", "loss is not finite")
    ]  # fmt: skip
    ledger.retry_failed()
    slot, trial = ledger.claim()
    assert (slot, ledger.parameters(trial)) == (0, {"simpo_beta": 2.0})
    ledger.close()


def test_infeasible_trials_are_never_the_best(plan_of, tmp_path):
    plan = plan_of("simpo_beta=2,2.5,10")
    ledger = opened(plan)
    for accuracy, fall in ((0.7, 0.5), (0.99, 0.51), (0.7, -0.2)):
        ledger.finish(ledger.claim()[1], evaluations(accuracy, fall), 1.0)
    results = collect(plan, ledger.trials(), "sweep")
    assert [(row.slot, row.state) for row in results.rows] == [(2, "complete"), (0, "complete"), (1, "infeasible")]
    assert results.next_command().endswith(f"--simpo-beta 10.0 --output-dir {plan.folder}/best")
    assert [trial.constraints["logps_fall"] > 0 for trial in ledger.study.trials] == [False, True, False]
    assert ledger.study.best_trial.value == 0.7  # Optuna leaves it out too
    write_json(results, tmp_path / "sweep.json")
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["best"]["trial"] == 2
    assert written["trials"][2]["keys"] == {"simpo_beta": 2.5}
    assert written["trials"][0]["evaluations"][0] == {"step": 0, "value": 0.5, "logps/chosen": -1.0}
    ledger.close()


def test_another_sweep_does_not_go_on(plan_of):
    opened(plan_of("simpo_beta=2,10")).close()
    for changed, said in (
        (plan_of("simpo_beta=2,2.5"), "values of simpo_beta: [2.0, 10.0] (now [2.0, 2.5])"),
        (plan_of("simpo_beta=2,10", lr="1e-5"), "lr: 1e-06 (now 1e-05)"),
        (plan_of("simpo_beta=2,10", goal=Goal("loss", True, 0.5)), "metric: rewards/accuracies (now loss)"),
    ):
        with pytest.raises(ConfigError, match="goes on with the same") as failed:
            opened(changed)
        assert said in str(failed.value)
    opened(plan_of("simpo_beta=2,10", save_interval="5", device="cpu")).close()  # the results stay the same


def test_what_a_training_left(tmp_path):
    (tmp_path / "train.log").write_text("error: before\nmore\nerror: step 3: loss is not finite\n")
    assert outcome(tmp_path, 1, len("error: before\n"), ACCURACY).error == "step 3: loss is not finite"
    assert "killed by SIGKILL; the host may be out of memory" in outcome(tmp_path, -9, 0, ACCURACY).error
    lines = [*evaluations(), {"step": 2, "split": "alarm", "alarm": "x"}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "spl'
    (tmp_path / "metrics.jsonl").write_text(text)
    found = outcome(tmp_path, 0, 0, ACCURACY)
    assert (found.error, [line["step"] for line in found.evaluations]) == (None, [0, 2])
    assert "has no metric source/a/loss" in outcome(tmp_path, 0, 0, Goal("source/a/loss", True, 1.0)).error
    (tmp_path / "metrics.jsonl").write_text(text.replace('"rewards/accuracies": 0.5', '"rewards/accuracies": null'))
    assert "is not finite at step 0" in outcome(tmp_path, 0, 0, ACCURACY).error


def test_the_file_of_a_trial(plan_of, tmp_path):
    plan, folder = plan_of("max_prompt_length=null,100", simpo_beta="3"), tmp_path / "trial_0000"
    write_config(plan, {"max_prompt_length": None}, folder)
    text = (folder / "sweep.yaml").read_text()
    assert "max_prompt_length: null\n" in text  # what a flag cannot say
    assert "simpo_beta: 3.0\n" in text
    assert f"output_dir: {folder}\n" in text
    assert "load: auto\n" in text
    write_config(plan, {"max_prompt_length": None}, folder)
    with pytest.raises(ConfigError, match=r"another sweep, with max_prompt_length: None \(now 100\)"):
        write_config(plan, {"max_prompt_length": 100}, folder)


def test_the_page_shows_every_trial(plan_of, tmp_path):
    from mindspeed_simpo.studies.sweep.report import write_report

    plan = plan_of("simpo_beta=2,2.5,10", "simpo_loss_type=sigmoid,hinge", search=["lr=1e-7:1e-5:log"], trials=6)
    rows = [
        Row(n, "infeasible" if n == 5 else "complete", params | {"lr": 10 ** -(5 + n / 5)}, 0.9 - n / 10, n / 8,
            [(0, 0.5, -1.0), (4, 0.9 - n / 10, -1.0 - n / 8)], {}, 1.0)
        for n, params in enumerate(plan.combinations())
    ]  # fmt: skip
    rows += [Row(6, "failed", rows[0].params, error="<b> out of memory"), Row(7, "waiting", {})]
    write_report(Results(plan, "sweep", rows), tmp_path / "index.html")
    two = plan_of("simpo_beta=2,2.5,10", "simpo_loss_type=sigmoid,hinge")
    fewer = [Row(row.slot, row.state, two.combinations()[row.slot], row.value, row.fall, row.curve) for row in rows[:6]]
    write_report(Results(two, "sweep", fewer), tmp_path / "two.html")
    with open_browser() as browser:
        with open_page(browser, (tmp_path / "index.html").as_uri(), width=375, scheme="dark") as page:
            page.wait_for_function("document.querySelectorAll('.figure[data-drawn]').length == 6")
            assert page.evaluate("document.documentElement.scrollWidth") <= 375
            assert page.locator("tbody tr").count() == 8
            assert page.locator(".parcoords").count() > 0
            assert "failed: <b> out of memory" in page.locator("tbody tr").nth(6).inner_text()
            assert "--simpo-beta 2.0 --simpo-loss-type sigmoid" in page.locator("pre").first.inner_text()
        with open_page(browser, (tmp_path / "two.html").as_uri()) as page:
            page.wait_for_function("document.querySelectorAll('.figure[data-drawn]').length == 5")
            assert page.locator(".figure").nth(2).locator(".point").count() == 6
