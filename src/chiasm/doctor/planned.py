"""Checks whether this machine can run a planned deployment, or of this machine alone if nothing is planned."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from chiasm.cores import check_cpus
from chiasm.doctor import machine, model, storage, store, transports
from chiasm.doctor.machine import Need, Tenant
from chiasm.doctor.report import Check, Result
from chiasm.ec_transfer import RECEIVING, ECTransferConfig
from chiasm.errors import ConfigurationError
from chiasm.extras import Extra, missing_modules
from chiasm.fleet_key import read_fleet_key
from chiasm.launch.arrangement import Arrangement, arrange, one_of_each
from chiasm.launch.config import DeploymentConfig, EngineKind
from chiasm.launch.devices import describe
from chiasm.launch.folders import DEFAULT_MAX_BYTES, SHARED_MEMORY, memory_for_embeddings
from chiasm.launch.gpus import Gpu, NoDriverError, list_gpus
from chiasm.launch.layout import Layout
from chiasm.launch.plan import LOOPBACK, Surroundings, plan_instances, plan_proxy
from chiasm.launch.ports import HeldPort
from chiasm.launch.vllm import default_kv_bytes
from chiasm.memory import free_memory
from chiasm.wire import Role

_PLAN = Check("plan")
_LAYOUT = Check("layout")
_DEVICES = Check("devices")

_PROCESS_BYTES = {EngineKind.CHIASM: 400 << 20, EngineKind.VLLM: 1500 << 20}
"""What an instance takes besides weights and caches."""
_NIXL = "NixlConnector"
_VLLM_DTYPES = {"half": "float16", "float": "float32"}
"""vLLM's other names."""
_FIX_OPTIONS = "change the options that the message names."


def examine_machine(store_url: str = "") -> Iterator[Result]:
    """Check what concerns everything that runs here; ``store_url`` is the shared cache, if there is one."""
    yield from machine.versions(is_planned=False)
    yield from machine.vllm(is_planned=False)
    yield from machine.cores()
    yield from machine.memory(free_memory())
    yield from machine.shared_memory(is_planned=False)
    yield from machine.open_files()
    yield from _gpus(for_vllm=bool(machine.version_of("vllm")))[1]
    yield from transports.nixl(is_needed=False)
    yield from transports.ucx()
    if store_url:
        yield from store.store(store_url)


async def examine_plan(config: DeploymentConfig) -> AsyncIterator[Result]:
    """Check what ``chiasm serve`` with the same options would run into."""
    if missing_modules(Extra.ENGINE):
        for result in _without_model(one_of_each(config), None):
            yield result
        yield model.MODEL.skipped(
            "the model and the devices are checked with the packages of the engine, which are missing"
        )
        return
    for result in _examine(config, await _find(config.model)):
        yield result


async def _find(name: str) -> Path | Result:
    """Return the model's folder, or why there is none here."""
    from chiasm.models.checkpoint import cached_folder

    try:
        return cached_folder(name) or await model.ask_hub(name)
    except ConfigurationError as error:
        return model.MODEL.refused(error, "name a model that exists.")


def _examine(config: DeploymentConfig, folder: Path | Result) -> Iterator[Result]:
    is_vllm = config.engine is EngineKind.VLLM
    arrangement: Arrangement | None = None
    refusal: Result | None = None
    if is_vllm and not machine.version_of("vllm"):
        refusal = _DEVICES.skipped(
            "where instances compute is decided by the vLLM that is installed, and there is none"
        )
    else:
        try:
            arrangement = arrange(config, None if isinstance(folder, Result) else folder)
            config = arrangement.config
        except ConfigurationError as error:
            refusal = _DEVICES.refused(error, _FIX_OPTIONS)
    config = one_of_each(config)
    yield _PLAN.ok(f"{config.model} by {'vLLM' if is_vllm else 'the built-in engine'}, and a proxy")
    if arrangement is not None:
        yield _LAYOUT.ok(arrangement.description)
    yield from _without_model(config, arrangement)
    gpus, results = _gpus(for_vllm=is_vllm)
    yield from results
    if refusal is not None:
        yield refusal
    if isinstance(folder, Result):
        yield folder
        yield machine.MEMORY.skipped("the size of the weights is unknown without the model's files")
        yield from _storage(config, None)
        return
    found, results = model.read(folder, is_vllm=is_vllm)
    yield from results
    image_bytes = None
    if found is not None:
        try:
            device, item_bytes = _choose(config, folder)
        except ConfigurationError as error:
            yield _DEVICES.refused(error, "choose a device and a dtype that exist.")
        else:
            if arrangement is not None:
                yield from _places(arrangement, folder, found, device, item_bytes, gpus)
            image_bytes = found.image_numbers and found.image_numbers * item_bytes
    yield from _storage(config, image_bytes)


def _without_model(config: DeploymentConfig, arrangement: Arrangement | None) -> Iterator[Result]:
    """Check everything that doesn't depend on the model."""
    is_vllm = config.engine is EngineKind.VLLM
    yield from machine.versions()
    yield from machine.vllm(is_planned=is_vllm)
    placements = arrangement.placements.values() if arrangement is not None else ()
    shares = arrangement is not None and arrangement.layout is not Layout.SPLIT
    yield from machine.cores([placement.threads or 1 for placement in placements], are_shared=shares)
    for name, cpus in (("proxy", config.proxy_cpus), *((role, one.cpus) for role, one in config.roles.items())):
        try:
            check_cpus(cpus)
        except ConfigurationError as error:
            yield _PLAN.refused(error, f"name CPUs that exist with --{name}-cpus.")
    yield from machine.open_files()
    yield from machine.port(config.host, config.port)
    moves_kv = config.count(Role.PREFILL) and (is_vllm or config.kv_connector == _NIXL)
    moves_embeddings = config.exchanges_embeddings and config.moves_from_memory
    if moves_kv or (moves_embeddings and config.ec_connector == _NIXL):
        yield from transports.nixl(is_needed=True)
        yield from transports.ucx()


def _gpus(*, for_vllm: bool) -> tuple[Sequence[Gpu], list[Result]]:
    try:
        found = list_gpus()
    except NoDriverError as error:
        return [], [machine.no_gpus(str(error))]
    return found, list(machine.gpus(found, for_vllm=for_vllm, torch_version=machine.version_of("torch")))


def _choose(config: DeploymentConfig, folder: Path) -> tuple[str, int]:
    """Choose device and dtype as instances do, and raise ConfigurationError as they do.

    Return the GPU of instances whose role names none, by number, or "" if they compute on CPU or vLLM chooses; and the size
    of a weight, which is that of a number of an embedding.
    """
    import torch

    from chiasm.engine.device import choose_device, choose_dtype

    name = str(config.settings.get("dtype", "auto"))
    is_vllm = config.engine is EngineKind.VLLM  # it takes the checkpoint's own dtype on CPU too
    device = torch.device("cuda") if is_vllm else choose_device(config.settings.get("device", "auto"))
    dtype = choose_dtype(_VLLM_DTYPES.get(name, name) if is_vllm else name, folder, device)
    return "" if is_vllm or device.type == "cpu" else str(device.index), dtype.itemsize


def _places(
    arrangement: Arrangement,
    folder: Path,
    found: model.Found,
    device: str,
    item_bytes: int,
    gpus: Sequence[Gpu],
) -> Iterator[Result]:
    """Check which instance computes where, whether it would start there, and whether its weights fit."""
    config, placements = arrangement.config, arrangement.placements
    is_vllm = config.engine is EngineKind.VLLM
    try:
        _check_processes(arrangement, folder)
    except ConfigurationError as error:
        yield _PLAN.refused(error, _FIX_OPTIONS)
    if description := describe(placements):
        yield _DEVICES.ok(description)
    weights = {role: _weights_of(role, config, found, item_bytes) for role in config.roles}
    tenants = [
        Tenant(f"{role}-{index}", devices, weights[role], placement.memory_share)
        for (role, index), placement in placements.items()
        if (devices := placement.devices or ((device,) if device else ()))
    ]
    if tenants:
        yield from machine.gpu_memory(gpus, tenants)
        return
    available_bytes = free_memory()
    count = sum(config.count(role) for role in config.roles)
    kv_bytes = config.settings.get("kv_cache_bytes")
    if kv_bytes is None:
        # The built-in engine takes a part of what is left, and no more than the longest request needs.
        kv_bytes = default_kv_bytes(config, available_bytes) if is_vllm else 0
    need = Need(
        sum(weights[role] * config.count(role) for role in config.roles),
        count * _PROCESS_BYTES[config.engine]
        + kv_bytes * (count - config.count(Role.ENCODER))
        + _embedding_bytes(config),
        is_upper_bound=is_vllm,
    )
    yield from machine.memory(available_bytes, need)


def _embedding_bytes(config: DeploymentConfig) -> int:
    """Return the memory of this machine that all instances together may take for embeddings outside their caches."""
    if not config.exchanges_embeddings:
        return 0
    if not config.moves_from_memory:
        path = config.shared_storage_path
        return (config.ec_max_bytes or DEFAULT_MAX_BYTES) if path is not None and storage.is_in_memory(path) else 0
    encoders = config.count(Role.ENCODER)
    kept = encoders * (config.ec_max_bytes or memory_for_embeddings(encoders))
    if config.ec_connector not in RECEIVING:
        return kept
    readers = config.count(Role.PD) + config.count(Role.PREFILL)
    received = ECTransferConfig.receive_bytes if config.ec_receive_bytes is None else config.ec_receive_bytes
    return kept + readers * 2 * received


def _check_processes(arrangement: Arrangement, folder: Path) -> None:
    """Raise ConfigurationError if the start would refuse the options of an instance or the proxy."""
    config = arrangement.config
    read_fleet_key(config.fleet_key_file)
    path = config.shared_storage_path or SHARED_MEMORY
    surroundings = Surroundings(
        path if config.exchanges_embeddings else None, config.ec_max_bytes or DEFAULT_MAX_BYTES, None
    )
    held = [HeldPort(LOOPBACK)]
    try:
        instances = plan_instances(config, folder, arrangement.placements, surroundings, held)
        plan_proxy(config, held[0], [(one.role, one.address.url) for one in instances if one.role])
    finally:
        for address in held:
            address.release()


def _weights_of(role: Role, config: DeploymentConfig, found: model.Found, item_bytes: int) -> int:
    """The built-in engine reads the weights of the role only. vLLM may read all, depending on the model."""
    reads_all = config.engine is EngineKind.VLLM or role is Role.AGGREGATED
    is_encoder = role is Role.ENCODER
    return found.weights.bytes_of(item_bytes, vision=reads_all or is_encoder, language=reads_all or not is_encoder)


def _storage(config: DeploymentConfig, image_bytes: int | None) -> Iterator[Result]:
    path = config.shared_storage_path
    if not config.exchanges_embeddings:
        yield storage.FOLDER.skipped("no instance of this plan exchanges embeddings")
    elif config.moves_from_memory:
        yield storage.FOLDER.skipped(
            f"{config.ec_connector} needs none: encoders keep embeddings in memory of their own"
        )
    elif path is None:
        yield from machine.shared_memory()
    else:
        yield from storage.planned_folder(path)
        yield from storage.room(path, config.ec_max_bytes or DEFAULT_MAX_BYTES, image_bytes)
    if config.ec_store:
        yield from store.store(config.ec_store)
