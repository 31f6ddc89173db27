"""Applies a layout to this machine: which instances there are, and where each of them computes."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from chiasm.cores import ENCODER_NICE, check_cpus, parse_cpus, show_cpus, usable_cores
from chiasm.errors import ConfigurationError
from chiasm.launch import vllm
from chiasm.launch.config import DeploymentConfig, EngineKind, RoleConfig
from chiasm.launch.devices import Placements, check_names, found_gpus, place, with_shares
from chiasm.launch.gpus import Gpu
from chiasm.launch.layout import Layout, cpu_copies, in_words
from chiasm.memory import free_memory
from chiasm.models.checkpoint import config_if_readable, stored_bytes, stored_dtype
from chiasm.wire import Role

_LANGUAGE_SHARE = 0.6
"""Fraction of a GPU's memory that weights may take there beside an encoder."""
_UUIDS = ("GPU-", "MIG-")
_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Arrangement:
    """The instances of a deployment on this machine."""

    config: DeploymentConfig
    """With the number of instances of every role, on all devices together."""
    placements: Placements
    layout: Layout
    """Never ``auto``."""
    description: str
    """The layout, who shares what, and why, in one line."""
    on_cpu: bool = False
    """Whether all instances are the built-in engine's, and none uses a GPU."""

    @property
    def encoders(self) -> list[int]:
        """The numbers of the encoders in the order in which they start, so that their devices take turns."""
        ranks: dict[int, int] = {}
        taken: Counter[tuple[object, ...]] = Counter()
        for (role, index), placement in self.placements.items():
            if role is Role.ENCODER:
                place = (placement.devices, placement.cpus)
                ranks[index] = taken[place]
                taken[place] += 1
        return sorted(ranks, key=lambda index: (ranks[index], index))

    def is_spare(self, role: Role | None, index: int) -> bool:
        """Return whether an instance is an encoder that runs only while it is needed."""
        return role is Role.ENCODER and index in self.encoders[self.config.least_encoders :]


@dataclass(frozen=True)
class _Device:
    """What the instances of one place share."""

    name: str
    gpu: str = ""
    """Name of the GPU; empty for cores, and for a GPU that the engine chooses itself."""
    cpus: tuple[int, ...] = ()
    """Cores to pin instances to; empty: all that this process may use."""
    cores: int = 0
    """0 for a GPU."""


def arrange(config: DeploymentConfig, folder: Path | None) -> Arrangement:
    """Return what a start on this machine would run. ``folder`` is the checkpoint's; None if it isn't here yet.

    Raises ConfigurationError for what the machine or the engine cannot do.
    """
    gpus = _usable_gpus(config)
    on_cpu = config.engine is EngineKind.CHIASM and not gpus and not _names_gpu(config)
    model_bytes = weights_bytes(config, folder, in_float32=on_cpu) if folder is not None else 0
    layout, why = _choose(config, gpus, model_bytes)
    if layout is Layout.SPLIT:
        arrangement = _split(config, folder, gpus, why)
    else:
        arrangement = _shared(config, layout, _devices(config, gpus), gpus, model_bytes, why)
    arrangement.config.check_used(config.roles)
    named = any(role.devices or _is_gpu(role.settings.get("device")) for role in arrangement.config.roles.values())
    arrangement = replace(arrangement, on_cpu=on_cpu and not named)
    _check_room_to_scale(arrangement)
    return arrangement


def _check_room_to_scale(arrangement: Arrangement) -> None:
    """Raise ConfigurationError if language models would take the memory of encoders that start later."""
    config = arrangement.config
    if not config.scales or arrangement.on_cpu or config.engine is EngineKind.VLLM:
        return
    of_encoders = {one.devices for (role, _), one in arrangement.placements.items() if role is Role.ENCODER}
    for (role, _), placement in arrangement.placements.items():
        settings = {**config.settings, **config.roles[role].settings}
        if role is not Role.ENCODER and placement.devices in of_encoders and settings.get("kv_cache_bytes") is None:
            raise ConfigurationError(
                f"A {role} instance that shares a GPU with encoders takes most of what is free there when it starts, and "
                "encoders can't be added later; limit its KV cache with --kv-cache-bytes, or give encoders GPUs of their own."
            )


def one_of_each(config: DeploymentConfig) -> DeploymentConfig:
    """Return a deployment with one instance of each role of its layout, unless its instances are counted."""
    if config.is_counted:
        return config
    roles = (Role.AGGREGATED,) if config.layout is Layout.AGGREGATED else (Role.ENCODER, Role.PD)
    given = config.roles
    return replace(config, roles={role: replace(given.get(role, RoleConfig()), count=1) for role in roles})


def weights_bytes(config: DeploymentConfig, folder: Path, *, in_float32: bool) -> int:
    """Return the size of a checkpoint's weights in memory; ``in_float32`` says what the dtype ``auto`` is."""
    size = stored_bytes(folder)
    stored = stored_dtype(config_if_readable(folder))
    wanted = config.settings.get("dtype", "auto")
    widens = wanted == "float32" or (wanted == "auto" and in_float32)
    return 2 * size if widens and stored in _HALF else size


def _names_gpu(config: DeploymentConfig) -> bool:
    """Whether ``--device`` names a GPU, which all instances of the built-in engine then use."""
    return config.engine is EngineKind.CHIASM and _is_gpu(config.settings.get("device"))


def _is_gpu(device: object) -> bool:
    return str(device).startswith("cuda")


def _usable_gpus(config: DeploymentConfig) -> tuple[Gpu, ...]:
    """Return the GPUs that instances may be given. Raises ConfigurationError if vLLM is missing, or needs one."""
    if config.engine is EngineKind.VLLM:
        if vllm.installed().on_cpu:
            return ()
        if not (found := found_gpus()):
            raise ConfigurationError(
                "This vLLM is built for GPUs, and no NVIDIA GPU was found; on a machine without one, install the build for "
                "CPUs (`make vllm` does)."
            )
        return found
    if any(role.devices for role in config.roles.values()):
        return found_gpus()
    chosen = config.settings.get("device", "auto")
    built_for_cpu = importlib.metadata.version("torch").endswith("+cpu")
    return () if chosen != "auto" or built_for_cpu else found_gpus()


def _choose(config: DeploymentConfig, gpus: Sequence[Gpu], model_bytes: int) -> tuple[Layout, str]:
    """Return a layout that isn't ``auto``, and why it was chosen."""
    if config.layout is not Layout.AUTO:
        return config.layout, "--layout names it"
    if config.is_counted:
        return Layout.SPLIT, "instances are counted by role"
    if any(role.devices or role.cpus for role in config.roles.values()):
        return Layout.SPLIT, "roles have devices or CPUs of their own"
    named = _named_gpus(config, gpus)
    if len(kinds := dict.fromkeys(gpu.kind for gpu in named)) > 1:
        return Layout.SPLIT, f"the GPUs differ: {'; '.join(kinds)}"
    smallest = min((gpu.memory_bytes for gpu in named), default=0)
    if len(named) > 1 and smallest and model_bytes > _LANGUAGE_SHARE * smallest:
        return Layout.SPLIT, "the model is too large for a part of one GPU"
    are_several = len(named) > 1 or "/" in config.devices
    return Layout.COLOCATED, "the devices are alike" if are_several else "there is one device"


# ---- devices that are shared --------------------------------------------------------------------------------------------


def _named_gpus(config: DeploymentConfig, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Return the GPUs that ``--devices`` names, in its order, or all. Raises ConfigurationError for a name that isn't there."""
    if not gpus or not config.devices:
        return tuple(gpus)
    names = [name.strip() for name in config.devices.split(",")]
    if not all(names) or any("/" in name for name in names):
        raise ConfigurationError(
            f"--devices: {config.devices!r} is not a list of GPUs; write for example 0,1. Sets of cores are for machines "
            "without a GPU, and for --device cpu."
        )
    known = {name: gpu for gpu in gpus for name in (gpu.name, gpu.uuid)}
    numbers = [known[name].name if name in known else name for name in names]
    check_names("--devices", numbers, [gpu.name for gpu in gpus])
    # Where UUIDs are known, a GPU that isn't among them is gone; CUDA accepts the beginning of one.
    if all(gpu.uuid for gpu in gpus):
        gone = [n for n in names if n.startswith(_UUIDS) and not any(gpu.uuid.startswith(n) for gpu in gpus)]
        if gone:
            there = ", ".join(f"{gpu.name} ({gpu.uuid})" for gpu in gpus)
            raise ConfigurationError(f"--devices: {', '.join(gone)} cannot be used here; the GPUs are {there}.")
    return tuple(replace(known.get(name, Gpu(name)), name=name) for name in names)


def _devices(config: DeploymentConfig, gpus: Sequence[Gpu]) -> list[_Device]:
    if gpus:
        return [_Device(f"GPU {gpu.name}", gpu.name) for gpu in _named_gpus(config, gpus)]
    if _names_gpu(config):
        if config.devices:
            raise ConfigurationError("--device and --devices both name GPUs; give only one of them.")
        return [_Device(str(config.settings["device"]))]
    if not config.devices:
        cores = usable_cores()
        return [_Device(f"{cores} core{'s' if cores > 1 else ''}", cores=cores)]
    sets = core_sets(config.devices)
    return [_Device(f"cores {show_cpus(cpus)}", cpus=cpus, cores=min(len(cpus), usable_cores())) for cpus in sets]


def core_sets(text: str) -> list[tuple[int, ...]]:
    """Return the sets of cores in ``0-3/4-7``. Raises ConfigurationError if they overlap or cannot be used here."""
    sets: list[tuple[int, ...]] = []
    for part in text.split("/"):
        try:
            cpus = parse_cpus(part)
            check_cpus(cpus)
        except ConfigurationError as error:
            raise ConfigurationError(f"--devices {text}: {error.message}") from None
        if twice := sorted({cpu for earlier in sets for cpu in earlier}.intersection(cpus)):
            raise ConfigurationError(
                f"--devices {text}: CPU {show_cpus(twice)} is in more than one set; each set is a device of its own."
            )
        sets.append(cpus)
    return sets


def _shared(
    config: DeploymentConfig,
    layout: Layout,
    devices: Sequence[_Device],
    gpus: Sequence[Gpu],
    model_bytes: int,
    why: str,
) -> Arrangement:
    """Return an arrangement in which every device has the same instances, which all use the whole of it."""
    if config.is_counted:
        each = {role: config.count(role) for role in config.roles if config.count(role)}
    else:
        each = _default_counts(config, layout, devices, model_bytes)
    given = config.roles
    roles = {role: _on_each(given.get(role, RoleConfig()), count, len(devices)) for role, count in each.items()}
    resolved = replace(config, roles=roles)
    places = {(role, index): devices[index // each[role]] for role in roles for index in range(roles[role].count or 0)}
    placed = with_shares(roles, {key: (device.gpu,) for key, device in places.items() if device.gpu})
    lets_cores_go = config.engine is EngineKind.CHIASM and sum(each.values()) > 1
    placements: Placements = {}
    for (role, index), device in places.items():
        threads = roles[role].threads
        placements[role, index] = replace(
            placed[role, index],
            uuids=_uuids(placed[role, index].devices, gpus),
            cpus=device.cpus,
            threads=threads or device.cores or resolved.threads(role, index),
            core_share=f"cores-{devices.index(device)}" if device.cores and lets_cores_go else "",
            nice=ENCODER_NICE if layout is Layout.COLOCATED and role is Role.ENCODER else 0,
        )
    words = in_words(each, config.least_encoders if config.is_counted else None)
    return Arrangement(resolved, placements, layout, _describe_shared(layout, each, words, devices, why))


def _on_each(role: RoleConfig, count: int, devices: int) -> RoleConfig:
    """Return a role with ``count`` instances on each of so many devices, and as many times the least of them."""
    return replace(role, count=count * devices, least=None if role.least is None else role.least * devices)


def _default_counts(
    config: DeploymentConfig, layout: Layout, devices: Sequence[_Device], model_bytes: int
) -> dict[Role, int]:
    """Return how many instances each device gets."""
    roles = (Role.AGGREGATED,) if layout is Layout.AGGREGATED else (Role.ENCODER, Role.PD)
    fewest = min(device.cores for device in devices)
    if not fewest or config.engine is EngineKind.VLLM:  # vLLM's threads don't make way for others
        return dict.fromkeys(roles, 1)
    return dict.fromkeys(roles, cpu_copies(fewest, free_memory() // len(devices), model_bytes))


def _describe_shared(layout: Layout, each: Mapping[Role, int], words: str, devices: Sequence[_Device], why: str) -> str:
    alone = sum(each.values()) == 1
    verb = "uses" if alone else "share"
    names = ", ".join(device.name for device in devices)
    if len(devices) > 1:
        return f"{layout}: on each of {names}: {words}{'' if alone else ', which share it'} ({why})"
    return f"{layout}: {words} {verb} {names} ({why})"


# ---- devices that are divided -------------------------------------------------------------------------------------------


def _split(config: DeploymentConfig, folder: Path | None, gpus: Sequence[Gpu], why: str) -> Arrangement:
    """Return an arrangement in which roles divide GPUs and cores."""
    resolved = one_of_each(config)
    if config.devices and not gpus:
        raise ConfigurationError(
            "--devices: sets of cores are devices that instances share; choose --layout colocated or aggregated, or pin the "
            "roles with --encoder-cpus, --pd-cpus and the like."
        )
    dealt = _named_gpus(config, gpus)
    if not config.is_counted:  # the encoder comes first, and the smallest GPU is enough for it
        dealt = tuple(sorted(dealt, key=lambda gpu: gpu.memory_bytes))
    found = [gpu.name for gpu in dealt]
    if config.engine is EngineKind.VLLM:
        placed = place(resolved.roles, found, vllm.attention_heads(folder) if folder is not None else None)
    else:
        named = any(role.devices for role in config.roles.values())
        as_counted = config.layout is Layout.AUTO and config.is_counted and not config.devices
        # Instances that are only counted share the GPU that the engine chooses.
        placed = place(resolved.roles, () if as_counted and not named else found)
        _check_built_in(placed)
    _check_range(resolved, placed)
    placements = {
        (role, index): replace(
            placement,
            uuids=_uuids(placement.devices, gpus),
            cpus=resolved.roles[role].cpus,
            threads=resolved.threads(role, index),
        )
        for (role, index), placement in placed.items()
    }
    counts = {role: resolved.count(role) for role in resolved.roles}
    only_aggregated = all(role is Role.AGGREGATED for role, count in counts.items() if count)
    kind = Layout.AGGREGATED if only_aggregated else Layout.SPLIT
    return Arrangement(
        resolved, placements, Layout.SPLIT, f"{kind}: {in_words(counts, resolved.least_encoders)} ({why})"
    )


def _check_range(config: DeploymentConfig, placements: Placements) -> None:
    """Raise ConfigurationError for a range of encoders with fewer GPUs than that, unless they are told to share them."""
    count = config.count(Role.ENCODER)
    if not config.scales or config.roles[Role.ENCODER].devices:
        return
    devices = [one.devices for (role, _), one in placements.items() if role is Role.ENCODER and one.devices]
    if not devices:
        return
    others = {name for (role, _), one in placements.items() if role is not Role.ENCODER for name in one.devices}
    own = {names for names in devices if others.isdisjoint(names)}
    if len(own) < count:
        raise ConfigurationError(
            f"--encoders {config.least_encoders}..{count} needs {count} GPUs for encoders, and beside the other instances are "
            f"{len(own)}; ask for fewer, or let encoders share GPUs by naming these with --encoder-devices."
        )


def _check_built_in(placements: Placements) -> None:
    """Raise ConfigurationError for placements that the built-in engine cannot follow."""
    for (role, _), placement in placements.items():
        if len(placement.devices) > 1:
            raise ConfigurationError(
                f"The built-in engine computes on one device, and --{role}-devices gives each instance "
                f"{len(placement.devices)}; name one for each, or use --engine vllm, which splits a model."
            )
        if placement.devices and not placement.devices[0].isdecimal() and not placement.devices[0].startswith(_UUIDS):
            raise ConfigurationError(
                f"--{role}-devices: the built-in engine takes numbers and UUIDs of GPUs, not {placement.devices[0]!r}."
            )


def _uuids(names: Sequence[str], gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """Return the UUIDs of GPUs; none unless all are known."""
    known = {name: gpu.uuid for gpu in gpus for name in (gpu.name, gpu.uuid)}
    found = tuple(known.get(name, "") for name in names)
    return found if all(found) else ()
