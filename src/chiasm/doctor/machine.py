"""Checks of this machine: what is installed, cores, memory, files, GPUs, and what a container leaves of them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from chiasm import __version__
from chiasm.cores import cpu_flags, has_native_bfloat16, usable_cores
from chiasm.doctor.report import Check, Result, size
from chiasm.errors import ConfigurationError
from chiasm.extras import Extra, install_command
from chiasm.launch.folders import LEAST_BYTES, SHARED_MEMORY
from chiasm.launch.gpus import Gpu
from chiasm.launch.ports import check_port

_VERSIONS = Check("versions")
_ENGINE = Check("engine")
_VLLM = Check("vLLM")
_CORES = Check("cores")
MEMORY = Check("memory")
_SHM = Check("shared memory")
_FILES = Check("open files")
_GPUS = Check("GPUs")
_GPU_MEMORY = Check("GPU memory")
_PORT = Check("port")

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")
_LEAST_OPEN_FILES = 4096
"""Two for each of a thousand requests, and as many for embeddings that are mapped."""
_LEAST_CAPABILITY = 7.5
"""Of a GPU, for vLLM."""


def version_of(package: str) -> str:
    """Return the installed version of a package; empty if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions(*, is_planned: bool = True) -> Iterator[Result]:
    """``is_planned``: whether instances are to run here, and not perhaps only the proxy."""
    found = {name: version_of(name) for name in _PACKAGES}
    if not any(found.values()) and not is_planned:
        adds = f"{install_command(Extra.ENGINE)} in a clone of chiasm adds it"
        yield _ENGINE.skipped(f"not installed, so this machine can only run the proxy; {adds}")
    elif missing := [name for name, version in found.items() if not version]:
        yield _VERSIONS.problem(
            f"{', '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed",
            why="instances of the built-in engine can't start.",
            do="install chiasm's extra for the engine, from a clone of chiasm.",
            command=install_command(Extra.ENGINE),
        )
    named = [f"{name} {version}" for name, version in found.items() if version]
    yield _VERSIONS.ok(", ".join([f"chiasm {__version__}", f"python {platform.python_version()}", *named]))


def vllm(is_planned: bool) -> Iterator[Result]:
    """Check the vLLM that instances would run, as they do when they start."""
    from chiasm.launch.vllm import installed

    if not is_planned and not version_of("vllm"):
        yield _VLLM.skipped("not installed; only --engine vllm needs it")
        return
    try:
        yield _VLLM.ok(f"version {installed().version}, which chiasm's connector supports")
    except ConfigurationError as error:
        make = _VLLM.problem if is_planned else _VLLM.warning
        yield make(error.message, "instances of vLLM refuse to start.", "install a supported version.", "make vllm")


def cores(threads: Sequence[int] = (), *, are_shared: bool = False) -> Iterator[Result]:
    """``threads`` is how many each planned instance computes with; with ``are_shared``, if it has the cores to itself."""
    usable, total = usable_cores(), os.cpu_count() or 1
    says = f"{usable} usable" + ("" if usable == total else f" of {total} (CPU affinity or the container's quota)")
    says += f", {'with' if has_native_bfloat16(cpu_flags()) else 'without'} instructions for bfloat16"
    wanted = max(threads, default=0) if are_shared else sum(threads)
    if threads and are_shared:
        says += f", shared by {len(threads)} instance{'s' if len(threads) > 1 else ''} of up to {wanted} threads"
    elif threads:
        says += f", for {wanted} threads of {len(threads)} instances together"
    if wanted > usable:
        yield _CORES.warning(
            says,
            why="threads that share a core wait for each other in the middle of each operator.",
            do="ask for fewer instances, or leave --threads out: then each instance gets an even share, at least one thread.",
        )
    else:
        yield _CORES.ok(says)


@dataclass(frozen=True)
class Need:
    """The memory that a deployment takes."""

    weights_bytes: int
    other_bytes: int = 0
    """Caches, and what each process takes besides."""
    is_upper_bound: bool = False
    """Whether the engine may load fewer weights than are counted."""


def memory(available_bytes: int, need: Need | None = None) -> Iterator[Result]:
    says = f"{size(available_bytes)} free"
    if need is None:
        yield MEMORY.ok(says)
        return
    says += f"; the instances take {'up to ' if need.is_upper_bound else ''}{size(need.weights_bytes)} for weights and about "
    says += f"{size(need.other_bytes)} for caches and processes"
    if need.weights_bytes > available_bytes and not need.is_upper_bound:
        yield MEMORY.problem(
            says,
            why="the weights alone don't fit: instances refuse to start, or the kernel kills them.",
            do="ask for fewer instances, choose a smaller model or --dtype bfloat16, or free some memory.",
        )
    elif need.weights_bytes + need.other_bytes > available_bytes:
        yield MEMORY.warning(
            says,
            why="when memory runs out, the kernel kills a process; it is restarted, and may be killed again.",
            do="ask for fewer instances or smaller caches (--kv-cache-bytes, --encoder-cache-bytes, --ec-max-bytes, "
            "--ec-receive-bytes).",
        )
    else:
        yield MEMORY.ok(says)


def shared_memory(folder: Path = SHARED_MEMORY, *, is_planned: bool = True) -> Iterator[Result]:
    """Check the room for embeddings where ``SharedStorageConnector`` keeps them unless a folder is named.

    ``is_planned``: whether it is to be used here.
    """
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield _SHM.skipped(f"{folder} doesn't exist or isn't writable; embeddings go to temporary files on disk")
        return
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if free < 2 * LEAST_BYTES and not is_planned:
        yield _SHM.skipped(
            f"{size(free)} free in {folder}; only SharedStorageConnector without a folder keeps much there"
        )
    elif free < 2 * LEAST_BYTES:
        yield _SHM.warning(
            f"{size(free)} free in {folder}",
            why="embeddings go to temporary files on disk, which may be slower; containers have 64 MiB by default.",
            do="give the container more, or name a folder with --shared-storage-path.",
            command="docker run --shm-size 8g …",
        )
    else:
        yield _SHM.ok(f"{size(free)} free in {folder}")


def open_files(limit: int | None = None) -> Iterator[Result]:
    """Check the limit of open files: this process's, unless another is given."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    says = "no limit" if soft == resource.RLIM_INFINITY else f"a process may open {soft}"
    if soft != resource.RLIM_INFINITY and soft < _LEAST_OPEN_FILES:
        yield _FILES.warning(
            says,
            why="each request takes a connection or two, and each embedding in use a file: beyond the limit requests fail.",
            do="raise the limit before the start.",
            command=f"ulimit -n {_LEAST_OPEN_FILES}",
        )
    else:
        yield _FILES.ok(says)


def port(host: str, number: int) -> Iterator[Result]:
    """Check whether the proxy could listen there."""
    try:
        check_port(host, number)
    except ConfigurationError as error:
        yield _PORT.refused(error, "choose another port, or see what uses it.", f"ss -ltnp 'sport = :{number}'")
    else:
        yield _PORT.ok(f"{number} on {host} is free" if number else "a free one is chosen")


# ---- GPUs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tenant:
    """An instance that is to compute on GPUs."""

    name: str
    devices: tuple[str, ...]
    weights_bytes: int
    memory_share: float | None = None


def gpus(found: Sequence[Gpu], *, for_vllm: bool, torch_version: str = "") -> Iterator[Result]:
    """Check the GPUs; ``torch_version`` is what is installed here, empty if nothing is."""
    if not found:
        yield _GPUS.skipped("the NVIDIA driver lists none")
        return
    warnings = []
    for gpu in found:
        name = f"GPU {gpu.name} ({gpu.model})"
        if for_vllm and gpu.capability < _LEAST_CAPABILITY:
            why = f"vLLM needs {_LEAST_CAPABILITY} or later."
            do = "name other GPUs, for example --pd-devices 0, or use the built-in engine."
            warnings.append(_GPUS.warning(f"{name} has compute capability {gpu.capability}", why, do))
        if gpu.free_bytes < gpu.memory_bytes // 2:
            says = f"{name} has {size(gpu.free_bytes)} free of {size(gpu.memory_bytes)}"
            why = "other processes use its memory, so weights or KV may not fit."
            warnings.append(_GPUS.warning(says, why, "see which ones, or name other GPUs.", "nvidia-smi"))
    if torch_version.endswith("+cpu"):
        says = f"there are {len(found)}, but torch {torch_version} is a build for CPUs"
        do, command = "install PyTorch's build for CUDA.", "pip install --force-reinstall torch"
        warnings.append(_GPUS.warning(says, "instances here would not use them.", do, command))
    ok = _GPUS.ok(", ".join(f"{gpu.name}: {gpu.model}, {size(gpu.free_bytes)} free" for gpu in found))
    yield from warnings or [ok]


def no_gpus(reason: str) -> Result:
    return _GPUS.skipped(f"{reason}; instances compute on CPU")


def gpu_memory(found: Sequence[Gpu], tenants: Sequence[Tenant]) -> Iterator[Result]:
    """Check whether the weights of each instance fit on its GPUs."""
    by_name = {name: gpu for gpu in found for name in (gpu.name, gpu.uuid)}
    results = []
    for tenant in tenants:
        own = [by_name[device] for device in tenant.devices if device in by_name]
        where = f"GPU {', '.join(tenant.devices)}"
        free = sum(gpu.free_bytes for gpu in own)
        if tenant.memory_share is not None:
            free = min(free, int(tenant.memory_share * sum(gpu.memory_bytes for gpu in own)))
        if len(own) < len(tenant.devices):
            results.append(_GPU_MEMORY.skipped(f"{tenant.name}: the NVIDIA driver does not list {where}"))
        elif tenant.weights_bytes > free:
            role = tenant.name.rpartition("-")[0]
            says = f"{tenant.name} needs {size(tenant.weights_bytes)} for weights, and has {size(free)} on {where}"
            do = f"give it more GPUs or memory (--{role}-devices, --{role}-memory-share), or choose a smaller model."
            results.append(_GPU_MEMORY.problem(says, "it runs out of memory when it starts.", do))
    if results:
        yield from results
    elif tenants:
        yield _GPU_MEMORY.ok(f"the weights of {len(tenants)} instances fit on their GPUs")
