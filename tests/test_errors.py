"""docs/errors.md lists the errors that the code raises, and no others."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import chiasm
from chiasm.errors import ChiasmError, Code, ConfigurationError

ROOT = Path(__file__).parents[1]
_ROW = re.compile(r"^\| (\d{3}) \| `(\w+)` \|(?: `(\w+)` \|)? (.+?) \|", re.MULTILINE)
_PACKAGES = ("http", "media", "models", "proxy", "server", "engine", "ec_transfer", "kv_transfer")


def rows() -> list[tuple[int, str, str, str]]:
    """Status, type, code and meaning of each row of the tables."""
    page = (ROOT / "docs/errors.md").read_text()
    return [(int(status), kind, code, meaning) for status, kind, code, meaning in _ROW.findall(page)]


def error_classes() -> dict[str, type[ChiasmError]]:
    """Every class of errors that a client can be answered with, by its name."""
    for package in _PACKAGES:
        parent = importlib.import_module(f"chiasm.{package}")
        for module in pkgutil.walk_packages(parent.__path__, f"{parent.__name__}."):
            importlib.import_module(module.name)
    found: dict[str, type[ChiasmError]] = {}
    pending: list[type[ChiasmError]] = [ChiasmError]
    while pending:
        one = pending.pop()
        if issubclass(one, ConfigurationError):
            continue
        if one.__module__.split(".")[1] in {"errors", *_PACKAGES}:
            found[one.__name__] = one
        pending += one.__subclasses__()
    return found


def raised_codes() -> Iterator[tuple[str, str, str]]:
    """Where an error is made with a code: the place, the name of the class and the name of the code."""
    for file in Path(chiasm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            for keyword in node.keywords:
                if keyword.arg != "code":
                    continue
                place = f"{file.relative_to(ROOT)}:{node.lineno}"
                assert not isinstance(keyword.value, ast.Constant) or keyword.value.value is None, (
                    f"{place}: use a member of Code"
                )
                if isinstance(keyword.value, ast.Attribute) and ast.unparse(keyword.value.value) == "Code":
                    yield place, ast.unparse(node.func).rpartition(".")[2], keyword.value.attr


def test_every_status_and_type_is_documented() -> None:
    documented = {(status, kind) for status, kind, code, _ in rows() if not code}
    assert documented == {(one.status, one.kind) for one in error_classes().values()}


def test_every_code_is_documented_with_its_meaning() -> None:
    documented = [(code, meaning) for _, _, code, meaning in rows() if code]
    assert [code for code, _ in documented] == [code.value for code in Code]
    source = (ROOT / "src/chiasm/errors.py").read_text().replace("``", "`")
    for code, meaning in documented:
        assert f'= "{code}"\n    """{meaning}"""' in source


def test_every_code_is_raised_with_the_documented_status_and_type() -> None:
    classes = error_classes()
    documented = {code: (status, kind) for status, kind, code, _ in rows() if code}
    seen: set[str] = set()
    for place, name, member in raised_codes():
        code = Code[member].value
        seen.add(code)
        if name in classes:
            assert (classes[name].status, classes[name].kind) == documented[code], place
    source = "".join(file.read_text() for file in Path(chiasm.__file__).parent.rglob("*.py"))
    assert {code.value for code in Code if f"Code.{code.name}" not in source} == set()
