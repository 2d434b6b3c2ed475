"""The workers of the MindSpeed-LLM tests and the scripts import names that exist: nothing else here imports them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("tests/upstream/*.py"), *ROOT.glob("scripts/*.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_name_imported_from_the_project_exists(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith(("mindspeed_simpo", "tests")):
            continue
        path = ROOT.joinpath(*str(node.module).split("."))
        there = (
            {module.stem for module in path.glob("*")} | _bound(path / "__init__.py") | _bound(path.with_suffix(".py"))
        )
        absent = {name.name for name in node.names} - there
        assert not absent, f"{file}:{node.lineno}: {node.module} has no {', '.join(sorted(absent))}"


def _bound(file: Path) -> set[str]:
    """Every name that ``file`` binds, of any scope; none where there is no such file."""
    nodes = list(ast.walk(ast.parse(file.read_text()))) if file.exists() else []
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    aliases = [alias for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    return names | {alias.asname or alias.name for alias in aliases}
