"""Help, versions and typos are answered at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

import chiasm
from chiasm.cli import main
from tests.cli.running import run

COMMANDS = ["serve", "instance", "proxy", "demo", "models", "bench", "plan", "doctor", "completion"]
HEAVY = {"torch", "transformers", "starlette", "uvicorn", "aiohttp", "PIL", "numpy", "rich"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["doctor", "--help"], ["--version"], ["models"]]
)
def test_commands_without_a_model_load_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from chiasm.cli import main; sys.argv = ['chiasm', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stderr.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, chiasm, chiasm.launch; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout == f"chiasm {chiasm.__version__}\n"


def test_without_arguments_help_is_a_usage_error() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr == run("--help").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_listed(command: str) -> None:
    assert f"\n  {command} " in run("--help").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_into_80_columns_and_shows_no_empty_default(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["chiasm", command, "--help"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    assert "default: ]" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serf"], "There is no command 'serf'"),
        (["serve"], "required: MODEL"),
        (["serve", "demo", "--encoder", "1"], "Unrecognized arguments: --encoder"),
        (["serve", "demo", "--encoders", "-1"], "--encoders: '-1' is neither an integer of at least 0 nor a range"),
        (["serve", "demo", "--kv-cache-bytes", "lots"], "'lots' is not a size"),
        (["serve", "demo", "--pd-cpus", "first"], "'first' is not a set of CPUs"),
        (["serve", "demo", "--port", "65536"], "--port: '65536' is not an integer from 0 to 65535"),
        (["serve", "demo", "--log-level", "loud"], "'loud' is not one of"),
        (["serve", "demo", "--port"], "--port: expected one argument"),
        (["serve", "demo", "--pd-args", "--max-item 3"], "--pd-args: Unrecognized arguments: --max-item"),
        (["serve", "demo", "--proxy-args", "--max-items=no"], "--proxy-args: --max-items: 'no' is not an integer"),
        (["serve", "demo", "--vllm-args", "--seed 1"], "--vllm-args is for --engine vllm only"),
        (["serve", "demo", "--pd-memory-share", "0.5"], "--pd-memory-share is for --engine vllm only"),
        (["serve", "demo", "--pd-args", "'unclosed"], "is not a command line"),
        (["serve", "demo", "--pd-devices", "0,,1"], "is not a list"),
        (["serve", "demo", "--pd-devices", "a"], "takes numbers and UUIDs of GPUs, not 'a'"),
        (["serve", "demo", "--engine", "vllm", "--device", "cpu"], "--device means nothing to vLLM"),
        (["serve", "demo", "--engine", "vllm", "--kv-connector", "X"], "--kv-connector: vLLM instances"),
        (["bench", "--repeat", "1"], "--repeat: '1' is not an integer of at least 2"),
        (["instance", "demo"], "required: --role"),
        (["instance", "demo", "--role", "eye"], "'eye' is not one of"),
        (["demo", "--question", "What is it?"], "both --image and --question"),
    ],
)
def test_a_typo_is_a_usage_error(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
