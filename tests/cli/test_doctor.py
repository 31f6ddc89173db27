"""Usage of ``chiasm doctor``; what it finds is in tests/doctor."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from chiasm.launch.ports import HeldPort
from tests.cli.running import CHIASM, default_signals, run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoders", "2"], "--encoders describe a planned deployment: name its MODEL too"),
        (["http://127.0.0.1:1", "--encoders", "2"], "has its options already; leave out --encoders"),
        (["http://127.0.0.1:1", "--pd", "http://127.0.0.1:2"], "but not both"),
        (["--pd", "localhost:8000"], "'localhost:8000' is not the base URL"),
        (["http://"], "is not the base URL"),
        (["localhost:8000"], "name its URL: http://localhost:8000"),
        (["demo", "--prefills", "1"], "ask for at least one decode instance"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    done = run("doctor", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_no_server_at_the_address() -> None:
    held = HeldPort("127.0.0.1")  # nobody listens there
    url = held.url
    done = run("doctor", f"{url}/v1/", "--json")
    held.release()
    assert done.returncode == 1
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding["check"] == "proxy"
    assert "cannot be reached" in finding["says"]
    assert finding["command"] == f"curl -m 5 {url}/health"


def test_this_machine() -> None:
    done = run("doctor")
    assert done.returncode == 0, done.stdout
    assert {line.split()[0] for line in done.stdout.splitlines()[:-1] if not line.startswith(" ")} <= {
        "ok",
        "warning",
        "skipped",
    }


def test_ctrl_c_ends_it_before_the_last_check(checkpoint: Path) -> None:
    command = [*CHIASM, "doctor", str(checkpoint)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,  # noqa: PLW1509 - it only sets signals
    ) as doctor:
        assert doctor.stdout is not None
        first = doctor.stdout.readline()
        doctor.send_signal(signal.SIGINT)
        others = doctor.stdout.read()
    assert doctor.returncode == 130
    assert first.startswith("ok        plan")
    assert "storage folder" not in others
