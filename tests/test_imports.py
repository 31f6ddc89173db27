"""Imports go one way: a package imports only from those below it, and no two modules import each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import chiasm

SOURCE = Path(chiasm.__file__).parent
LAYERS = (
    {
        "__init__",
        "bounded_process",
        "control_groups",
        "errors",
        "wire",
        "findings",
        "heap",
        "ownership",
        "prometheus",
        "checkpoints",
        "lazy",
        "tasks",
        "yaml_text",
    },
    {"extras", "options"},
    {"connectors", "cores", "memory", "due", "chat_body", "fleet_key"},
    {"http"},
    {"media", "transfer"},
    {"models", "ec_transfer", "kv_transfer"},
    {"engine"},
    {"server", "proxy", "demo"},
    {"integrations"},
    {"launch"},
    {"doctor", "bench"},
    {"plan"},
    {"cli"},
    {"__main__"},
)
"""From the bottom to the top. A package may import from lower layers; within a layer, packages don't know each other."""
ONE_FILE_EACH = {
    "chiasm.bench.measurements",
    "chiasm.cli",
    "chiasm.integrations",
    "chiasm.media.headers",
    "chiasm.models.families",
}
"""Packages of files that nobody has to tell apart: one for each command, measurement, kind of file or family."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


@cache
def modules() -> dict[str, Path]:
    """All modules of chiasm by their dotted name."""
    found: dict[str, Path] = {}
    for file in SOURCE.rglob("*.py"):
        parts = ("chiasm", *file.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path, *, at_top: bool = False) -> Iterator[tuple[int, str]]:
    """Line and name of every module of chiasm that a file imports; with ``at_top`` not those that functions import."""
    known = modules()
    pending: list[ast.AST] = [ast.parse(file.read_text())]
    while pending:
        node = pending.pop()
        if at_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name.split(".")[0] == "chiasm")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "chiasm":
            for name in node.names:
                submodule = f"{node.module}.{name.name}"
                yield node.lineno, submodule if submodule in known else node.module


def package(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def test_every_package_has_its_place() -> None:
    assert {package(module) for module in modules()} == set(LEVEL) & {package(module) for module in modules()}


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_from_below(module: str) -> None:
    own = package(module)
    wrong = [
        f"line {line}: {imported}"
        for line, imported in imports(modules()[module])
        if package(imported) != own and LEVEL[package(imported)] >= LEVEL[own]
    ]
    assert not wrong


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {module: {name for _, name in imports(file, at_top=True)} for module, file in modules().items()}
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in finished:
            for imported in graph.get(module, ()):
                visit(imported, (*path, module))
            finished.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_every_package_says_what_its_files_are_for() -> None:
    """The docstring of each package names its files, as CONTRIBUTING.md promises; those of ``chiasm`` are in docs/design.md."""
    unnamed: list[str] = []
    for name, file in modules().items():
        parent, _, own = name.rpartition(".")
        if parent.count(".") and parent not in ONE_FILE_EACH and own != "__main__":
            named = re.findall(
                r"``(\w+)(?:\.py|/)?``", ast.get_docstring(ast.parse(modules()[parent].read_text())) or ""
            )
            if own not in named:
                unnamed.append(f"{file}: {parent} doesn't name it")
    assert not unnamed
