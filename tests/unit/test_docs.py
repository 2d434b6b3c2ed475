"""What the documentation says is so: links, keys, defaults, commands, and both languages alike."""

import ast
import importlib
import re
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from rich.table import Table

from mindspeed_simpo.cli import flags
from mindspeed_simpo.cli import main as cli
from mindspeed_simpo.cli.command import resolve, world_size
from mindspeed_simpo.cli.commands import COMMANDS
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import load_config, validate
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.errors import ConfigError

REPO = Path(__file__).parents[2]
ENGLISH, CHINESE = REPO / "README.md", REPO / "README.zh-CN.md"
PAGES = [ENGLISH, CHINESE, REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md", *sorted(REPO.glob("docs/*.md"))]
EVALUATE = REPO / "docs" / "evaluate.md"
# pages about another program, whose flags and names are its own
FOREIGN = {"plugin.md", "ascend.md", "ascend.zh-CN.md", EVALUATE.name}
OWN = [page for page in PAGES if page.name not in FOREIGN]
COMMANDED = [page for page in [*OWN, EVALUATE] if "mindspeed-simpo " in page.read_text(encoding="utf-8")]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_KEY_VALUE = re.compile(r"([a-z][a-z0-9_]*): (\S.*)")
_NAME = re.compile(r"[a-z]{2,}(_[a-z0-9]{2,})+")
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")
_OTHER_FLAGS = {
    "nproc-per-node",
    "checkpoint",
    "output",
    "against",
    "part",
    "max-pairs",
    "shown-pairs",
    "output-prefix",
    "merge-adapters",
    "help",
    "stage",
    "dpo-exact",
    "signal",
    "devices",
    "device-kind",
    "device-file",
    "lengths",
    "top",
    "write",
}


def read(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    return [body for kind, body in _FENCE.findall(read(page)) if kind == language]


def prose(page):
    return _FENCE.sub("", read(page))


def spans(page):
    """Inline code."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))


def anchors(page):
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page):
    """Command lines of the shell blocks, without comments and environment variables."""
    for body in blocks(page, "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for link in _LINK.findall(prose(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=lambda page: page.name)
def test_every_page_can_be_reached(readme):
    linked = {link.partition("#")[0].replace(".zh-CN", "") for link in _LINK.findall(prose(readme))}
    assert {f"docs/{page.name}".replace(".zh-CN", "") for page in REPO.glob("docs/*.md")} <= linked


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.name)
def test_keys_in_yaml_exist(page):
    for body in blocks(page, "yaml"):
        values = yaml.safe_load(body)
        validate({"model_name_or_path": "model", "data_path": "pairs.jsonl"} | values, where=page.name)


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.name)
def test_keys_and_values_in_the_text_exist(page):
    for span in spans(page):
        match = _KEY_VALUE.fullmatch(span)
        if match is None or "..." in span:
            continue
        key, value = match.groups()
        assert key in Config.model_fields, f"{page.name}: `{span}`"
        rest = {"model_name_or_path": "model", "data_path": "pairs.jsonl"}
        complaint = complaint_about(rest | {key: yaml.safe_load(value)})
        assert f"`{key}`" not in complaint, f"{page.name}: `{span}`: {complaint}"


def complaint_about(values):
    try:
        validate(values, where="docs")
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.name)
def test_flags_exist(page):
    options = {name.replace("_", "-") for name in Config.model_fields}
    scripts = {name for path in REPO.glob("scripts/**/*.py") for name in re.findall(r'"--([a-z-]+)"', read(path))}
    own = {argument[0].replace("_", "-") for command in COMMANDS for argument in command.arguments}
    known = options | {f"no-{name}" for name in options} | own | _OTHER_FLAGS | scripts
    for span in spans(page):
        if span.startswith(("mindspeed-simpo ", "--")):
            assert set(_FLAG.findall(span)) <= known, f"{page.name}: `{span}`"


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.name)
def test_names_in_the_text_are_in_the_code(page):
    folders = ("mindspeed_simpo", "configs", "scripts", "tests/unit/test_docs.py", "tests/oracle.py")
    files = [path for name in folders for path in [REPO / name, *(REPO / name).rglob("*")] if path.is_file()]
    files = [path for path in files if path.suffix in (".py", ".yaml", ".sh", ".json")]
    code = set().union(*(re.findall(r"\w+", read(path)) for path in files)) | {"mindspeed_simpo"}
    others = {"num_key_value_heads", "num_attention_heads", "save_to_disk", "good_answer", "bad_answer"}
    for span in spans(page):
        if _NAME.fullmatch(span) and page.name not in ("log.md", "mathematics.md"):  # other programs, symbols
            assert span in code | others, f"{page.name}: `{span}`"


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.name)
def test_files_in_the_text_exist(page):
    for span in spans(page):
        path = span.split()[-1] if span.startswith(("bash ", "python ")) else span
        if re.match(r"(scripts|tests|mindspeed_simpo|configs|docs)/", path):
            assert (REPO / path).exists() or (REPO / path.split("::")[0]).exists(), f"{page.name}: `{span}`"


@pytest.mark.parametrize("page", COMMANDED, ids=lambda page: page.name)
def test_commands_parse(page, tmp_path, monkeypatch):
    """Up to the point where the data and the model would be read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    for body in blocks(page, "yaml"):
        if name := re.match(r"# (\S+\.yaml)\n", body):
            (tmp_path / name.group(1)).write_text(body, encoding="utf-8")
    for words in commands(page):
        argv = words[1:] if words[0] == "mindspeed-simpo" else None
        for variable in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(variable, raising=False)
        if words[0] == "torchrun":
            module = words.index("mindspeed_simpo")
            options = dict(zip(words[1 : module - 1 : 2], words[2 : module - 1 : 2], strict=True))
            monkeypatch.setenv("RANK", "0")
            monkeypatch.setenv("WORLD_SIZE", str(int(options["--nnodes"]) * int(options["--nproc-per-node"])))
            argv = words[module + 1 :]
        if argv is not None:
            command = cli.parse(argv)
            [declared] = [declared for declared in COMMANDS if declared.name == argv[0]]
            if declared.on_ranks:
                config, ranks = resolve(command)
                assert make_layout(config, world_size(ranks)).data >= 1
            elif declared.configured:
                load_config(command.config, flags.given(command))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_other_commands_name_what_is_there(page):
    for words in commands(page):
        if words[0] in ("bash", "python") and words[1] not in ("-m", "-c"):
            assert (REPO / words[1]).is_file(), f"{page.name}: {words}"
        if words[:2] == ["bash", "scripts/test.sh"] and len(words) > 2:
            assert re.search(rf"^(.* \| )?{words[2]}( \| .*)?\)", read(REPO / "scripts/test.sh"), re.MULTILINE)


DEPENDS = {"bf16": ("`true`, on CPU `false`", "`true`；CPU 上 `false`")}


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=lambda page: page.name)
def test_defaults_in_the_tables(readme):
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \|$", prose(readme), re.MULTILINE)
    assert len(rows) > 20
    for key, shown in rows:
        field = Config.model_fields[key]
        if field.is_required():
            assert shown in ("required", "必填"), key
        elif field.default is None:
            assert shown in DEPENDS.get(key, ("-",)), key
        else:
            value = yaml.safe_load(shown.strip("`"))
            assert load_default(key, value) == field.default, key


def load_default(key, value):
    return getattr(validate({"model_name_or_path": "m", "data_path": "d", key: value}, where="docs"), key)


@pytest.mark.parametrize("page", [ENGLISH, CHINESE, REPO / "docs" / "training.md"], ids=lambda page: page.name)
def test_messages_in_troubleshooting_are_those_of_the_code(page):
    trees = [ast.parse(read(path)) for path in (REPO / "mindspeed_simpo").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant)]
    messages = {re.sub(r"{.*?}", "\0", ast.unparse(node)) for node in nodes}
    table = re.split(r"^## (?:Troubleshooting|问题排查)$", prose(page), flags=re.MULTILINE)[1].partition("\n## ")[0]
    shown = [
        span for cell in re.findall(r"^\| ([^|]*)\|", table, re.MULTILINE) for span in re.findall("`([^`]+)`", cell)
    ]
    fragments = [part.strip() for span in shown for part in re.split(r"\.\.\.|;|\b[NM]\b", span)]
    fragments = [fragment for fragment in fragments if len(fragment.split()) > 1]
    assert len(fragments) > 5
    assert [fragment for fragment in fragments if not any(fragment in message for message in messages)] == []


FAQ = REPO / "docs" / "faq.md", REPO / "docs" / "faq.zh-CN.md"


@pytest.mark.parametrize("pages", [(ENGLISH, CHINESE), FAQ], ids=["readme", "faq"])
def test_both_languages_have_the_same_sections_and_code(pages):
    english, chinese = pages

    def outline(page):
        return re.findall(r"^#+(?= )", prose(page), re.MULTILINE)

    def code(page):
        return [(kind, re.sub(r" *#.*", "", body)) for kind, body in _FENCE.findall(read(page))]

    def rows(page):
        """First cell of each table row that is code, and the links to other pages."""
        cells = re.findall(r"^\| (`[^|]+`) \|", prose(page), re.MULTILINE)
        links = {link.replace(".zh-CN", "") for link in _LINK.findall(prose(page)) if not link.startswith("#")}
        return cells, sorted(links - {english.name})

    assert outline(english) == outline(chinese)
    assert code(english) == code(chinese)
    assert rows(english) == rows(chinese)


def test_the_tables_of_options_are_current(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "scripts")
    script = importlib.import_module("make_configuration_docs")
    assert read(script.OUTPUT) == script.render(), "run python scripts/make_configuration_docs.py"
    assert read(script.PLUGIN) == script.render_plugin(read(script.PLUGIN)), (
        "run python scripts/make_configuration_docs.py"
    )


def test_the_picture_is_whole_and_stands_alone(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(REPO / "scripts")
    picture = importlib.import_module("make_picture")
    log = tmp_path / "run.log"
    log.write_text("2026 INFO eval step 0/2  loss 1.0000\n2026 INFO saved x\n2026 INFO eval step 2/2  loss 0.5000\n")
    lines = list(picture.evaluation_lines(log))
    assert lines == ["eval step 0/2  loss 1.0000", "eval step 2/2  loss 0.5000"]
    for svg in (picture.draw(lines, Table("before", "after")), read(REPO / "docs" / "quickstart.svg")):
        text = "".join(ET.fromstring(svg).itertext()).replace("\xa0", " ")
        assert "bash scripts/quickstart.sh" in text
        assert "eval step 0/" in text
        assert "after" in text
        # an image on a page may not fetch anything
        assert not re.search(r"url\([^#]|href|@import", svg)


def test_quickstart_is_what_the_readme_says():
    shown = "".join(ET.fromstring(read(REPO / "docs" / "quickstart.svg")).itertext()).replace("\xa0", " ")
    accuracies = re.findall(r"accuracy (\d\.\d+)", shown)
    before, after = re.search(r"right answers\D*(\d+)\D+(\d+)", shown).groups()
    steps = load_config(REPO / "configs" / "quickstart.yaml").train_iters
    chance = round(100 * float(accuracies[0]))
    reached = round(100 * float(accuracies[-1]))
    assert before == "0"
    english, chinese = (" ".join(read(page).split()) for page in (ENGLISH, CHINESE))
    later = f"{steps} steps later it ranks {reached} % of them right"
    for part in (f"ranks {chance} % of the held-out", later, f"answers {after} of the 90 questions"):
        assert part in english
    for part in (
        f"只有 {chance} % 判断正确",
        f"训练 {steps} 步之后 {reached} % 判断 正确",
        f"90 个问题答对 {after} 个",
    ):
        assert part in chinese
