"""The command, with real processes."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from chiasm.bench.measurements import MEASUREMENTS
from chiasm.bench.run import BenchConfig, choose
from chiasm.bench.topology import kv_connectors
from chiasm.launch.config import EngineKind
from tests.launch.waiting import command_line

_BENCH = (sys.executable, "-m", "chiasm", "bench")


def test_identity_on_a_small_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    command = [*_BENCH, "identity", "--repeat", "6", "--model", str(checkpoint), "--output", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "results.json").read_text())["measurements"]["identity"]
    assert found["met"] is True
    names = {figure["name"] for figure in found["figures"]}
    apart = {f"E+P+D ({connector})" for connector in kv_connectors()}
    assert {f"greedy, answers that differ: {one} and generate" for one in {"aggregated", "E+PD"} | apart} <= names
    assert {f"sampled, answers that differ: {one} and aggregated" for one in {"E+PD"} | apart} <= names
    assert (tmp_path / "results.png").is_file()


def test_idle_measures_every_process(checkpoint: Path, tmp_path: Path) -> None:
    command = [*_BENCH, "idle", "--quick", "--model", str(checkpoint), "--output", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = json.loads((tmp_path / "results.json").read_text())["measurements"]["idle"]["figures"]
    assert {figure["name"] for figure in figures} == {
        f"{connector}: {process}"
        for connector in kv_connectors()
        for process in ("proxy", "encoder", "prefill", "decode")
    }
    assert all(figure["unit"] == "%" and figure["value"] < 100 for figure in figures)


def test_soak_watches_every_process_and_checks_what_good_clients_are_told(checkpoint: Path, tmp_path: Path) -> None:
    command = [*_BENCH, "soak", "--quick", "--model", str(checkpoint), "--output", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "results.json").read_text())["measurements"]["soak"]
    figures = {figure["name"]: figure["value"] for figure in found["figures"]}
    assert figures["good clients: right answers"] > 0
    assert figures["good clients: requests without an answer"] == 0
    assert figures["answers with status 500"] == 0
    assert figures["leases when all clients had left"] == figures["KV blocks in use when all clients had left"] == 0
    (memory,) = (panel for panel in found["panels"] if panel["title"] == "soak: resident memory")
    assert {curve["label"] for curve in memory["curves"]} == {"proxy", "encoder", "prefill", "decode"}
    assert {trial["client"] for trial in found["trials"]} == {"good", "new", "slow", "leaving", "hostile"}


def test_goodput_compares_two_deployments(checkpoint: Path, tmp_path: Path) -> None:
    chosen = (
        "--mixes",
        "text",
        "--arms",
        "aggregated,colocated",
        "--repeat",
        "2",
        "--ttft-slo",
        "60",
        "--tpot-slo",
        "60",
    )
    command = [*_BENCH, "goodput", "--quick", *chosen, "--model", str(checkpoint), "--output", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "results.json").read_text())["measurements"]["goodput"]
    for arm in ("aggregated", "colocated"):
        trials = [trial for trial in found["trials"] if trial["arm"] == arm]
        assert {trial["seed"] for trial in trials} == {0, 1}
        assert all(trial["attained"] == 1.0 and trial["good"] == trial["requests"] for trial in trials)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("goodput", "--mixes", "salad"), "There is no mix 'salad'; the mixes are text, "),
        (("goodput", "--arms", "one"), "There is no arm 'one' on this machine; the arms are aggregated, "),
        (("goodput", "--arm", "mine"), "--arm: 'mine' is no arm; write for example "),
        (("goodput", "--arm", "mine=--eyes 2"), "--arm mine: "),
        (("trace",), "`chiasm bench trace` takes one file"),
        (("trace", "none.jsonl"), "Cannot read the trace none.jsonl"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    command = [*_BENCH, *arguments, "--output", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"Error: {message}")


def test_what_takes_long_or_needs_a_server_runs_only_if_it_is_named() -> None:
    names = list(MEASUREMENTS[EngineKind.CHIASM])
    named = {"churn", "goodput", "soak", "store"}
    assert [one.name for one in choose(BenchConfig())] == [name for name in names if name not in named]
    assert [one.name for one in choose(BenchConfig(("goodput", "ttft")))] == ["ttft", "goodput"]


def test_an_unknown_measurement_is_refused(tmp_path: Path) -> None:
    command = [*_BENCH, "speed", "--output", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("Error: There is no measurement 'speed'; with --engine chiasm there are identity, ")


def test_a_measurement_of_another_engine_is_refused(tmp_path: Path) -> None:
    command = [*_BENCH, "engines", "--output", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(
        "Error: engines runs only with --engine vllm; with --engine chiasm there are identity, "
    )


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from chiasm.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", "--output", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "pip install '.[bench]'" in ended.stderr
    assert not ended.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_one_line_says_so(tmp_path: Path) -> None:
    command = [*_BENCH, "--engine", "vllm", "--output", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("Error: --engine vllm needs vLLM in chiasm's environment")
    assert not list(tmp_path.iterdir())


def _instances(pid: int) -> list[psutil.Process]:
    """Return the instances and the proxy that the bench has started; it also runs commands that end by themselves."""
    return [child for child in psutil.Process(pid).children() if "chiasm child" in " ".join(command_line(child))]


def test_a_trace_is_measured_with_every_deployment_that_is_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    trace = tmp_path / "mine.jsonl"
    lines = [{"time": 0.1 * place, "prompt_tokens": 8, "answer_tokens": 2, "images": [32]} for place in range(8)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = ("--arms", "aggregated,split", "--repeat", "2", "--ttft-slo", "60", "--tpot-slo", "60")
    command = [*_BENCH, "trace", str(trace), "--quick", *chosen, "--model", str(checkpoint), "--output", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "results.json").read_text())["measurements"]["trace"]
    assert {(trial["traffic"], trial["arm"]) for trial in found["trials"]} == {
        ("mine", "aggregated"),
        ("mine", "split"),
    }
    assert "The trace has 10 requests per second itself." in found["notes"]
    assert "It took " in ended.stdout
    assert (tmp_path / "results.png").is_file()


def test_what_was_measured_before_a_signal_is_shown_and_plotted(checkpoint: Path, tmp_path: Path) -> None:
    chosen = (
        "--mixes",
        "text,mixed,images,burst",
        "--arms",
        "aggregated",
        "--ttft-slo",
        "60",
        "--tpot-slo",
        "60",
        "--quick",
    )
    # The mixes after the first one take 5 seconds each at this rate.
    slow = ("--rate", "20", "--repeat", "2")
    command = [*_BENCH, "goodput", *chosen, *slow, "--model", str(checkpoint), "--output", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "results.json").is_file():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "text: aggregated, in time" in printed
    found = json.loads((tmp_path / "results.json").read_text())["measurements"]["goodput"]
    assert {trial["traffic"] for trial in found["trials"]} >= {"text"}
    assert (tmp_path / "results.png").is_file()


def test_a_signal_ends_everything(checkpoint: Path, tmp_path: Path) -> None:
    command = [*_BENCH, "identity", "--model", str(checkpoint), "--output", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (children := _instances(process.pid)):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    _, alive = psutil.wait_procs(children, 60)
    assert not alive
    assert not list(tmp_path.iterdir())
