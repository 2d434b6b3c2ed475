"""The scripts and the tests against MindSpeed-LLM import names that exist: most of them run by hand only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("mindspeed_simpo", "scripts", "tests")
FILES = sorted([*ROOT.glob("tests/upstream/*.py"), *ROOT.glob("scripts/*.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_name_imported_from_the_project_exists(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith(ROOMS):
            continue
        path = ROOT.joinpath(*str(node.module).split("."))
        there = (
            {module.stem for module in path.glob("*")} | _bound(path / "__init__.py") | _bound(path.with_suffix(".py"))
        )
        absent = {name.name for name in node.names} - there
        assert not absent, f"{file}:{node.lineno}: {node.module} has no {', '.join(sorted(absent))}"


def _bound(file: Path) -> set[str]:
    """The names that ``file`` binds at its top level, under conditions too; none where there is no such file."""
    statements = ast.parse(file.read_text()).body if file.exists() else []
    names: set[str] = set()
    for node in statements:
        if isinstance(node, (ast.If, ast.Try)):
            statements += node.body + node.orelse
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
            names |= {name.id for name in found if isinstance(name.ctx, ast.Store)}
    return names
