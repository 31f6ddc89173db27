"""Servers that the bench starts itself, with real processes."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import aiohttp
import psutil
import pytest

from chiasm.bench.client import opened
from chiasm.bench.measurement import Bench
from chiasm.bench.served import Command, served, supervised
from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.launch.ports import HeldPort

_SERVER = """
import http.server, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            os._exit(1)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def _command(address: HeldPort, code: str = _SERVER) -> Command:
    arguments = [sys.executable, "-c", code, str(address.port)]
    return Command("a server", supervised(address.url, arguments), os.environ)


async def _pid(session: aiohttp.ClientSession, url: str) -> int | None:
    try:
        async with session.get(f"{url}/health") as reply:
            return int(await reply.text())
    except aiohttp.ClientError:
        return None


async def test_a_server_runs_from_ready_to_the_end(tmp_path: Path) -> None:
    addresses = [HeldPort("127.0.0.1"), HeldPort("127.0.0.1")]
    commands = map(_command, addresses)
    async with (
        opened() as client,
        aiohttp.ClientSession() as session,
        served(Bench("m", tmp_path, client), *commands, ready_seconds=60),
    ):
        pids = [await _pid(session, address.url) for address in addresses]
        assert all(pid is not None and psutil.pid_exists(pid) for pid in pids)
        assert len(set(pids)) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids if pid is not None)


async def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    command = _command(HeldPort("127.0.0.1"), "raise ValueError('there is no such model')")
    async with opened() as client:
        with pytest.raises(ConfigurationError, match="there is no such model"):
            async with served(Bench("m", tmp_path, client), command, ready_seconds=60):
                pytest.fail("it never was ready")


async def test_a_server_that_died_meanwhile_was_not_measured(tmp_path: Path) -> None:
    async def measure(address: HeldPort) -> None:
        async with (
            opened() as client,
            aiohttp.ClientSession() as session,
            served(Bench("m", tmp_path, client), _command(address), ready_seconds=60),
        ):
            first = await _pid(session, address.url)
            with pytest.raises(aiohttp.ClientError):
                await session.get(f"{address.url}/die")
            while await _pid(session, address.url) in (None, first):  # noqa: ASYNC110 it is started again
                await asyncio.sleep(0.05)

    with pytest.raises(ChiasmError, match="a server died while it was measured"):
        await measure(HeldPort("127.0.0.1"))
