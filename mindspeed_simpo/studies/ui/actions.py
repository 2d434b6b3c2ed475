"""What the page does. Each function judges what it gets by itself: a browser may send what no form has."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import read_configuration, validate
from mindspeed_simpo.config.recipes import recipes
from mindspeed_simpo.errors import ConfigError, SimpoError
from mindspeed_simpo.studies.ui import curves, form, runs, views
from mindspeed_simpo.studies.ui.root import Root
from mindspeed_simpo.studies.whole_file import write_whole

NEWEST, EVERY = "newest", "every step"
_MARK = "# Written by `mindspeed-simpo ui`."
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_MOST_RANKS = 1024
_T = TypeVar("_T")


class Actions:
    """The functions of the page for one root folder."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self._checks: set[subprocess.Popen[str]] = set()

    def close(self) -> None:
        """End the checks that run. Training goes on."""
        for process in list(self._checks):
            process.kill()

    # The form

    def choices(self) -> list[Any]:
        """What can be begun with, and the runs, when the page opens."""
        names = runs.find_runs(self.root)
        states = {name: self._try(runs.describe, name) for name in names[:20]}
        first = next((name for name, run in states.items() if isinstance(run, runs.Run) and run.alive), None)
        chosen = first or (names[0] if names else None)
        return [self._sources(), gr.Dropdown(names, value=chosen), gr.Dropdown(names)]

    def preview(self, ranks: Any, base: Any, name: Any, *entries: Any) -> tuple[str, str, str]:
        """What is wrong with the form, its YAML, and the command that does the same."""
        try:
            config, nproc = self._judged(ranks, entries)
        except SimpoError as error:
            return views.notice("bad", str(error)), "", ""
        values = form.changed(config)
        good = views.notice("good", "The form is valid. Check looks at the model and the data.")
        return good, form.to_yaml(values), self._command(values, base, name, nproc)

    def load(self, source: Any, ranks: Any) -> list[Any]:
        """Fill the form from a recipe or a YAML file."""
        try:
            values = self._values_of(source)
        except SimpoError as error:
            keep = [gr.skip() for _ in form.fields()]
            return [*keep, gr.skip(), views.notice("bad", str(error)), gr.skip(), gr.skip()]
        return self._filled(str(source), values, ranks)

    def edit(self, run: Any, ranks: Any) -> list[Any]:
        """Fill the form from the configuration of a run."""
        try:
            values = runs.values_of(self.root, run)
        except SimpoError as error:
            keep = [gr.skip() for _ in form.fields()]
            message = views.notice("bad", str(error))
            return [*keep, gr.skip(), message, gr.skip(), gr.skip(), gr.Tabs(selected="configure")]
        return [*self._filled("", values, ranks), gr.Tabs(selected="configure")]

    def save(self, ranks: Any, _base: Any, name: Any, *entries: Any) -> tuple[str, Any]:
        """Write the form to ``configs/NAME.yaml``; a file that the page has not written stays as it is."""
        try:
            config, _ = self._judged(ranks, entries)
            path = self._saved_path(name)
            if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
                raise ConfigError(f"{self.root.name(path)} was not written by the page: take another name")
            path.parent.mkdir(exist_ok=True)
            write_whole(path, f"{_MARK}\n{form.to_yaml(form.changed(config))}")
        except (SimpoError, OSError) as error:
            return views.notice("bad", str(error)), gr.skip()
        return views.notice("good", f"Saved: {self.root.name(path)}"), self._sources()

    def check(self, ranks: Any, _base: Any, _name: Any, *entries: Any) -> Iterator[str]:
        """What ``mindspeed-simpo check`` says of the form, as it says it."""
        try:
            config, nproc = self._judged(ranks, entries)
        except SimpoError as error:
            yield views.notice("bad", str(error))
            return
        yield views.notice("hint", "Checking: model and data are read ...")
        said: list[str] = []
        with tempfile.TemporaryDirectory(prefix="mindspeed-simpo-ui-") as folder:
            file = Path(folder) / "form.yaml"
            file.write_text(form.to_yaml(form.changed(config)), encoding="utf-8")
            words = [sys.executable, "-m", "mindspeed_simpo", "check", str(file), "--nproc-per-node", str(nproc)]
            process = subprocess.Popen(
                words,
                cwd=self.root.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=runs.environment(),
            )
            self._checks.add(process)
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    said.append(line)
                    yield views.terminal("".join(said[-2000:]))
                code = process.wait()
            finally:
                process.kill()
                process.wait()
                self._checks.discard(process)
        yield views.checked(code, "".join(said[-2000:]))

    # Runs

    def start(self, ranks: Any, _base: Any, _name: Any, *entries: Any) -> list[Any]:
        """Start training with the form, and show the run."""
        try:
            _, nproc = self._judged(ranks, entries)
            name = runs.start(self.root, form.read(entries), nproc)
        except (SimpoError, OSError) as error:
            return [views.notice("bad", str(error)), gr.skip(), gr.skip(), gr.skip()]
        names = runs.find_runs(self.root)
        shown = views.notice("good", f"Started: {name}")
        return [shown, gr.Tabs(selected="runs"), gr.Dropdown(names, value=name), gr.Dropdown(names)]

    def found(self) -> list[Any]:
        """The runs below the root folder, looked for again."""
        names = runs.find_runs(self.root)
        return [gr.Dropdown(names), gr.Dropdown(names)]

    def stop(self, run: Any) -> str:
        """Ask a run to save and end."""
        return self._told(lambda: runs.stop(self.root, run), f"Asked {run} to save and stop.")

    def kill(self, run: Any) -> str:
        """Kill a run that was asked to stop."""
        return self._told(lambda: runs.stop(self.root, run, kill=True), f"Killed {run}.")

    def resume(self, run: Any) -> str:
        """Go on with a run from its newest checkpoint."""
        return self._told(lambda: runs.resume(self.root, run), f"Resumed {run}.")

    def refresh_all(self, run: Any, compared: Any, step: Any) -> list[Any]:
        """Everything that is shown of a run."""
        return self.refresh(run, compared, step, None)

    def refresh(self, run: Any, compared: Any, step: Any, seen: Any) -> list[Any]:
        """What is shown of a run; curves and answers only where they have changed since ``seen``."""
        hidden = gr.Button(visible=False)
        unchanged = [gr.skip()] * (len(curves.PANELS) + 3)
        if not run:
            return [gr.skip(), hidden, hidden, hidden, hidden, gr.skip(), seen, *unchanged]
        try:
            shown = list(dict.fromkeys([run, *(compared or [])]))
            about = runs.describe(self.root, run)
            now = {"curves": (*curves.state_of(self.root, shown), step), "log": about.log}
            before = seen or {"curves": None, "log": None}
            changed = unchanged if now["curves"] == before["curves"] else self._drawn(shown, step)
        except SimpoError as error:
            return [views.notice("bad", str(error)), hidden, hidden, hidden, hidden, gr.skip(), None, *unchanged]
        return [
            views.state(about),
            gr.Button(visible=about.state == "running"),
            gr.Button(visible=about.state == "stopping"),
            gr.Button(visible=not about.alive and about.state != "finished"),
            gr.Button(visible=True),
            views.terminal(about.log) if about.log != before["log"] else gr.skip(),
            now,
            *changed,
        ]

    # Parts

    def _drawn(self, shown: Sequence[str], step: Any) -> list[Any]:
        lines = {run: curves.read_lines(self.root, run, "metrics.jsonl") for run in shown}
        samples = curves.read_lines(self.root, shown[0], "samples.jsonl")
        steps = curves.sample_steps(samples)
        chosen = step if step in (NEWEST, EVERY) else int(step) if str(step).isdigit() else NEWEST
        if isinstance(chosen, int) and chosen not in steps:
            chosen = NEWEST
        of_step = None if chosen == EVERY else chosen if isinstance(chosen, int) else next(iter(steps), None)
        choices = gr.Dropdown([NEWEST, EVERY, *map(str, steps)], value=str(chosen))
        figures = curves.figures(lines)
        return [curves.alarms(lines[shown[0]]), *figures, choices, curves.answers(samples, of_step)]

    def _judged(self, ranks: Any, entries: Sequence[Any]) -> tuple[Config, int]:
        """The configuration of a form whose paths all lie in the root folder.

        Raises:
            ConfigError: naming everything that is wrong.
        """
        values = form.read(entries)
        self.root.check(values)
        whole = isinstance(ranks, (int, float)) and ranks == int(ranks)
        if not whole or not 1 <= ranks <= _MOST_RANKS:
            raise ConfigError(f"ranks: expected a whole number from 1 to {_MOST_RANKS}, found {ranks!r}")
        return form.validated(values, int(ranks)), int(ranks)

    def _filled(self, source: str, values: Mapping[str, Any], ranks: Any) -> list[Any]:
        entries = form.entries_of(values)
        base: dict[str, Any] = {"source": source, "values": {}}
        try:
            base["values"] = form.changed(validate(dict(values), where=source))
        except ConfigError:
            base["source"] = ""
        return [*entries, base, *self.preview(ranks, base, "", *entries)]

    def _values_of(self, source: Any) -> dict[str, Any]:
        if not isinstance(source, str) or not source.strip():
            raise ConfigError("choose a recipe or a YAML file first")
        shipped = {recipe.name: recipe.path for recipe in recipes()}
        if source in shipped and not (self.root.folder / source).exists():
            path = shipped[source]
        else:
            path = self.root.inside(source, "configuration")
            if path.suffix not in (".yaml", ".yml"):
                raise ConfigError(f"configuration: {source}: expected a .yaml file")
        values = {key: value for key, value in read_configuration(path).items() if value is not None}
        unknown = [key for key in values if key not in Config.model_fields]
        if unknown:
            validate(values, where=source)  # names each of them, and what may be meant
        template = values.get("chat_template")
        if isinstance(template, str) and Path(template).is_relative_to(self.root.folder):
            values["chat_template"] = self.root.name(Path(template))
        return values

    def _sources(self) -> Any:
        names = [*runs.configurations(self.root), *(recipe.name for recipe in recipes())]
        return gr.Dropdown(list(dict.fromkeys(names)))

    def _saved_path(self, name: Any) -> Path:
        name = str(name or "").removesuffix(".yaml")
        if not _NAME.fullmatch(name):
            raise ConfigError(f"name: expected letters, digits, `-`, `_` or `.`, found {name[:100]!r}")
        return self.root.inside(f"configs/{name}.yaml", "name")

    def _command(self, values: Mapping[str, Any], base: Any, name: Any, nproc: int) -> str:
        base = base if isinstance(base, dict) else {}
        source = str(base.get("source", ""))
        if source:
            try:
                return form.command(values, source, base["values"], nproc)
            except ConfigError:
                pass
        file = f"configs/{str(name or 'NAME').removesuffix('.yaml')}.yaml"
        return f"# after Save\n{form.command(values, file, values, nproc)}"

    def _try(self, work: Callable[[Root, str], _T], name: str) -> _T | None:
        try:
            return work(self.root, name)
        except SimpoError:
            return None

    def _told(self, work: Callable[[], Any], done: str) -> str:
        try:
            work()
        except (SimpoError, OSError) as error:
            return views.notice("bad", str(error))
        return views.notice("hint", done)
