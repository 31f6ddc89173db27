"""Checks of what NIXL could move KV with: its plugins, UCX's transports, the devices for them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chiasm.doctor.base import Check, Finding, shown

_NIXL = Check("NIXL")
_UCX = Check("UCX transports")

_MODULES = ("nixl", "nixl_cu13", "nixl_cu12")
"""As in ``kv_transfer/nixl.py``, which would import torch here."""
_ASK_SECONDS = 60.0
_ASK = """
import json, logging, os, sys
out = os.dup(1)
os.dup2(2, 1)  # what native code prints is no answer
from chiasm.kv_transfer.nixl import import_nixl
library = import_nixl()
agent = library.nixl_agent("chiasm-doctor", library.nixl_agent_config(backends=["UCX"]))
said = {"module": library.__name__, "plugins": list(agent.get_plugin_list())}
os.write(out, json.dumps(said).encode())
os._exit(0)
"""
"""In a process of its own: a library that cannot be used may end the process that loads it."""
_INFINIBAND = Path("/sys/class/infiniband")
_TRANSPORT = re.compile(r"^#\s+Transport:\s*(\S+)", re.MULTILINE)
_TRANSPORT_FILE = re.compile(r"libuct_(\w+)\.so")
_REMOTE = ("rc", "ud", "dc", "ib", "ib_mlx5", "efa", "ib_efa")
"""Transports between machines, other than TCP."""


@dataclass(frozen=True)
class Nixl:
    """What the library says of itself."""

    module: str
    plugins: tuple[str, ...]


class NixlError(Exception):
    """Why it could not be asked."""


def ask_nixl() -> Nixl | None:
    """None if it isn't installed. Raises NixlError if it is and cannot be used."""
    if not any(importlib.util.find_spec(name) for name in _MODULES):
        return None
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=_ASK_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        raise NixlError(f"it did not start within {_ASK_SECONDS:g} s") from None
    if done.returncode != 0 or not done.stdout:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with exit code {done.returncode}"]
        raise NixlError(shown(last[0]))
    said = json.loads(done.stdout)
    return Nixl(said["module"], tuple(said["plugins"]))


def nixl(needed: bool) -> Iterator[Finding]:
    """``needed``: whether a planned deployment moves KV with it."""
    try:
        found = ask_nixl()
    except NixlError as error:
        yield _NIXL.problem(
            f"it is installed and cannot be used: {error}",
            why="NixlConnector cannot move KV from prefill to decode.",
            do="install it anew, for the CUDA version that the driver has; on a machine without a GPU, nixl-cu12.",
            command="pip install --force-reinstall --no-deps nixl-cu12",
        )
        return
    if found is None and needed:
        yield _NIXL.problem(
            "it is not installed",
            why="vLLM moves KV from prefill to decode instances with it: they would not start.",
            do="install it in the environment that chiasm runs in.",
            command="pip install 'chiasm[nixl]'",
        )
    elif found is None:
        yield _NIXL.skipped("it is not installed; only NixlConnector needs it, for prefill and decode apart")
    elif "UCX" not in found.plugins:
        yield _NIXL.problem(
            f"{found.module} has no UCX plugin, only {', '.join(found.plugins) or 'none at all'}",
            why="NixlConnector moves KV by UCX.",
            do="install a build that has it, or let NIXL_PLUGIN_DIR name the folder of its plugins.",
            command="pip install --force-reinstall --no-deps nixl-cu12",
        )
    else:
        yield _NIXL.ok(f"{found.module}, with the plugins {', '.join(sorted(found.plugins))}")


def ucx() -> Iterator[Finding]:
    """Which transports UCX has here: what ``ucx_info`` lists, else the modules that came with NIXL."""
    listed = _listed_by_ucx_info()
    source = "ucx_info"
    if listed is None:
        listed, source = _modules_of_nixl(), "modules that come with NIXL"
    if not listed:
        yield _UCX.skipped(
            "neither ucx_info nor UCX's modules were found here; where an instance runs with NIXL, UCX_LOG_LEVEL=info in its "
            "environment has it log the transports that it takes"
        )
        return
    devices = sorted(entry.name for entry in _INFINIBAND.iterdir()) if _INFINIBAND.is_dir() else []
    fast = [name for name in listed if name.startswith(_REMOTE)]
    said = f"{', '.join(listed)} ({source})"
    if devices and not fast:
        yield _UCX.warning(
            f"there are network devices for RDMA ({', '.join(devices)}), and UCX has no transport for them: {said}",
            why="KV between machines would go by TCP.",
            do="install the RDMA libraries (rdma-core), and a UCX that is built with them.",
            command="ucx_info -d | grep Transport",
        )
    elif devices:
        yield _UCX.ok(f"{said}; devices for RDMA: {', '.join(devices)}")
    else:
        yield _UCX.ok(f"{said}; no device for RDMA, so TCP between machines")


def _listed_by_ucx_info() -> list[str] | None:
    if shutil.which("ucx_info") is None:
        return None
    try:
        done = subprocess.run(["ucx_info", "-d"], capture_output=True, text=True, timeout=_ASK_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return sorted(set(_TRANSPORT.findall(done.stdout)))


def _modules_of_nixl() -> list[str]:
    """By the names of their files; what is built into the library itself (TCP, shared memory) has none."""
    names: set[str] = set()
    for module in _MODULES:
        spec = importlib.util.find_spec(module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            libraries = Path(folder).parent / f"{Path(folder).name}.libs" / "ucx"
            if libraries.is_dir():
                found = (_TRANSPORT_FILE.match(file.name) for file in libraries.iterdir())
                names |= {match[1] for match in found if match} | {"tcp", "shm"}
    return sorted(names)
