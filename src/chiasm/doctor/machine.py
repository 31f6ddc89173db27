"""Checks of this machine: cores, memory, files, GPUs, and what a container leaves of them."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from chiasm.cores import usable_cores
from chiasm.doctor.base import Check, Finding, shown, size
from chiasm.errors import ConfigurationError
from chiasm.launch.folders import LEAST_BYTES, SHARED_MEMORY

_CORES = Check("cores")
_MEMORY = Check("memory")
_SHM = Check("shared memory")
_FILES = Check("open files")
_GPUS = Check("GPUs")
_GPU_MEMORY = Check("GPU memory")
_PORT = Check("port")

LEAST_OPEN_FILES = 4096
"""Two for each of a thousand requests, and as many for what is mapped."""
LEAST_CAPABILITY = 7.5
"""Of a GPU, for vLLM."""
_SMI_SECONDS = 20.0
_SMI_FIELDS = "index,name,memory.total,memory.free,compute_cap"
_CGROUP = Path("/sys/fs/cgroup")


def cores(threads: Sequence[int] = ()) -> Iterator[Finding]:
    """``threads`` is how many each planned instance computes with."""
    usable, all_of_them = usable_cores(), os.cpu_count() or 1
    limited = "" if usable == all_of_them else f" of {all_of_them} (CPU affinity or the container's quota)"
    said = f"{usable} usable{limited}"
    wanted = f", for {sum(threads)} threads of {len(threads)} instances together" if threads else ""
    if sum(threads) > usable:
        yield _CORES.warning(
            said + wanted,
            why="threads that share a core wait for each other, in the middle of each operator.",
            do="ask for fewer instances, or leave --threads out: then cores are shared out evenly, one thread at least.",
        )
    else:
        yield _CORES.ok(said + wanted)


@dataclass(frozen=True)
class Need:
    """What a deployment takes of a memory."""

    weights_bytes: int
    other_bytes: int = 0
    """Caches, and what each process takes besides."""
    at_most: bool = False
    """Whether the engine may load less of the weights than is counted."""


def memory(available_bytes: int, need: Need | None = None) -> Iterator[Finding]:
    said = f"{size(available_bytes)} free"
    if need is None:
        yield _MEMORY.ok(said)
        return
    total = need.weights_bytes + need.other_bytes
    wanted = f"the instances take {'up to ' if need.at_most else ''}{size(need.weights_bytes)} for weights and about "
    wanted += f"{size(need.other_bytes)} for caches and processes"
    if need.weights_bytes > available_bytes and not need.at_most:
        yield _MEMORY.problem(
            f"{said}; {wanted}",
            why="the weights alone don't fit: instances refuse to start, or the kernel kills them.",
            do="ask for fewer instances, take a smaller model or --dtype bfloat16, or free some memory.",
        )
    elif total > available_bytes:
        yield _MEMORY.warning(
            f"{said}; {wanted}",
            why="when memory runs out the kernel kills a process; it is started again, and may be killed again.",
            do="ask for fewer instances or smaller caches (--kv-cache-bytes, --encoder-cache-bytes, --ec-max-bytes).",
        )
    else:
        yield _MEMORY.ok(f"{said}; {wanted}")


def available_memory() -> int:
    """What is free on the machine, or in this container where that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    in_container = _container_memory(_CGROUP)
    return free if in_container is None else min(free, in_container)


def shared_memory(folder: Path = SHARED_MEMORY) -> Iterator[Finding]:
    """Where embeddings lie unless another folder is named."""
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield _SHM.skipped(f"there is no {folder} to write to; embeddings go to temporary files on disk")
        return
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if free < 2 * LEAST_BYTES:
        yield _SHM.warning(
            f"{size(free)} are free in {folder}",
            why="embeddings go to temporary files on disk, which may be slower; a container has 64 MiB unless given more.",
            do="give the container more, or name a folder by --shared-storage-path.",
            command="docker run --shm-size 8g …",
        )
    else:
        yield _SHM.ok(f"{size(free)} are free in {folder}")


def open_files(limit: int | None = None) -> Iterator[Finding]:
    """``limit``: None asks this process."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    if soft == resource.RLIM_INFINITY:
        yield _FILES.ok("no limit")
    elif soft < LEAST_OPEN_FILES:
        yield _FILES.warning(
            f"a process may have {soft} open",
            why="each request takes a connection or two, and each embedding in use a file: beyond the limit requests fail.",
            do="raise the limit before the start.",
            command=f"ulimit -n {LEAST_OPEN_FILES}",
        )
    else:
        yield _FILES.ok(f"a process may have {soft} open")


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, as its driver describes it."""

    index: str
    name: str
    total_bytes: int
    free_bytes: int
    capability: float


@dataclass(frozen=True)
class Tenant:
    """An instance that is to compute on GPUs."""

    name: str
    devices: tuple[str, ...]
    weights_bytes: int
    memory_share: float | None = None


def gpu_memory(found: Sequence[Gpu], tenants: Sequence[Tenant]) -> Iterator[Finding]:
    """Whether weights fit where instances are to compute."""
    by_index = {gpu.index: gpu for gpu in found}
    fit = True
    for tenant in tenants:
        mine = [by_index[device] for device in tenant.devices if device in by_index]
        if len(mine) < len(tenant.devices):
            fit = False
            yield _GPU_MEMORY.skipped(f"{tenant.name}: of GPU {', '.join(tenant.devices)} nvidia-smi says nothing")
            continue
        free = sum(gpu.free_bytes for gpu in mine)
        if tenant.memory_share is not None:
            free = min(free, int(tenant.memory_share * sum(gpu.total_bytes for gpu in mine)))
        if tenant.weights_bytes > free:
            fit = False
            yield _GPU_MEMORY.problem(
                f"{tenant.name} takes {size(tenant.weights_bytes)} for weights, and has {size(free)} on GPU "
                f"{', '.join(tenant.devices)}",
                why="it runs out of memory when it starts.",
                do=f"give it more GPUs or a greater share (--{tenant.name.rpartition('-')[0]}-devices, -memory-share), or take "
                "a smaller model.",
            )
    if fit and tenants:
        yield _GPU_MEMORY.ok(f"the weights of {len(tenants)} instances fit on their GPUs")


class NoDriverError(Exception):
    """Why GPUs could not be asked for."""


def find_gpus() -> list[Gpu]:
    """Raises NoDriverError."""
    if shutil.which("nvidia-smi") is None:
        raise NoDriverError("there is no nvidia-smi: no NVIDIA GPU, or no driver for one")
    command = ["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoDriverError(f"nvidia-smi failed: {shown(error)}") from None
    return gpus_of(done.stdout)


def gpus_of(listing: str) -> list[Gpu]:
    """Of nvidia-smi's lines. Raises NoDriverError for what isn't understood."""
    found = []
    for line in listing.splitlines():
        try:
            index, name, total, free, capability = (part.strip() for part in line.split(","))
            found.append(Gpu(index, name, int(total) << 20, int(free) << 20, float(capability)))
        except ValueError:
            raise NoDriverError(f"nvidia-smi says what isn't understood: {shown(line)}") from None
    return found


def gpus(found: Sequence[Gpu], *, for_vllm: bool, torch_version: str = "") -> Iterator[Finding]:
    """``torch_version`` is what is installed here; empty: none, or it isn't known."""
    if not found:
        yield _GPUS.skipped("nvidia-smi lists none")
        return
    fit = True
    for gpu in found:
        if for_vllm and gpu.capability < LEAST_CAPABILITY:
            fit = False
            yield _GPUS.warning(
                f"GPU {gpu.index} ({gpu.name}) has compute capability {gpu.capability}",
                why=f"vLLM is built for {LEAST_CAPABILITY} and later.",
                do="name other GPUs, for example --pd-devices 0, or take the built-in engine.",
            )
        if gpu.free_bytes < gpu.total_bytes // 2:
            fit = False
            yield _GPUS.warning(
                f"GPU {gpu.index} ({gpu.name}) has {size(gpu.free_bytes)} free of {size(gpu.total_bytes)}",
                why="somebody else uses its memory, and weights or KV may find no room.",
                do="see who that is, or name other GPUs.",
                command="nvidia-smi",
            )
    if torch_version.endswith("+cpu"):
        fit = False
        yield _GPUS.warning(
            f"there are {len(found)}, and torch {torch_version} is a build for CPUs",
            why="instances here would not use them.",
            do="install PyTorch's build for CUDA.",
            command="pip install --force-reinstall torch",
        )
    if fit:
        listed = ", ".join(f"{gpu.index}: {gpu.name}, {size(gpu.free_bytes)} free" for gpu in found)
        yield _GPUS.ok(listed)


def no_gpus(reason: str) -> Iterator[Finding]:
    yield _GPUS.skipped(f"{reason}; instances compute on CPU")


def port(host: str, number: int) -> Iterator[Finding]:
    """Whether the proxy could listen there."""
    from chiasm.launch.ports import check_port

    try:
        check_port(host, number)
    except ConfigurationError as error:
        yield _PORT.problem(
            error.message,
            why="clients could not reach the deployment: it would not start.",
            do="choose another port, or see who uses it.",
            command=f"ss -ltnp 'sport = :{number}'",
        )
        return
    yield _PORT.ok(f"{number} on {host} is free" if number else "a free one is taken")


def _container_memory(cgroup: Path) -> int | None:
    """What a Linux control group still allows, pages of files that it could drop counted as free; None without a bound."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
