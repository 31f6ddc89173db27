"""The base installation runs the proxy and the doctor; what needs more says in one line what to install."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest

from chiasm.errors import ConfigurationError
from chiasm.extras import MODULES, Extra, explained, install_command, require

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = ("serve", "instance", "proxy", "demo", "models", "bench", "plan", "doctor")


def names(requirements: list[str]) -> set[str]:
    found = [re.match(r"[\w-]+", one) for one in requirements]
    return {match[0] for match in found if match} - {"chiasm"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the base installation only."""
    folder = tmp_path_factory.mktemp("base")
    hidden = sorted({module for modules in MODULES.values() for module in modules})
    code = f"import sys\nsys.modules.update(dict.fromkeys({hidden}))\n"
    (folder / "sitecustomize.py").write_text(code)
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT / 'src'}"}


def run(base: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "chiasm", *arguments]
    return subprocess.run(command, env=base, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("models",), *((one, "--help") for one in COMMANDS)]
)
def test_the_command_line_needs_no_extra(base: dict[str, str], arguments: tuple[str, ...]) -> None:
    ended = run(base, *arguments)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout


def test_the_proxy_needs_no_extra(base: dict[str, str]) -> None:
    command = [sys.executable, "-m", "chiasm", "proxy", "--aggregated", "http://127.0.0.1:9", "--port", "0"]
    process = subprocess.Popen(command, env=base, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with pytest.raises(urllib.request.HTTPError) as caught:  # 503, since nothing listens at port 9
            opener.open(f"{url}/health", timeout=60)
        with caught.value as answer:
            assert [one["role"] for one in json.load(answer)["instances"]] == ["aggregated"]
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.parametrize(
    "target", [(), ("demo",), ("demo", "--prefills", "1", "--decodes", "1", "--kv-connector", "NixlConnector")]
)
def test_the_doctor_needs_no_extra(base: dict[str, str], target: tuple[str, ...]) -> None:
    ended = run(base, "doctor", *target, "--json")
    assert ended.returncode in (0, 1), ended.stderr
    assert json.loads(ended.stdout)


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("serve", "demo"), Extra.ENGINE),
        (("demo",), Extra.ENGINE),
        (("instance", "demo", "--role", "aggregated", "--port", "0"), Extra.ENGINE),
        (("plan", "demo"), Extra.ENGINE),
        (("bench",), Extra.ENGINE),
        (("proxy", "--port", "0", "--otlp-traces-endpoint", "http://127.0.0.1:9"), Extra.OTEL),
    ],
)
def test_a_missing_extra_is_named_in_one_line(base: dict[str, str], arguments: tuple[str, ...], extra: Extra) -> None:
    ended = run(base, *arguments)
    assert ended.returncode == 2
    assert not ended.stdout
    (line,) = ended.stderr.splitlines()
    assert line.startswith("Error: ")
    assert line.endswith(f"not installed. Run {install_command(extra)} in a clone of chiasm.")


def test_a_module_of_nobody_is_not_explained() -> None:
    assert explained(ModuleNotFoundError("x", name="nobodys_module"), "x") is None
    assert explained(ImportError("libtorch.so is broken", name="torch"), "x") is None
    error = explained(ModuleNotFoundError("x", name="transformers.models"), "The test")
    assert (
        str(error)
        == "The test needs transformers, which is not installed. Run pip install '.[engine]' in a clone of chiasm."
    )


def test_what_is_installed_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    require(Extra.ENGINE, "The test")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigurationError, match=r"The test needs jinja2, which is not installed\."):
        require(Extra.ENGINE, "The test")


def test_each_extra_brings_what_it_is_said_to_bring() -> None:
    extras: dict[str, list[str]] = PROJECT["optional-dependencies"]
    assert set(extras) - {"dev"} == set(Extra)
    for extra, modules in MODULES.items():
        assert names(extras[extra]) >= {module.replace(".", "-") for module in modules}
        assert (extra in (Extra.BENCH, Extra.NIXL, Extra.ZEN)) is ("chiasm[engine]" in extras[extra])
    assert names(PROJECT["dependencies"]).isdisjoint(module for modules in MODULES.values() for module in modules)


def test_vllm_and_the_engine_are_installed_one_after_the_other() -> None:
    """vLLM 0.32 and 0.33 ask for an llguidance below 1.8, and the engine for a newer one: no version is in both ranges."""
    assert install_command(Extra.VLLM) == "pip install '.[vllm]' && pip install '.[engine]'"


def test_every_command_that_installs_chiasm_works_from_a_clone() -> None:
    """There is no package of this name on an index, so pip takes the folder."""
    folders = ("src", "docs", "examples", "scripts")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".md", ".sh")]
    for file in (*files, ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"):
        text = file.read_text()
        commands = [command.split() for command in re.findall(r"pip install ([^`\n#]*)", text)]
        assert not [word for words in commands for word in words if re.fullmatch(r"['\"]?chiasm\W?(\[.*)?", word)], file
        named = {extra for found in re.findall(r"'\.\[([^]{]+)\]'", text) for extra in found.split(",")}
        assert named <= {*Extra, "dev"}, file


@pytest.mark.skipif(sys.platform != "linux", reason="only for Linux the default build of PyTorch is that for CUDA")
@pytest.mark.parametrize(
    ("gpu", "is_reachable", "says"),
    [
        (False, True, "--extra-index-url https://download.pytorch.org/whl/cpu\n"),
        (False, False, ""),
        (True, True, ""),
    ],
)
def test_pytorch_is_the_build_for_cpus_where_no_gpu_is(
    tmp_path: Path, gpu: bool, is_reachable: bool, says: str
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nexit {0 if gpu else 9}\n")
    smi.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "true" if is_reachable else "false"}
    script = ROOT / "scripts" / "cpu_index.sh"
    ended = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == says
    assert ("can't be reached" in ended.stderr) == (not gpu and not is_reachable)
