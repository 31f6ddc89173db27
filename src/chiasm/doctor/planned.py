"""A deployment that is planned: whether this machine can run it. And this machine alone, where nothing is planned."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from chiasm.cores import check_cpus
from chiasm.doctor import checkpoint, installed, machine, storage, transports
from chiasm.doctor.base import Check, Finding
from chiasm.doctor.machine import Gpu, Need, NoDriverError, Tenant
from chiasm.doctor.weights import dtype_in_use
from chiasm.errors import ConfigurationError
from chiasm.launch.config import DeploymentConfig, EngineKind
from chiasm.launch.devices import Placements, describe
from chiasm.launch.folders import DEFAULT_MAX_BYTES
from chiasm.wire import Role

_PLAN = Check("plan")
_PLACES = Check("devices")
_MEMORY = Check("memory")
_FOLDER = Check("storage folder")

_PROCESS_BYTES = {EngineKind.CHIASM: 400 << 20, EngineKind.VLLM: 1500 << 20}
"""What an instance takes besides weights and caches."""


@dataclass(frozen=True)
class Wanted:
    """Of the options of engines, those that decide about memory."""

    dtype: str = "auto"
    device: str = "auto"
    kv_cache_bytes: int | None = None


def examine_machine() -> Iterator[Finding]:
    """What anything that runs here has to live with."""
    yield from installed.versions()
    yield from installed.vllm(wanted=False)
    yield from machine.cores()
    yield from machine.memory(machine.available_memory())
    yield from machine.shared_memory()
    yield from machine.open_files()
    yield from _gpus(for_vllm=bool(installed.version_of("vllm")))[1]
    yield from transports.nixl(needed=False)
    yield from transports.ucx()


async def examine_plan(config: DeploymentConfig, wanted: Wanted) -> AsyncIterator[Finding]:
    """What ``chiasm serve`` with the same options would run into."""
    is_vllm = config.engine is EngineKind.VLLM
    counts = ", ".join(f"{config.count(role)} {role}" for role in config.roles if config.count(role))
    yield _PLAN.ok(f"{config.model} by {'vLLM' if is_vllm else 'the built-in engine'}: {counts}, and a proxy")
    for finding in _surroundings(config):
        yield finding
    found_gpus, findings = _gpus(for_vllm=is_vllm)
    for finding in findings:
        yield finding
    try:
        folder = checkpoint.locate(config.model)
    except ConfigurationError as error:
        yield Check("model").problem(error.message, why="nothing could be served.", do="name a model that there is.")
        folder = None
    else:
        if folder is None:
            yield await checkpoint.ask_hub(config.model)
    if folder is None:
        yield _MEMORY.skipped("without the model's files it stays open how much memory its weights take")
        for finding in _storage(config, None):
            yield finding
        return
    found, findings = checkpoint.read(folder, is_vllm=is_vllm)
    for finding in findings:
        yield finding
    for finding in _places(config, wanted, folder, found, found_gpus):
        yield finding
    dtype_bytes = 4 if found and _dtype(config, wanted, found, found_gpus) == "float32" else 2
    numbers = found.image_numbers if found else None
    for finding in _storage(config, None if numbers is None else numbers * dtype_bytes):
        yield finding


def _surroundings(config: DeploymentConfig) -> Iterator[Finding]:
    """All that doesn't depend on the model."""
    is_vllm = config.engine is EngineKind.VLLM
    yield from installed.versions()
    yield from installed.vllm(wanted=is_vllm)
    threads = [config.threads(role) for role in config.roles for _ in range(config.count(role))]
    yield from machine.cores(threads)
    for role, chosen in config.roles.items():
        try:
            check_cpus(chosen.cpus)
        except ConfigurationError as error:
            yield _PLAN.problem(
                f"--{role}-cpus: {error.message}", why="the deployment would not start.", do="name CPUs that there are."
            )
    yield from machine.open_files()
    yield from machine.port(config.host, config.port)
    uses_nixl = bool(config.count(Role.PREFILL)) and (is_vllm or config.kv_connector == "NixlConnector")
    if uses_nixl:
        yield from transports.nixl(needed=True)
        yield from transports.ucx()


def _gpus(*, for_vllm: bool) -> tuple[list[Gpu], list[Finding]]:
    try:
        found = machine.find_gpus()
    except NoDriverError as error:
        return [], list(machine.no_gpus(str(error)))
    return found, list(machine.gpus(found, for_vllm=for_vllm, torch_version=installed.version_of("torch")))


def _places(
    config: DeploymentConfig, wanted: Wanted, folder: Path, found: checkpoint.Found | None, gpus: list[Gpu]
) -> Iterator[Finding]:
    """Which instance computes where, and whether its weights have room there."""
    from chiasm.launch.plan import placements_of
    from chiasm.launch.vllm import default_kv_bytes

    if config.engine is EngineKind.VLLM and not installed.version_of("vllm"):
        yield _PLACES.skipped("without vLLM it stays open where it would compute, and with how much memory")
        return
    try:
        placements = placements_of(config, folder)
    except ConfigurationError as error:
        yield _PLACES.problem(
            error.message, why="the deployment would not start.", do="change the options that it names, or the machine."
        )
        return
    if dealt := describe(placements):
        yield _PLACES.ok(dealt)
    if found is None:
        return
    dtype = _dtype(config, wanted, found, gpus)
    weights = {role: _weights_of(role, config, found, dtype) for role in config.roles}
    tenants = _tenants(config, wanted, placements, weights, gpus)
    if tenants:
        yield from machine.gpu_memory(gpus, tenants)
        return
    available_bytes = machine.available_memory()
    count = sum(config.count(role) for role in config.roles)
    kv_bytes = wanted.kv_cache_bytes
    if kv_bytes is None:
        # The built-in engine takes of what is left, and no more than a request needs.
        kv_bytes = default_kv_bytes(config, available_bytes) if config.engine is EngineKind.VLLM else 0
    in_memory = config.shared_storage_path is not None and storage.is_memory(config.shared_storage_path)
    need = Need(
        sum(weights[role] * config.count(role) for role in config.roles),
        count * _PROCESS_BYTES[config.engine]
        + kv_bytes * (count - config.count(Role.ENCODER))
        + ((config.ec_max_bytes or DEFAULT_MAX_BYTES) if in_memory else 0),
        at_most=config.engine is EngineKind.VLLM,
    )
    yield from machine.memory(available_bytes, need)


def _weights_of(role: Role, config: DeploymentConfig, found: checkpoint.Found, dtype: str) -> int:
    """The built-in engine reads those of the role alone. vLLM may read all, depending on the model."""
    whole = config.engine is EngineKind.VLLM or role is Role.AGGREGATED
    is_encoder = role is Role.ENCODER
    return found.weights.bytes_of(dtype, vision=whole or is_encoder, language=whole or not is_encoder)


def _tenants(
    config: DeploymentConfig, wanted: Wanted, placements: Placements, weights: dict[Role, int], gpus: list[Gpu]
) -> list[Tenant]:
    """The instances that compute on GPUs; of the built-in engine also those for which nobody has named one."""
    chosen = () if _on_cpu(config, wanted, gpus) else (wanted.device.partition(":")[2] or "0",)
    return [
        Tenant(f"{role}-{index}", devices, weights[role], placement.memory_share)
        for (role, index), placement in placements.items()
        if (devices := placement.devices or chosen)
    ]


def _on_cpu(config: DeploymentConfig, wanted: Wanted, gpus: list[Gpu]) -> bool:
    if config.engine is EngineKind.VLLM:
        return "cpu" in installed.version_of("vllm")
    return wanted.device == "cpu" or not gpus or installed.version_of("torch").endswith("+cpu")


def _dtype(config: DeploymentConfig, wanted: Wanted, found: checkpoint.Found, gpus: list[Gpu]) -> str:
    return dtype_in_use(
        found.checkpoint,
        wanted.dtype,
        on_cpu=_on_cpu(config, wanted, gpus),
        is_vllm=config.engine is EngineKind.VLLM,
    )


def _storage(config: DeploymentConfig, image_bytes: int | None) -> Iterator[Finding]:
    if not config.exchanges_embeddings:
        yield _FOLDER.skipped("no instance of this plan exchanges embeddings")
        return
    path = config.shared_storage_path
    if path is None:
        yield from machine.shared_memory()
        return
    yield from storage.planned_folder(path)
    yield from storage.room(path, config.ec_max_bytes or DEFAULT_MAX_BYTES, image_bytes)
