"""``chiasm serve --engine vllm`` as a process, and what can be seen of it and done to it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2 as httpx
import psutil

from chiasm.demo.images import draw_example
from tests.cli.running import Running
from tests.launch.waiting import command_line, eventually

from .fleet import busy_encoders
from .processes import CALL_SECONDS, CLIENT, START_SECONDS
from .wire import Body, chat, encoded, image_part

SMALL = (
    "--port",
    "0",
    "--dtype",
    "float32",
    "--max-model-len",
    "1024",
    "--max-num-seqs",
    "8",
    "--kv-cache-bytes",
    "256MiB",
)
SHARED_MEMORY = Path("/dev/shm")
_T = TypeVar("_T")


class Service:
    """A deployment that is ready."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.url = running.wait_ready(START_SECONDS)
        self._held: set[Path] = set()

    # ---- what it answers ----------------------------------------------------------------------------------------------

    def post(self, body: Body, seconds: float = CALL_SECONDS) -> httpx.Response:
        return CLIENT.post(f"{self.url}/v1/chat/completions", json=body, timeout=seconds)

    def answer(self, body: Body) -> str:
        response = self.post(body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    # ---- what it has --------------------------------------------------------------------------------------------------

    def note_shared_memory(self) -> set[Path]:
        """Note what its processes have in shared memory, and return all that they have had there so far."""
        self._held |= in_shared_memory([self.running.process, *self.running.children])
        return self._held

    # ---- what it is ---------------------------------------------------------------------------------------------------

    def instances(self, role: str | None = None) -> list[dict[str, Any]]:
        """Return what the proxy says of its instances, or of those of one role."""
        found: list[dict[str, Any]] = CLIENT.get(f"{self.url}/health", timeout=CALL_SECONDS).json()["instances"]
        return [one for one in found if role in (None, one["role"])]

    def busy_encoders(self) -> list[str]:
        """Return the URLs of the encoders that have calls now."""
        return busy_encoders(self.url)

    def wait_until_encoders_rest(self) -> None:
        """Until they have answered all calls, and counted what they did: a language instance may have answered before."""
        self.wait(lambda: not self.busy_encoders())

    def is_whole(self) -> bool:
        return all(one["state"] == "healthy" for one in self.instances())

    def wait(self, condition: Callable[[], _T]) -> _T:
        """Return what ``condition`` returns, as soon as that is true."""
        found: list[_T] = []

        def holds() -> _T:
            found[:] = [condition()]
            return found[0]

        assert eventually(holds, START_SECONDS), self.running.stderr[-4000:]
        return found[0]

    def server(self, url: str) -> psutil.Process:
        """Return the ``vllm serve`` process that listens, or is going to listen, at ``url``."""
        port = str(urlsplit(url).port)
        for process in self.running.children:
            command = command_line(process)
            if "chiasm.launch.supervisor" not in command and "serve" in command and port in command:
                return process
        raise LookupError(f"nothing serves {url}")

    def supervisors(self, role: str) -> list[psutil.Process]:
        """Return the processes that watch over the servers of a role; the command starts a server again when one ends."""
        urls = {one["url"] for one in self.instances(role)}
        commands = [(process, command_line(process)) for process in self.running.children]
        return [one for one, command in commands if "chiasm.launch.supervisor" in command and urls & set(command)]

    def servers(self, role: str) -> list[psutil.Process]:
        """Return the ``vllm serve`` processes of a role that exist now."""
        found = []
        for one in self.instances(role):
            with contextlib.suppress(LookupError):
                found.append(self.server(one["url"]))
        return found

    def metric(self, name: str, role: str) -> float:
        """Return the sum of a metric over the instances of a role."""
        total = 0.0
        for one in self.instances(role):
            lines = CLIENT.get(f"{one['url']}/metrics", timeout=CALL_SECONDS).text.splitlines()
            total += sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))
        return total


class Question:
    """An image that the demo model was not trained on, a question that it always answers correctly, and the answer."""

    def __init__(self, seed: int, size: tuple[int, int] | None = None) -> None:
        example = draw_example(seed, random.Random(seed).choice(("colour", "shape")))
        image_bytes = example.images[0] if size is None else example.images[0].resize(size)
        self.answer = example.answer
        self.image_bytes = encoded(image_bytes)
        self.body = chat(image_part(self.image_bytes), example.question, max_tokens=16)


def in_shared_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """Return the files and folders there that these processes have open or mapped."""
    found: set[str] = set()
    for process in processes:
        folder = Path(f"/proc/{process.pid}")
        with contextlib.suppress(OSError):  # it has ended
            found.update(line.split(maxsplit=5)[-1] for line in (folder / "maps").read_text().splitlines())
            for descriptor in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    found.add(os.readlink(descriptor))
    paths = (Path(one) for one in found if not one.endswith("(deleted)"))
    return {
        SHARED_MEMORY / path.relative_to(SHARED_MEMORY).parts[0]
        for path in paths
        if path.is_relative_to(SHARED_MEMORY) and path != SHARED_MEMORY
    }


@contextlib.contextmanager
def stopped(*processes: psutil.Process) -> Iterator[None]:
    """A block in which none of the processes runs; afterwards those that still exist go on."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def events(response: httpx.Response) -> Iterator[str]:
    """Yield the data of each event of a stream."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def error_of(response: httpx.Response) -> str:
    return str(json.loads(response.text)["error"]["message"])
