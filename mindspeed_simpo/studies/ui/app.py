"""The page itself: its parts, laid out, and which function each of them calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from mindspeed_simpo.config.options import OPTION_GROUPS
from mindspeed_simpo.objectives import DEFAULT_STAGE, OBJECTIVES
from mindspeed_simpo.studies.ui import curves, form
from mindspeed_simpo.studies.ui.actions import NEWEST, Actions
from mindspeed_simpo.studies.ui.form import Field

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
REFRESH_S = 2.0
_OPEN_GROUPS = 2
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "sans-serif"]
_MONO = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def theme() -> Any:
    """Colours, and fonts that the reader's system has: nothing is fetched."""
    return gr.themes.Soft(primary_hue="blue", neutral_hue="slate", font=_FONTS, font_mono=_MONO, radius_size="md")


def build(actions: Actions) -> Any:
    """The page.

    Args:
        actions: What it does.

    Returns:
        ``gradio.Blocks``, not yet served.
    """
    with gr.Blocks(title="mindspeed-simpo", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            '<div class="head"><h1>mindspeed-simpo</h1><p>Preference training: fill in what differs from the defaults, '
            "check it, start it, watch it.</p></div>"
        )
        with gr.Tabs() as tabs:
            with gr.Tab("Configure", id="configure"):
                configure = _Configure(actions)
            with gr.Tab("Runs", id="runs") as shown:
                runs = _Runs(actions)
        configure.connect(actions, tabs, runs)
        runs.connect(actions, tabs, configure)
        shown.select(actions.found, None, [runs.run, runs.compare], **_quiet())
        page.load(actions.choices, None, [configure.source, runs.run, runs.compare], **_quiet())
    return page


class _Configure:
    """The form, and beside it what is wrong with it, what ``check`` says, and the configuration that it gives."""

    def __init__(self, actions: Actions) -> None:
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                with gr.Row(elem_classes="bar"):
                    self.source = gr.Dropdown(
                        [],
                        label="Begin with",
                        info=f"A recipe, or a YAML file in {actions.root.shown}.",
                        allow_custom_value=True,
                        scale=4,
                        elem_id="source",
                    )
                    self.load = gr.Button("Load", scale=1, min_width=90, elem_id="load")
                self.entries, self.objectives = _form()
            with gr.Column(scale=2, min_width=320, elem_classes="aside"):
                with gr.Row(elem_classes="bar"):
                    self.ranks = gr.Number(1, label="Ranks", precision=0, minimum=1, elem_id="ranks")
                    self.check = gr.Button("Check", elem_id="check", min_width=90)
                    self.start = gr.Button("Start training", variant="primary", elem_id="start", min_width=130)
                self.verdict = gr.HTML(elem_id="verdict")
                self.answer = gr.HTML(
                    '<p class="hint"><b>Check</b> reads model and data and says what training would meet: lengths, '
                    "memory, layout, warnings.</p>",
                    elem_id="answer",
                )
                self.yaml = gr.Code(
                    label="Configuration (YAML)", language="yaml", interactive=False, wrap_lines=True, elem_id="yaml"
                )
                self.words = gr.Code(
                    label="The same in a terminal",
                    language="shell",
                    interactive=False,
                    wrap_lines=True,
                    elem_id="words",
                )
                with gr.Row(elem_classes="bar"):
                    self.name = gr.Textbox("", label="Save as configs/NAME.yaml", placeholder="NAME", elem_id="name")
                    self.save = gr.Button("Save", scale=0, min_width=90, elem_id="save")
                self.said = gr.HTML(elem_id="saved")
        self.base = gr.State({"source": "", "values": {}})

    def connect(self, actions: Actions, tabs: Any, runs: _Runs) -> None:
        filled = [self.ranks, self.base, self.name, *self.entries]
        shown = [self.verdict, self.yaml, self.words]
        edits = [part.change for part in (*self.entries, self.ranks, self.name)]
        gr.on(edits, actions.preview, filled, shown, trigger_mode="always_last", concurrency_limit=1, **_quiet())
        loaded = [*self.entries, self.base, *shown]
        self.load.click(actions.load, [self.source, self.ranks], loaded, **_quiet())
        stage = self.entries[[field.name for field in form.fields()].index("stage")]
        stage.change(_visible, stage, self.objectives, **_quiet())
        self.check.click(actions.check, filled, self.answer, concurrency_limit=4, show_progress="hidden", **_private())
        self.start.click(
            actions.start, filled, [self.answer, tabs, runs.run, runs.compare], concurrency_limit=4, **_private()
        )
        self.save.click(actions.save, filled, [self.said, self.source], **_quiet())


class _Runs:
    """One run, and others beside it: state, curves, answers and log."""

    def __init__(self, actions: Actions) -> None:
        with gr.Row(elem_classes="bar"):
            self.run = gr.Dropdown(
                [], label="Run", info=f"Folders of runs in {actions.root.shown}.", scale=3, min_width=250, elem_id="run"
            )
            self.compare = gr.Dropdown(
                [],
                label="Compare with",
                info="Curves of other runs.",
                multiselect=True,
                scale=3,
                min_width=250,
                elem_id="compare",
            )
            self.find = gr.Button("Find runs", scale=0, min_width=100, elem_id="find")
        self.state = gr.HTML('<p class="hint">No run yet: start one from the form.</p>', elem_id="state")
        with gr.Row(elem_classes="actions"):
            self.stop = gr.Button("Stop (saves first)", variant="stop", visible=False, elem_id="stop", min_width=120)
            self.kill = gr.Button("Kill (saves nothing)", variant="stop", visible=False, elem_id="kill", min_width=120)
            self.resume = gr.Button("Resume", visible=False, elem_id="resume", min_width=120)
            self.edit = gr.Button("Open in the form", visible=False, elem_id="edit", min_width=120)
        self.said = gr.HTML(elem_id="said")
        self.alarms = gr.HTML(elem_id="alarms")
        self.plots = []
        with gr.Row(elem_classes="curves"):
            for panel in curves.PANELS:
                with gr.Column(elem_classes="curve"):
                    gr.HTML(f'<p class="title">{panel.title}</p><p class="hint">{panel.how_to_read}</p>')
                    self.plots.append(gr.Plot(show_label=False, container=False))
        with gr.Accordion("Sample answers", open=True):
            self.step = gr.Dropdown([NEWEST], value=NEWEST, label="Step", elem_id="step")
            self.samples = gr.HTML(elem_id="samples")
        with gr.Accordion("Log", open=False):
            self.log = gr.HTML(elem_id="log")
        self.seen = gr.State(None)
        self.timer = gr.Timer(REFRESH_S)

    def connect(self, actions: Actions, tabs: Any, configure: _Configure) -> None:
        outputs = [self.state, self.stop, self.kill, self.resume, self.edit, self.log, self.seen, self.alarms]
        outputs += [*self.plots, self.step, self.samples]
        inputs = [self.run, self.compare, self.step, self.seen]
        self.timer.tick(actions.refresh, inputs, outputs, concurrency_limit=4, **_quiet())
        gr.on(
            [self.run.change, self.compare.change, self.step.input],
            actions.refresh_all,
            inputs[:3],
            outputs,
            concurrency_limit=4,
            **_quiet(),
        )
        self.find.click(actions.found, None, [self.run, self.compare], **_quiet())
        for button, action in ((self.stop, actions.stop), (self.kill, actions.kill), (self.resume, actions.resume)):
            button.click(action, self.run, self.said, concurrency_limit=4, **_quiet()).then(
                actions.refresh_all, inputs[:3], outputs, **_quiet()
            )
        loaded = [*configure.entries, configure.base, configure.verdict, configure.yaml, configure.words]
        self.edit.click(actions.edit, [self.run, configure.ranks], [*loaded, tabs], **_quiet())


def _form() -> tuple[list[Any], list[Any]]:
    """One component for each field, in the order of the fields; and the part of each objective."""
    made: dict[str, Any] = {}
    objectives = []
    for number, group in enumerate(OPTION_GROUPS):
        title = (group.__doc__ or group.__name__).rstrip(".")
        fields = [field for field in form.fields() if field.group == title]
        with gr.Accordion(title, open=number < _OPEN_GROUPS, elem_id=group.__name__, elem_classes="fields"):
            made |= {field.name: _component(field) for field in fields if field.stage is None}
            for stage in OBJECTIVES if any(field.stage for field in fields) else ():
                with gr.Column(visible=stage == DEFAULT_STAGE, elem_id=f"objective-{stage}") as part:
                    gr.HTML(f'<p class="hint">{_about(stage)}</p>')
                    made |= {field.name: _component(field) for field in fields if field.stage == stage}
                objectives.append(part)
    return [made[field.name] for field in form.fields()], objectives


def _about(stage: str) -> str:
    objective = OBJECTIVES[stage]
    reference = "needs a reference model" if objective.needs_reference else "no reference model"
    return f"<b>{objective.title}</b>, {reference}. Source: {objective.source}."


def _visible(stage: str) -> list[Any]:
    return [gr.Column(visible=shown == stage) for shown in OBJECTIVES]


def _component(field: Field) -> Any:
    facts = {"label": field.name, "info": field.hint, "elem_id": f"key-{field.name}"}
    if field.kind == "switch":
        return gr.Checkbox(value=bool(field.initial), **facts)
    if field.kind == "choice":
        empty = [] if field.initial else [("default", "")]
        return gr.Dropdown([*empty, *((choice, choice) for choice in field.choices)], value=field.initial, **facts)
    lines = 2 if field.kind == "lines" else 1
    return gr.Textbox("", lines=lines, max_lines=8, placeholder=field.default, **facts)


def _private() -> dict[str, Any]:
    return {"api_visibility": "private"}


def _quiet() -> dict[str, Any]:
    return {"show_progress": "hidden", "api_visibility": "private"}
