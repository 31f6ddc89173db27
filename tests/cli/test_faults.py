"""What cannot be served ends with one clear line on standard error and exit code 2."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from tests.cli.running import CHIASM, run


def _one_line(*arguments: str) -> str:
    """Run a command that fails, and return its error line."""
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    assert done.stderr.endswith(f"{lines[0]}\n")
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.mark.parametrize("command", [["serve"], ["instance", "--role", "aggregated", "--port", "0"]])
def test_a_missing_model(command: list[str]) -> None:
    assert "no model '/nowhere/at/all'" in _one_line(*command, "/nowhere/at/all").lower()


def test_a_model_in_the_home_of_a_user_that_there_is_not() -> None:
    assert "no model '~nobody-at-all/model'" in _one_line("serve", "~nobody-at-all/model").lower()


@pytest.mark.usefixtures("ordinary_user")
@pytest.mark.parametrize(
    "command",
    [
        "serve {}/model",
        "instance {}/model --role pd --port 0",
        "doctor {}/model",
        "plan {}/model --devices L4 --mix text --ttft-slo 1 --tpot-slo 1",
        "plan demo --devices cpu:1 --mix text --ttft-slo 1 --tpot-slo 1 --costs {}/costs.json",
        "proxy --port 0 --allowed-local-media-path {}/images",
    ],
)
def test_a_folder_that_may_not_be_read(command: str, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    line = _one_line(*command.format(tmp_path / "closed").split())
    assert f"{tmp_path}/closed/" in line
    assert "can't be used: Permission denied" in line


@pytest.mark.parametrize(
    "command",
    [
        ["serve", "{checkpoint}"],
        ["instance", "{checkpoint}", "--role", "aggregated"],
        ["proxy", "--aggregated", "http://127.0.0.1:9"],
    ],
    ids=lambda command: command[0],
)
def test_a_port_in_use(command: list[str], checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        line = _one_line(*(part.format(checkpoint=checkpoint) for part in command), "--port", port)
    assert f"Port {port} on 127.0.0.1 is in use" in line


PRINTING = [
    ["models"],
    ["models", "--help"],
    ["completion", "bash"],
    shlex.split("plan Qwen2.5-VL-7B-Instruct --devices L4 --mix text --rate 1 --requests 1 --ttft-slo 1 --tpot-slo 1"),
    ["proxy", "--port", "0"],
    ["proxy", "--port", "0", "--workers", "2"],
    ["instance", "demo", "--role", "aggregated", "--port", "0"],
]


@pytest.mark.parametrize("command", PRINTING, ids=" ".join)
def test_nobody_reads_what_is_printed(command: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as unread:
        done = subprocess.run([*CHIASM, *command], stdout=unread, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_standard_output_and_error_may_be_closed() -> None:
    def close() -> None:
        os.close(1)
        os.close(2)

    for command, code in ((["models"], 0), (["serve", "demo", "--dry-run"], 0), (["serve", "/nowhere/at/all"], 2)):
        assert subprocess.run([*CHIASM, *command], preexec_fn=close, check=False).returncode == code


@pytest.mark.parametrize("command", [*PRINTING, ["serve", "demo", "--aggregated", "1", "--port", "0"]], ids=" ".join)
def test_there_is_no_room_for_what_is_printed(command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*CHIASM, *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith(
        "Error: There is no room for what this command prints or stores: No space left on device. Free some, and try "
        "again.\n"
    )


@pytest.mark.parametrize("command", [["serve", "demo"], ["proxy"]], ids=lambda one: one[0])
def test_a_shared_cache_that_cannot_be_used(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = _one_line(*command, "--port", "0", "--ec-store", f"file://{tmp_path}/file")
    assert line == f"Error: {tmp_path}/file is not a folder; name another path."


def test_no_instance_that_could_answer() -> None:
    assert "at least one PD or aggregated" in _one_line("serve", "demo", "--pds", "0", "--encoders", "0")
    assert "at least one PD or aggregated" in _one_line("proxy", "--port", "0", "--encoder", "http://127.0.0.1:9")


def test_prefill_without_decode() -> None:
    assert "ask for at least one decode instance too" in _one_line("serve", "demo", "--prefills", "1")


def test_options_that_do_not_belong_to_the_role(checkpoint: Path) -> None:
    arguments = ("instance", str(checkpoint), "--role", "decode", "--port", "0", "--shared-storage-path", "/tmp")
    assert "leave out --shared-storage-path" in _one_line(*arguments)


def test_a_missing_cpu(checkpoint: Path) -> None:
    usable = min(os.sched_getaffinity(0))
    line = _one_line("serve", str(checkpoint), "--pd-cpus", f"{usable},4095-4096", "--port", "0")
    assert "CPU 4095, 4096 cannot be used here" in line


def test_an_encoder_without_a_folder_for_embeddings(checkpoint: Path) -> None:
    line = _one_line("instance", str(checkpoint), "--role", "encoder", "--port", "0")
    assert "needs shared_storage_path (--shared-storage-path)" in line


def test_a_file_that_is_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no image")
    assert "cannot be read as an image" in _one_line(
        "demo", "--image", str(tmp_path / "note.txt"), "--question", "What is it?"
    )


def test_a_context_that_is_longer_than_the_models() -> None:
    line = _one_line("instance", "demo", "--role", "aggregated", "--max-model-len", "999999", "--port", "0")
    assert "--max-model-len is 999999, but the model supports 8192 tokens" in line


def test_an_error_that_an_instance_reports_at_start_ends_serve(checkpoint: Path) -> None:
    """Too little memory for the context length is known only when the model is loaded, and trying again would not help."""
    flags = ("--aggregated", "1", "--kv-cache-bytes", "4KiB", "--max-model-len", "512", "--port", "0")
    assert "lower --max-model-len or raise --kv-cache-bytes" in _one_line("serve", str(checkpoint), *flags)


@pytest.mark.parametrize(
    "command",
    [
        ["serve", "demo", "--admin-key", ""],
        ["proxy", "--pd", "http://127.0.0.1:9", "--port", "0", "--admin-key", "short"],
        ["proxy", "--pd", "http://127.0.0.1:9", "--port", "0", "--api-key", ""],
    ],
    ids=" ".join,
)
def test_a_key_that_could_be_guessed(command: list[str]) -> None:
    assert "a key must have at least 16 characters" in _one_line(*command)
