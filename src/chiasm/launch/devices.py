"""Which GPUs there are, and which instance gets which."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from chiasm.errors import ConfigurationError
from chiasm.launch.config import RoleConfig
from chiasm.wire import Role

_LISTED = re.compile(r"^GPU (\d+):", re.MULTILINE)
_LIST_SECONDS = 20.0
_USABLE_SHARE = 0.9
"""Fraction of a shared device's memory that instances get; driver and libraries of each process take the rest."""
_LEAST_SHARE = 0.02
_ENCODER_WEIGHT = 1
_LANGUAGE_WEIGHT = 3
"""Share of the memory relative to an encoder: a language model is larger, and holds KV."""


@dataclass(frozen=True)
class Placement:
    """Where one instance computes. Without devices: on CPU, or where the engine chooses."""

    devices: tuple[str, ...] = ()
    memory_share: float | None = None
    """Fraction of each device's memory; None: what the engine takes of a device of its own."""
    shared: bool = False
    """Whether another instance computes on one of the devices."""


Placements = dict[tuple[Role, int], Placement]
"""By an instance's role and its number within the role."""


def found_devices(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the NVIDIA GPUs that a process of this environment may use, by ``nvidia-smi``'s numbers or by UUID."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip() not in {"", "-1"})
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_LIST_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(_LISTED.findall(listed))


def place(roles: Mapping[Role, RoleConfig], found: Sequence[str], attention_heads: int | None = None) -> Placements:
    """Return the GPUs of each instance: a role's named ones, and the rest of ``found`` for the roles without names.

    An instance with several devices splits its model over them. Without names an instance gets a power of two that divides
    ``attention_heads``, or one device if those aren't known. Raises ConfigurationError, which says what to name instead, if
    the devices cannot be divided.
    """
    named = {role: chosen for role, chosen in roles.items() if chosen.devices and chosen.count}
    for role, chosen in named.items():
        check_names(role, chosen.devices, found)
    devices = {(role, index): dealt for role, chosen in named.items() for index, dealt in _deal(role, chosen)}
    taken = {device for dealt in devices.values() for device in dealt}
    unnamed = {role: chosen.count for role, chosen in roles.items() if chosen.count and not chosen.devices}
    if unnamed and found:
        devices |= _choose(unnamed, [device for device in found if device not in taken], attention_heads)
    return _with_shares(roles, devices)


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


def check_names(role: Role, names: Sequence[str], found: Sequence[str]) -> None:
    """Raise ConfigurationError unless the devices named for ``role`` are among those found, each once."""
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise ConfigurationError(f"--{role}-devices names {', '.join(repeated)} more than once.")
    missing = [name for name in names if name.isdecimal() and name not in found]
    if missing and all(name.isdecimal() for name in found):
        there = f"the GPUs are {', '.join(found)}" if found else "no NVIDIA GPU was found"
        raise ConfigurationError(f"--{role}-devices: GPU {', '.join(missing)} cannot be used here; {there}.")


def _deal(role: Role, chosen: RoleConfig) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield number and devices of each instance: several devices for one instance, or several instances on one device."""
    names, count = chosen.devices, chosen.count
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
    each = _tensor_parallel(len(rest) // len(language), attention_heads) if language else 1
    chosen = {one: tuple(rest[n * each : (n + 1) * each]) for n, one in enumerate(language)}
    shared = for_encoders or list(free)
    return {one: (shared[n % len(shared)],) for n, one in enumerate(encoders)} | chosen


def _tensor_parallel(most: int, attention_heads: int | None) -> int:
    size = 1
    while attention_heads is not None and size * 2 <= most and attention_heads % (size * 2) == 0:
        size *= 2
    return size


def _with_shares(roles: Mapping[Role, RoleConfig], devices: Mapping[tuple[Role, int], tuple[str, ...]]) -> Placements:
    tenants: dict[str, list[Role]] = {}
    for (role, _), names in devices.items():
        for name in names:
            tenants.setdefault(name, []).append(role)
    shares = {name: _shares(roles, name, on_it) for name, on_it in tenants.items()}
    placements: Placements = {}
    for role, chosen in roles.items():
        for index in range(chosen.count):
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
