"""Lines of the package that only one backend uses, by the graph of imports; the plug-in is not counted.

python -m scripts.count_backend_lines
"""

from __future__ import annotations

from pathlib import Path

import grimp
from rich.console import Console
from rich.table import Table

PACKAGE = "mindspeed_simpo"
BACKENDS = ("megatron", "fsdp")


def main() -> None:
    """Print the lines of each backend, and of what both use."""
    graph = grimp.build_graph(PACKAGE)
    # modules that name the other backend choose between the two
    for module in (f"{PACKAGE}.training.backends", f"{PACKAGE}.cli.check"):
        for backend in BACKENDS:
            for imported in graph.find_modules_directly_imported_by(module):
                if backend in imported or "sharded" in imported:
                    graph.remove_import(importer=module, imported=imported)
    used = {name: _reached(graph, f"{PACKAGE}.training.backends.{name}") for name in BACKENDS}
    everything = {name for name in graph.modules if not name.startswith(f"{PACKAGE}.integrations")}
    rest = everything - used["megatron"] - used["fsdp"]
    table = Table("lines", "", "modules")
    only = {name: used[name] - used[other] for name, other in zip(BACKENDS, reversed(BACKENDS), strict=True)}
    for title, modules in (
        ("only backend: megatron", only["megatron"]),
        ("only backend: fsdp", only["fsdp"]),
        ("both", (used["megatron"] & used["fsdp"]) | rest),
    ):
        table.add_row(str(sum(map(_lines, modules))), title, str(len(modules)))
    Console().print(table)


def _reached(graph: grimp.ImportGraph, module: str) -> set[str]:
    return {module, *graph.find_upstream_modules(module)}


def _lines(module: str) -> int:
    path = Path(__file__).parent.parent / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return len(file.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    main()
