"""Checks of what NIXL could move embeddings and KV with: its plugins, UCX's transports, and the network devices for them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from chiasm.doctor.report import Check, Result, shown
from chiasm.extras import Extra, install_command

_NIXL = Check("NIXL")
_UCX = Check("UCX transports")

MODULES = ("nixl", "nixl_cu13", "nixl_cu12")
"""As in ``transfer/nixl.py``, which would import numpy here."""
INFINIBAND = Path("/sys/class/infiniband")
_ASK_SECONDS = 60.0
_ASK = """
import json, logging, os, sys
out = os.dup(1)
os.dup2(2, 1)  # what native code prints is not the answer
from chiasm.transfer.nixl import import_nixl
library = import_nixl()
agent = library.nixl_agent("chiasm-doctor", library.nixl_agent_config(backends=["UCX"]))
said = {"module": library.__name__, "plugins": list(agent.get_plugin_list())}
os.write(out, json.dumps(said).encode())
os._exit(0)
"""
"""Runs in a process of its own, because a library that can't be used may end the process that loads it."""
_TRANSPORT = re.compile(r"^#\s+Transport:\s*(\S+)", re.MULTILINE)
_TRANSPORT_FILE = re.compile(r"libuct_(\w+)\.so")
_REMOTE = ("rc", "ud", "dc", "ib", "ib_mlx5", "efa", "ib_efa")
"""Transports between machines, other than TCP."""
_REINSTALL = "pip install --force-reinstall --no-deps nixl-cu12"


class Nixl(msgspec.Struct):
    """What the library says about itself."""

    module: str
    plugins: list[str]


class NixlError(Exception):
    """Why the library can't be used."""


def ask_nixl(modules: Sequence[str] = MODULES) -> Nixl | None:
    """Return None if it isn't installed under one of these names. Raises NixlError if it is and can't be used."""
    if not any(importlib.util.find_spec(name) for name in modules):
        return None
    command = [sys.executable, "-c", _ASK]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        raise NixlError(f"it did not start within {_ASK_SECONDS:g} s") from None
    if done.returncode != 0 or not done.stdout:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with exit code {done.returncode}"]
        raise NixlError(shown(last[0]))
    return msgspec.json.decode(done.stdout, type=Nixl)


def nixl(*, is_needed: bool, modules: Sequence[str] = MODULES) -> Iterator[Result]:
    """``is_needed``: whether a planned deployment moves embeddings or KV with it."""
    try:
        yield judge_nixl(ask_nixl(modules), is_needed=is_needed)
    except NixlError as error:
        yield _NIXL.problem(
            f"it is installed, but can't be used: {error}",
            why="NixlConnector can't move embeddings or KV.",
            do="reinstall it for the driver's CUDA version; on a machine without a GPU, install nixl-cu12.",
            command=_REINSTALL,
        )


def judge_nixl(found: Nixl | None, *, is_needed: bool) -> Result:
    if found is None and not is_needed:
        return _NIXL.skipped("not installed; only NixlConnector needs it, for embeddings or for KV")
    if found is None:
        return _NIXL.problem(
            "it is not installed",
            why="instances that move embeddings or KV with it refuse to start.",
            do="install it in the environment that chiasm runs in, from a clone of chiasm.",
            command=install_command(Extra.NIXL),
        )
    if "UCX" not in found.plugins:
        return _NIXL.problem(
            f"{found.module} has no UCX plugin, only {', '.join(found.plugins) or 'none at all'}",
            why="NixlConnector moves embeddings and KV with UCX.",
            do="install a build that has it, or set NIXL_PLUGIN_DIR to the folder of its plugins.",
            command=_REINSTALL,
        )
    return _NIXL.ok(f"{found.module}, with the plugins {', '.join(sorted(found.plugins))}")


def ucx(*, infiniband: Path = INFINIBAND, modules: Sequence[str] = MODULES) -> Iterator[Result]:
    """Check UCX's transports: those that ``ucx_info`` lists, or else the modules that come with NIXL."""
    listed, source = _listed_by_ucx_info(), "ucx_info"
    if listed is None:
        listed, source = _modules_of_nixl(modules), "modules that come with NIXL"
    if not listed:
        yield _UCX.skipped(
            "neither ucx_info nor UCX's modules were found; an instance that runs with NIXL logs its transports if "
            "UCX_LOG_LEVEL=info is in its environment"
        )
        return
    devices = ", ".join(sorted(entry.name for entry in infiniband.iterdir())) if infiniband.is_dir() else ""
    says = f"{', '.join(listed)} ({source})"
    if devices and not any(name.startswith(_REMOTE) for name in listed):
        yield _UCX.warning(
            f"there are network devices for RDMA ({devices}), but UCX has no transport for them: {says}",
            why="what NIXL moves between machines would go by TCP.",
            do="install the RDMA libraries (rdma-core), and a UCX that is built with them.",
            command="ucx_info -d | grep Transport",
        )
    else:
        yield _UCX.ok(
            f"{says}; " + (f"devices for RDMA: {devices}" if devices else "no RDMA device, so TCP between machines")
        )


def _listed_by_ucx_info() -> list[str] | None:
    if shutil.which("ucx_info") is None:
        return None
    try:
        done = subprocess.run(["ucx_info", "-d"], capture_output=True, text=True, timeout=_ASK_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return sorted(set(_TRANSPORT.findall(done.stdout)))


def _modules_of_nixl(modules: Sequence[str]) -> list[str]:
    """Return transports by the names of their files. TCP and shared memory are built into the library and have none."""
    names: set[str] = set()
    for module in modules:
        spec = importlib.util.find_spec(module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            libraries = Path(folder).parent / f"{Path(folder).name}.libs" / "ucx"
            if libraries.is_dir():
                found = (_TRANSPORT_FILE.match(file.name) for file in libraries.iterdir())
                names |= {match[1] for match in found if match} | {"tcp", "shm"}
    return sorted(names)
