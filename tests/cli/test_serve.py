"""``chiasm serve`` from its start to its end, as processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2 as httpx
import psutil
import pytest
from PIL import Image

from chiasm.cli.conversation import Turn, ask, drawn
from chiasm.launch.folders import STORAGE_PREFIX
from chiasm.launch.ports import is_healthy
from tests.cli.running import Running
from tests.launch.waiting import alive, command_line, eventually

SMALL = ("--kv-cache-bytes", "16MiB", "--max-model-len", "512", "--port", "0")
PAIR = ("--layout", "colocated", "--encoders", "1", "--pds", "1", *SMALL)

FOLDER = ("--connector", "SharedStorageConnector")
"""Embeddings go through a folder that the command makes."""


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One encoder and one PD, ready; the tests of this file share them, and the last of these ends them."""
    with Running(tmp_path_factory.mktemp("served"), "serve", str(checkpoint), *PAIR, *FOLDER) as running:
        running.wait_ready()
        yield running


def _instance(running: Running, name: str) -> psutil.Process | None:
    found = [one for one in running.children if f"child {name}" in " ".join(command_line(one))]
    return found[0] if found else None


def _last_word(process: psutil.Process) -> str:
    return "".join(command_line(process)[-1:])


def _instances(url: str) -> list[dict[str, str]]:
    """What the proxy says of its instances, however long it takes."""
    return list(httpx.get(f"{url}/health", timeout=60).json()["instances"])


def _states(url: str) -> dict[str, str]:
    return {one["url"]: one["state"] for one in _instances(url)}


def _folder(running: Running) -> Path:
    """The folder for embeddings, which the command holds open."""
    links = []
    for link in Path(f"/proc/{running.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it is closed again
            links.append(os.readlink(link))
    (folder,) = [link for link in links if Path(link).name.startswith(STORAGE_PREFIX)]
    return Path(folder)


def _answer(url: str, colour: str) -> str:
    image = drawn(Image.new("RGB", (64, 48), colour))
    return ask(url, Turn("", "What colour is it?", (image,))).text


def _listens(url: str) -> bool:
    try:
        with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=1):
            return True
    except OSError:
        return False


def test_every_instance_is_healthy_when_it_says_ready(served: Running) -> None:
    assert sorted(_states(served.wait_ready()).values()) == ["healthy", "healthy"]


def test_a_question_about_an_image_is_answered(served: Running) -> None:
    assert _answer(served.wait_ready(), "red")


def test_it_says_which_layout_it_has_chosen(served: Running) -> None:
    assert "[serve] colocated: 1 encoder and 1 PD share " in served.stderr


def test_logs_carry_the_name_of_their_process(served: Running) -> None:
    assert "[encoder-0] " in served.stderr
    assert "[pd-0] " in served.stderr
    assert "[proxy] ready at" in served.stderr


def test_a_killed_encoder_comes_back_and_serves(served: Running) -> None:
    url = served.wait_ready()
    urls = set(_states(url))
    (encoder,) = [one["url"] for one in _instances(url) if one["role"] == "encoder"]
    killed = _instance(served, "encoder-0")
    assert killed is not None
    killed.kill()

    def is_back() -> bool:
        """Whether another process serves there: the proxy may not have noticed yet that the first one was gone."""
        back = _instance(served, "encoder-0")
        return back is not None and back.pid != killed.pid and is_healthy(encoder)

    assert eventually(is_back)
    assert eventually(lambda: list(_states(url).values()) == ["healthy", "healthy"])
    assert set(_states(url)) == urls
    assert _answer(url, "blue")


@contextlib.contextmanager
def _stream(url: str, max_tokens: int) -> Iterator[Iterator[str]]:
    """The lines of a stream about an image, which has begun."""
    image = drawn(Image.new("RGB", (64, 48), "green")).url
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What is it?"}]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith("data: "))
        yield lines


def test_ctrl_c_lets_a_stream_end_and_then_ends_all_of_it(served: Running) -> None:
    url = served.wait_ready()
    children = served.children
    addresses = [url, *_states(url)]
    folder = _folder(served)
    assert len(children) == 4  # the proxy, two instances, and what these were forked from
    assert any(folder.iterdir())

    with _stream(url, max_tokens=300) as lines:
        served.process.send_signal(signal.SIGINT)
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]
    assert '"error"' not in "".join(rest)
    assert served.process.wait(60) == 0
    assert "unhealthy" not in served.stderr.partition("stopping")[2]
    assert not alive(children)
    assert not any(map(_listens, addresses))
    assert not folder.exists()
    assert served.stdout == f"ready {url}\n"


def test_sigterm_before_it_is_ready_ends_all_of_it(checkpoint: Path, tmp_path: Path) -> None:
    with Running(tmp_path, "serve", str(checkpoint), *PAIR, *FOLDER) as running:
        # From then on the second of these imports for seconds, before it starts an instance.
        assert eventually(lambda: {"proxy", "fork-server"} <= set(map(_last_word, running.children)))
        children = running.children
        (server,) = [one for one in children if _last_word(one) == "fork-server"]
        server.suspend()  # so that nothing gets ready meanwhile
        folder = _folder(running)
        running.process.send_signal(signal.SIGTERM)
        server.resume()
        assert running.process.wait(60) == 0
        assert not alive(children)
        assert not folder.exists()
        assert running.stdout == ""


def test_a_second_signal_ends_a_stream_with_an_error(checkpoint: Path, tmp_path: Path) -> None:
    with Running(tmp_path, "serve", str(checkpoint), "--aggregated", "1", "--port", "0") as running:
        url = running.wait_ready()
        instance = _instance(running, "aggregated-0")
        assert instance is not None
        with _stream(url, max_tokens=3000) as lines:
            instance.suspend()  # so that the stream can't end
            running.process.send_signal(signal.SIGTERM)
            assert eventually(lambda: "[serve] stopping" in running.stderr)
            running.process.send_signal(signal.SIGTERM)
            rest = "".join(lines)
            with contextlib.suppress(psutil.NoSuchProcess):  # it may have been killed by then
                instance.resume()
        assert '"code":"stopping"' in rest
        assert "[DONE]" not in rest
        assert running.process.wait(60) == 0


def test_instances_end_when_serve_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    with Running(tmp_path, "serve", str(checkpoint), "--aggregated", "1", *SMALL) as running:
        running.wait_ready()
        children = running.children
        assert len(children) == 3  # the proxy, the instance, and what it was forked from
        running.process.kill()
        assert eventually(lambda: not alive(children))
