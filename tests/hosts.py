"""Hosts that share a network and nothing else: network namespaces at a switch, with cables that can be pulled.

It takes Linux, the rights of root, and the command ``ip``; without them the tests that ask for hosts are skipped, and say why.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import pytest

_CLONE_NEWNET = 0x40000000
_CAPABILITIES = 1 << 12 | 1 << 21  # CAP_NET_ADMIN and CAP_SYS_ADMIN


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _enter(descriptor: int) -> None:
    """Move the calling thread to a network namespace; what it starts from now on is there, too."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class Host:
    """One host, with an address of its own."""

    def __init__(self, namespace: str, address: str, switch: str, port: str) -> None:
        self.address = address
        self._namespace = namespace
        self._cable = ("-n", switch, "link", "set", port)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Have this thread, and the threads and processes that it starts meanwhile, open their sockets on this host."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            there = os.open(f"/run/netns/{self._namespace}", os.O_RDONLY)
            try:
                _enter(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _enter(before)
        finally:
            os.close(before)

    def unplug(self) -> None:
        """Nothing reaches this host any more, and nobody is told."""
        _ip(*self._cable, "down")

    def plug(self) -> None:
        _ip(*self._cable, "up")

    def slow_down(self, bits_per_second: int) -> None:
        """Let no more than this leave the host, in place of what was said before."""
        limit = ("tbf", "rate", f"{bits_per_second}bit", "burst", "32kb", "latency", "50ms")
        _run("tc", "-n", self._namespace, "qdisc", "replace", "dev", "eth0", "root", *limit)

    @property
    def sent_bytes(self) -> int:
        """What has left the host."""
        with self.inside():
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        return next(int(line.split()[9]) for line in lines if line.split()[0] == "eth0:")


class Network:
    """A switch with ``count`` hosts; leaving the context removes all of them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._made: list[str] = []

    def __enter__(self) -> list[Host]:
        reason = why_not()
        if reason is not None:
            pytest.skip(reason)
        name = f"chiasm-{os.getpid()}-{secrets.token_hex(3)}"
        try:
            switch = self._make(f"{name}-switch")
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            return [self._connect(f"{name}-{number}", number, switch) for number in range(1, self._count + 1)]
        except BaseException:
            self._remove()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def _connect(self, namespace: str, number: int, switch: str) -> Host:
        self._make(namespace)
        host = Host(namespace, f"10.99.0.{number}", switch, f"port{number}")
        _ip("-n", switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", switch, "link", "set", f"port{number}", "master", "bridge")
        _ip("-n", namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        host.plug()
        return host

    def _make(self, namespace: str) -> str:
        _ip("netns", "add", namespace)
        self._made.append(namespace)
        return namespace

    def _remove(self) -> None:
        while self._made:
            _ip("netns", "del", self._made.pop())


def why_not() -> str | None:
    """Return why hosts can't be made here; None if they can."""
    if not sys.platform.startswith("linux"):
        return "Network namespaces need Linux."
    effective = int(re.findall(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)[0], 16)
    if os.geteuid() or effective & _CAPABILITIES != _CAPABILITIES:
        return "Network namespaces need root, with the capabilities CAP_NET_ADMIN and CAP_SYS_ADMIN."
    if shutil.which("ip") is None:
        return "Network namespaces need the command ip (iproute2)."
    return None
