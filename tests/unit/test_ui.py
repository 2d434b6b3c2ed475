"""The page without a browser: the form of all options, the root folder, what the server refuses, runs that are over."""

import asyncio
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from mindspeed_simpo.cli import flags
from mindspeed_simpo.cli import main as cli
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import load_config, validate
from mindspeed_simpo.config.options import takes_bool
from mindspeed_simpo.config.recipes import recipes
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.studies.ui import curves, form, runs, views
from mindspeed_simpo.studies.ui.guard import Guard
from mindspeed_simpo.studies.ui.root import NO_PATHS, Root
from mindspeed_simpo.studies.ui.server import serve

pytest.importorskip("gradio")
from mindspeed_simpo.studies.ui.actions import Actions

REPO = Path(__file__).parents[2]
FILES = [*sorted(REPO.glob("configs/*.yaml")), *(recipe.path for recipe in recipes())]
ODD = {
    "model_name_or_path": "a model",
    "data_path": ["a.jsonl", "b.jsonl"],
    "map_keys": {"prompt": "question"},
    "chat_template_kwargs": {"enable_thinking": False},
    "lora_r": 8,
    "lora_target_modules": ["q_proj", "v_proj"],
    "bf16": False,
    "fused_logprob": False,
    "lr": 3e-7,
    "save_total_limit": 2,
    "wandb_project": "-starts-with-a-dash",
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root" / "configs").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.jsonl").write_text("{}\n")
    return Root(tmp_path / "root")


def entries(**values):
    return form.entries_of(values)


def run_record(folder, **facts):
    (folder / "ui").mkdir(parents=True)
    record = {"process": 1, "host": "h", "ranks": 2, "started": 1.0, "ended": 9.0, "exit_code": 0, "stop_requests": 0}
    (folder / "ui" / "run.json").write_text(json.dumps(record | facts))
    (folder / "ui" / "config.yaml").write_text("model_name_or_path: m\ndata_path: d\nglobal_batch_size: 8\n")


def test_every_option_is_a_field_with_its_meaning():
    fields = {field.name: field for field in form.fields()}
    assert list(fields) == list(dict.fromkeys(fields))
    assert set(fields) == set(Config.model_fields)
    for name, option in Config.model_fields.items():
        assert option.description in fields[name].hint
    assert fields["simpo_label_smoothing"].hint.endswith("(number, >= 0, < 0.5; default: 0)")
    assert fields["dpo_beta"].stage == "dpo"
    assert fields["stage"].choices[0] == "simpo"
    assert (fields["bf16"].kind, fields["bf16"].choices) == ("choice", ("true", "false"))
    assert {field.kind for field in fields.values() if takes_bool(Config.model_fields[field.name])} == {
        "choice",
        "switch",
    }
    assert form.read([field.initial for field in fields.values()]) == {}


@pytest.mark.parametrize("values", [ODD, *FILES], ids=lambda values: getattr(values, "stem", "odd"))
def test_a_configuration_goes_through_the_form_unchanged(values, tmp_path):
    if isinstance(values, Path):
        config = load_config(values)
        values = yaml.safe_load(values.read_text())
        values |= {"chat_template": config.chat_template} if config.chat_template else {}
    config = validate(values, "it")
    through = validate(form.read(form.entries_of(values)), "form")
    assert through == config
    file = tmp_path / "written.yaml"
    file.write_text(form.to_yaml(form.changed(through)))
    assert load_config(file) == config
    # and as flags of a command
    other = tmp_path / "other.yaml"
    base = {"model_name_or_path": "b", "data_path": "c", "global_batch_size": 16, "fused_logprob": True, "lr": 1e-3}
    other.write_text(form.to_yaml(base))
    command = form.command(form.changed(config), str(other), form.changed(validate(base, "")), 4)
    program, *words = shlex.split(command)
    parsed = cli.parse(words)
    assert program == "mindspeed-simpo"
    assert parsed.nproc_per_node == "4"
    assert load_config(parsed.config, flags.given(parsed)) == config


def test_what_no_flag_takes_back_needs_a_file():
    with pytest.raises(ConfigError, match="no flag takes back `max_prompt_length`"):
        form.command({}, "x.yaml", {"max_prompt_length": 7}, 1)


def test_wrong_entries_are_named(root):
    page = Actions(root)
    wrong = entries(model_name_or_path="m", data_path="d", lr="fast", train_iters="1.5", map_keys="prompt")
    message, written, _ = page.preview(1, None, "", *wrong)
    assert "map_keys" in message
    assert not written
    wrong[[field.name for field in form.fields()].index("map_keys")] = ""
    message = page.preview(1, None, "", *wrong)[0]
    assert "the form: `lr`: input should be a valid number" in message
    assert "`train_iters`" in message
    right = entries(model_name_or_path="m", data_path="d", global_batch_size=9)
    assert "global_batch_size 9 is not a multiple of 2" in page.preview(2, None, "", *right)[0]
    for ranks in (0, 1.5, None, "2", 10**6):
        assert "ranks: expected a whole number" in page.preview(ranks, None, "", *right)[0]
    assert "good" in page.preview(3, None, "", *right)[0]


ATTACKS = [
    "/etc/passwd",
    "../outside/secret.jsonl",
    "..",
    "configs/../../outside",
    "link/secret.jsonl",
    "link",
    "folder",
    "~/x",
    "~root",
    "file:///etc/passwd",
    "file:/etc/passwd",
    "https://example.com/x",
    "a\0b",
    "a\nb",
    "x" * 300,
    "x/" * 3000,
    "loop",
    "//etc/passwd",
    "/proc/self/environ",
    "./configs/./../..",
]


def plant(root):
    outside = root.folder.parent / "outside"
    (root.folder / "link").symlink_to(outside)
    (root.folder / "folder").mkdir()
    (root.folder / "folder" / "rows.jsonl").symlink_to(outside / "secret.jsonl")
    (root.folder / "loop").symlink_to("loop")


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda text: repr(text[:20]))
def test_no_path_leaves_the_root_folder(root, attack):
    plant(root)
    before = sorted(root.folder.parent.rglob("*"))
    page = Actions(root)
    texts = [field.name for field in form.fields() if field.kind in ("text", "lines", "mapping")]
    for name in texts:
        if name in NO_PATHS or isinstance(Config.model_fields[name].default, (int, float)):
            continue
        for value in (attack, [attack, "b"], [{"path": attack}], {"path": attack}):
            with pytest.raises(ConfigError, match=name):
                root.check({name: value})
    base = {"model_name_or_path": "owner/model", "data_path": "owner/data:train"}
    for name in ("data_path", "eval_data_path", "output_dir", "load", "chat_template", "ref_model", "data_cache_dir"):
        if "\n" in attack and name.endswith("data_path"):
            continue  # two lines: two paths
        filled = entries(**(base | {name: attack}))
        assert "bad" in page.preview(1, None, "", *filled)[0]
        assert ["bad" in said for said in page.check(1, None, "", *filled)] == [True]
        assert "bad" in page.start(1, None, "", *filled)[0]
        assert "bad" in page.save(1, None, "x", *filled)[0]
    assert "bad" in page.load(attack, 1)[len(form.fields()) + 1]
    if not attack.isalpha():
        assert "bad" in page.save(1, None, attack, *entries(**base))[0]
    for action in (page.stop, page.kill, page.resume):
        assert "bad" in action(attack)
    assert "bad" in page.edit(attack, 1)[len(form.fields()) + 1]
    assert "bad" in page.refresh_all(attack, [], "newest")[0]
    assert sorted(root.folder.parent.rglob("*")) == before


def test_a_configuration_and_a_run_that_point_outside_are_refused(root):
    page = Actions(root)
    run_record(root.folder / "run")
    (root.folder / "run" / "ui" / "config.yaml").write_text("model_name_or_path: m\ndata_path: /etc/passwd\n")
    assert "outside of the root folder" in page.resume("run")
    (root.folder / "bad.yaml").write_text("model_name_or_path: m\ndata_path: ../outside/secret.jsonl\n")
    assert "outside of the root folder" in page.load("bad.yaml", 1)[len(form.fields()) + 1]
    (root.folder / "run" / "metrics.jsonl").symlink_to(root.folder.parent / "outside" / "secret.jsonl")
    assert "outside of the root folder" in page.refresh_all("run", [], "newest")[0]
    (root.folder / "text.txt").write_text("secret")
    assert "expected a .yaml file" in page.load("text.txt", 1)[len(form.fields()) + 1]


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=re.escape("gradio is not installed: pip install 'mindspeed-simpo[ui]'")):
        serve(str(tmp_path), 0, show=False)
    with pytest.raises(ConfigError, match="--root: there is no folder"):
        Root(tmp_path / "absent")


def test_hub_ids_and_paths_inside_pass(root):
    (root.folder / "inner").symlink_to(root.folder / "configs")
    inside = str(root.folder / "configs" / "x.jsonl")
    root.check(
        {
            "model_name_or_path": "owner/model-1.5",
            "data_path": ["owner/name:train", inside, "./a b.jsonl", "inner/x", {"path": "数据.jsonl", "weight": 2}],
            "load": "auto",
            "chat_template_kwargs": {"system": "/no_think"},
            "chat_template": str(next(recipe.path for recipe in recipes()).parent / "plain.jinja"),
        }
    )


def test_recipes_load_and_files_of_others_stay(root):
    page = Actions(root)
    *_, base, verdict, written, command = page.load("base_model", 8)
    assert "good" in verdict
    assert yaml.safe_load(written)["tensor_model_parallel_size"] == 4
    assert command == "mindspeed-simpo train base_model --nproc-per-node 8"
    assert base["source"] == "base_model"
    filled = entries(model_name_or_path="m", data_path="d", lr=1e-3)
    assert "Saved: configs/mine.yaml" in page.save(1, None, "mine", *filled)[0]
    assert load_config(root.folder / "configs" / "mine.yaml").lr == 1e-3
    assert "Saved" in page.save(1, None, "mine.yaml", *filled)[0]
    (root.folder / "configs" / "mine.yaml").write_text("# my own words\n")
    assert "take another name" in page.save(1, None, "mine", *filled)[0]
    (root.folder / "unknown.yaml").write_text("simpo_bata: 1\n")
    assert "did you mean `simpo_beta`?" in page.load("unknown.yaml", 1)[len(form.fields()) + 1]


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({}, "finished"),
        ({"exit_code": 143}, "stopped"),
        ({"exit_code": 137, "stop_requests": 2}, "stopped"),
        ({"exit_code": 1}, "failed"),
        ({"exit_code": None, "ended": None}, "failed"),
    ],
)
def test_states_of_runs_that_are_over(root, facts, state):
    run_record(root.folder / "outputs" / "a", **facts)
    (root.folder / "outputs" / "a" / "ui" / "log.txt").write_text("x\nerror: <b> is wrong\nbye\n")
    assert runs.find_runs(root) == ["outputs/a"]
    run = runs.describe(root, "outputs/a")
    assert run.state == state
    shown = views.state(run)
    assert "<b> is wrong" not in shown
    assert ("error: &lt;b&gt; is wrong" in shown) == (state == "failed")
    with pytest.raises(ConfigError, match="is over"):
        runs.stop(root, "outputs/a")
    with pytest.raises(ConfigError, match="holds no run"):
        runs.describe(root, "configs")


def test_a_run_that_was_started_again_from_a_terminal(root):
    folder = root.folder / "a"
    run_record(folder, exit_code=1)  # at second 9 of 1970, before the metrics
    (folder / "config.yaml").write_text("model_name_or_path: m\ndata_path: d\nglobal_batch_size: 8\nlr: 1.0e-3\n")
    (folder / "metrics.jsonl").write_text("")
    (folder / "run.log").write_text("x INFO train step 3/3  loss\n")
    run = runs.describe(root, "a")
    assert (run.state, run.step, run.steps, run.exit_code) == ("finished", 3, 3, None)
    assert runs.values_of(root, "a")["lr"] == 1e-3


def test_a_run_is_not_written_over(root):
    output = root.folder / "outputs" / "a"
    output.mkdir(parents=True)
    (output / "metrics.jsonl").write_text("{}\n")
    values = {"model_name_or_path": "m", "data_path": "d", "output_dir": "outputs/a"}
    with pytest.raises(ConfigError, match="holds a run already"):
        runs.start(root, values, 1)
    assert [path.name for path in output.iterdir()] == ["metrics.jsonl"]


def test_curves_alarms_and_answers(root):
    folder = root.folder / "outputs" / "a"
    folder.mkdir(parents=True)
    lines = [{"step": step, "split": "train", "loss": 1 / step, "grad_norm": None} for step in range(1, 4001)]
    lines.insert(0, {"step": 0, "split": "eval", "loss": 2.0})
    alarm = {"step": 7, "split": "alarm", "alarm": "x", "message": "<i>falls", "advice": "lower `lr`"}
    text = "".join(json.dumps(line) + "\n" for line in [*lines, alarm])
    (folder / "metrics.jsonl").write_text(text + '{"step": 4001, "spl')
    found = curves.read_lines(root, "outputs/a", "metrics.jsonl")
    assert found == [*lines, alarm]
    loss, accuracy, *_, norm, _ = curves.figures({"outputs/a": found})
    train, held_out = loss.data
    assert (train.name, held_out.name) == ("train", "held-out")
    assert len(train.x) <= 1001
    assert (train.x[0], train.x[-1], train.y[-1]) == (1, 4000, 1 / 4000)
    assert (held_out.x, held_out.y) == ((0,), (2.0,))
    assert accuracy.data == ()
    assert set(norm.data[0].y) == {None}
    assert [trace.name for trace in curves.figures({"a": found, "b": found[:3]})[0].data] == [
        "a, train",
        "a, held-out",
        "b, train",
        "b, held-out",
    ]
    assert "step 7: &lt;i&gt;falls" in curves.alarms(found)
    assert curves.alarms(lines) == ""
    samples = [{"step": s, "index": i, "prompt": f"p{i}", "answer": f"<b>{s}.{i}"} for s in (0, 5) for i in (0, 1)]
    assert curves.sample_steps(samples) == [5, 0]
    assert re.findall(r"&lt;b&gt;(\d\.\d)", curves.answers(samples, 5)) == ["5.0", "5.1"]
    assert re.findall(r"&lt;b&gt;(\d\.\d)", curves.answers(samples, None)) == ["0.0", "5.0", "0.1", "5.1"]
    assert "eval_generate" in curves.answers([], 5)


@pytest.mark.parametrize(
    ("path", "headers", "answered"),
    [
        ("/", {}, True),
        ("/", {"host": "localhost:9000", "origin": "http://localhost:9000"}, True),
        ("/", {"host": "127.0.0.1.rebound.example:7860"}, False),
        ("/", {"host": "localhost:7860"}, True),
        ("/", {"host": "rebound.example:7860"}, False),
        ("/", {"host": ""}, False),
        ("/gradio_api/queue/join", {"origin": "http://127.0.0.1:7860"}, True),
        ("/gradio_api/queue/join", {"origin": "https://evil.example"}, False),
        ("/gradio_api/queue/join", {"origin": "null"}, False),
        ("/gradio_api/queue/join", {"origin": "http://127.0.0.1:8888"}, False),
        ("/gradio_api/queue/data", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, False),
        ("/", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True),
        ("/config", {"sec-fetch-site": "same-site", "sec-fetch-mode": "navigate"}, False),
        ("/gradio_api/file=/etc/passwd", {}, False),
        ("/gradio_api/upload", {}, False),
    ],
)
def test_the_server_answers_its_own_pages_only(path, headers, answered):
    sent = []

    async def app(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    headers = {"host": "127.0.0.1:7860"} | headers
    scope = {"type": "http", "method": "GET", "path": path}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Guard(app)(scope, None, send))
    assert sent[0]["status"] == (200 if answered else 403)
    if answered:
        assert (b"content-security-policy", b"frame-ancestors 'none'") in sent[0]["headers"]
