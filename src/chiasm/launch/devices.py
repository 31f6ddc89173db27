"""Which GPUs there are, and which instance gets which."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from chiasm.errors import ConfigurationError
from chiasm.launch.config import RoleConfig
from chiasm.launch.gpus import MIG_PREFIX, Gpu, NoDriverError, list_gpus
from chiasm.wire import Role

_MPS_FOLDER = "/tmp/nvidia-mps"
_USABLE_SHARE = 0.9
"""Fraction of a shared device's memory that instances get; driver and libraries of each process take the rest."""
_LEAST_SHARE = 0.02
_ENCODER_WEIGHT = 1
_LANGUAGE_WEIGHT = 3
"""Share of the memory relative to an encoder: a language model is larger, and holds KV."""


@dataclass(frozen=True)
class Placement:
    """Where and how one instance computes. Without devices: on CPU, or where the engine chooses."""

    devices: tuple[str, ...] = ()
    """Names of GPUs."""
    memory_share: float | None = None
    """Fraction of each device's memory; None: what the engine takes of a device of its own."""
    shared: bool = False
    """Whether another instance computes on one of the devices."""
    uuids: tuple[str, ...] = ()
    """UUIDs of these GPUs if they are known: the numbers of the others change when a GPU is lost."""
    cpus: tuple[int, ...] = ()
    """CPUs that it is pinned to; empty: all."""
    threads: int | None = None
    """Intra-op threads; None: what the engine chooses."""
    core_share: str = ""
    """Names the cores that it shares with the instances of the same name; empty if their number of threads is fixed."""
    nice: int = 0


Placements = dict[tuple[Role, int], Placement]
"""By an instance's role and its number within the role."""


def found_gpus(environment: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs that a process of this environment may use."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name.strip() for name in visible.split(",") if name.strip() not in {"", "-1"}]
    if names == []:
        return ()
    try:
        listed = list_gpus()
    except NoDriverError:
        listed = ()
    if names is None:
        return listed
    known = {name: gpu for gpu in listed for name in (gpu.name, gpu.uuid)}
    return tuple(replace(known.get(name, Gpu(name)), name=name) for name in names)


def mps_runs() -> bool:
    """Return whether CUDA's Multi-Process Service runs, so that the processes on a GPU can have priorities."""
    return (Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or _MPS_FOLDER) / "control").exists()


def place(roles: Mapping[Role, RoleConfig], found: Sequence[str], attention_heads: int | None = None) -> Placements:
    """Return the GPUs of each instance: a role's named ones, and the rest of ``found`` for the roles without names.

    An instance with several devices splits its model over them. Without names an instance gets a power of two that divides
    ``attention_heads``, or one device if those aren't known. Raises ConfigurationError, which says what to name instead, if
    the devices cannot be divided.
    """
    named = {role: chosen for role, chosen in roles.items() if chosen.devices and chosen.count}
    for role, chosen in named.items():
        check_names(f"--{role}-devices", chosen.devices, found)
    devices = {(role, index): dealt for role, chosen in named.items() for index, dealt in _deal(role, chosen)}
    taken = {device for dealt in devices.values() for device in dealt}
    unnamed = {role: chosen.count for role, chosen in roles.items() if chosen.count and not chosen.devices}
    if unnamed and found:
        devices |= _choose(unnamed, [device for device in found if device not in taken], attention_heads)
    return with_shares(roles, devices)


def describe(placements: Placements) -> str:
    """Return the choice in one line; empty if no instance has a GPU."""
    parts = []
    for (role, index), placement in placements.items():
        if not placement.devices:
            continue
        share = f", {placement.memory_share:.0%} of the memory" if placement.memory_share is not None else ""
        plural = "s" if len(placement.devices) > 1 else ""
        parts.append(f"{role}-{index} on GPU{plural} {', '.join(placement.devices)}{share}")
    return "; ".join(parts)


def others_serve(placements: Placements, lost: Collection[tuple[Role, int]]) -> bool:
    """Return whether instances on GPUs can be done without: every role that lost one has another, on other GPUs."""
    gone = {device for place in lost for device in placements[place].devices}
    left = {
        role for (role, index), one in placements.items() if (role, index) not in lost and gone.isdisjoint(one.devices)
    }
    return all(placements[place].devices and place[0] in left for place in lost)


def check_names(option: str, names: Sequence[str], found: Sequence[str]) -> None:
    """Raise ConfigurationError unless the devices that an option names are among those found, each once."""
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise ConfigurationError(f"{option} names {', '.join(repeated)} more than once.")
    missing = [name for name in names if name.isdecimal() and name not in found]
    if missing and all(name.isdecimal() or name.startswith(MIG_PREFIX) for name in found):
        there = f"the GPUs are {', '.join(found)}" if found else "no NVIDIA GPU was found"
        raise ConfigurationError(f"{option}: GPU {', '.join(missing)} cannot be used here; {there}.")


def _deal(role: Role, chosen: RoleConfig) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield number and devices of each instance: several devices for one instance, or several instances on one device."""
    names, count = chosen.devices, chosen.count or 0
    each, rest = divmod(len(names), count)
    if each and not rest:
        for index in range(count):
            yield index, names[index * each : (index + 1) * each]
    elif count % len(names) == 0:
        for index in range(count):
            yield index, (names[index * len(names) // count],)
    else:
        raise ConfigurationError(
            f"--{role}-devices names {len(names)} devices for {count} instances, which cannot be divided evenly; "
            f"name {count} or a multiple of it."
        )


def _choose(
    counts: Mapping[Role, int], free: Sequence[str], attention_heads: int | None
) -> dict[tuple[Role, int], tuple[str, ...]]:
    """Return devices: own ones for each language model; for encoders others if some are left, else the same ones."""
    language = [(role, index) for role, count in counts.items() if role is not Role.ENCODER for index in range(count)]
    encoders = [(Role.ENCODER, index) for index in range(counts.get(Role.ENCODER, 0))]
    if not free or len(language) > len(free):
        names = ", ".join(f"--{role}-devices" for role in counts)
        raise ConfigurationError(
            f"{len(free)} GPU(s) are left for {len(language)} instance(s) of the language model and {len(encoders)} "
            f"encoder(s); ask for fewer instances, or let them share devices by naming these with {names}."
        )
    apart = min(len(encoders), len(free) - len(language))
    for_encoders, rest = list(free[:apart]), free[apart:]
    one_each = any(device.startswith(MIG_PREFIX) for device in rest)  # CUDA shows a process one MIG device at most
    each = _tensor_parallel(len(rest) // len(language), None if one_each else attention_heads) if language else 1
    chosen = {one: tuple(rest[n * each : (n + 1) * each]) for n, one in enumerate(language)}
    shared = for_encoders or list(free)
    return {one: (shared[n % len(shared)],) for n, one in enumerate(encoders)} | chosen


def _tensor_parallel(most: int, attention_heads: int | None) -> int:
    size = 1
    while attention_heads is not None and size * 2 <= most and attention_heads % (size * 2) == 0:
        size *= 2
    return size


def with_shares(roles: Mapping[Role, RoleConfig], devices: Mapping[tuple[Role, int], tuple[str, ...]]) -> Placements:
    """Return the placements of instances on these devices, with what each gets of their memory. Raises ConfigurationError."""
    tenants: dict[str, list[Role]] = {}
    for (role, _), names in devices.items():
        for name in names:
            tenants.setdefault(name, []).append(role)
    shares = {name: _shares(roles, name, on_it) for name, on_it in tenants.items()}
    placements: Placements = {}
    for role, chosen in roles.items():
        for index in range(chosen.count or 0):
            names = devices.get((role, index), ())
            if chosen.memory_share is not None and not names:
                raise ConfigurationError(
                    f"--{role}-memory-share is a fraction of a GPU's memory, and {role} instances have no GPU here."
                )
            shared = any(len(tenants[name]) > 1 for name in names)
            share = min((shares[name][role] for name in names), default=None) if shared else chosen.memory_share
            placements[role, index] = Placement(names, share, shared)
    return placements


def _shares(roles: Mapping[Role, RoleConfig], device: str, tenants: Sequence[Role]) -> dict[Role, float]:
    """Return the fraction of a device's memory for one instance of each role."""
    given = {role: share for role in tenants if (share := roles[role].memory_share) is not None}
    taken = sum(given.get(role, 0.0) for role in tenants)
    others = [role for role in tenants if role not in given]
    if taken > 1:
        raise ConfigurationError(
            f"The instances on GPU {device} are given {taken:.0%} of its memory together; lower their memory shares."
        )
    weights = {role: _ENCODER_WEIGHT if role is Role.ENCODER else _LANGUAGE_WEIGHT for role in others}
    left = _USABLE_SHARE - taken
    shares = {role: round(left * weight / sum(weights[one] for one in others), 4) for role, weight in weights.items()}
    if any(share < _LEAST_SHARE for share in shares.values()):
        names = ", ".join(sorted(set(others)))
        raise ConfigurationError(
            f"GPU {device} has no memory left for {names}; lower the memory shares of the others on it."
        )
    return given | shares
