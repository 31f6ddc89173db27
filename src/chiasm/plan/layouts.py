"""The candidates: which instances could run on which devices, whether they fit there, and how one starts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from chiasm.cores import show_cpus
from chiasm.engine.config import EngineConfig
from chiasm.errors import ConfigurationError
from chiasm.launch.layout import Layout, even_shares, in_words
from chiasm.memory import free_memory
from chiasm.plan.devices import Cpu, Device, Gpu
from chiasm.plan.language import LanguageLimits
from chiasm.plan.shapes import ModelShape
from chiasm.plan.sharing import NICE_5_WEIGHT, NORMAL_WEIGHT, STREAM_WEIGHT
from chiasm.wire import Role

USABLE_SHARE = 0.9
"""Share of a GPU's memory that instances get; driver and libraries take the rest."""
ACTIVATION_BYTES = 1_500_000_000
"""What a process on a GPU needs besides weights and caches."""
_FINE_DEVICES = 8
"""Of more devices than this, roles get multiples of an eighth of them."""
_MOST_PAIRS = 4
"""Encoders, each with a PD, that are tried on one CPU."""
_ROLES = (Role.ENCODER, Role.PREFILL, Role.DECODE, Role.PD, Role.AGGREGATED)


@dataclass(frozen=True)
class PlannedInstance:
    """One instance, and what it gets of its place."""

    role: Role
    place: int
    """Index in ``Candidate.places``."""
    threads: int = 1
    """CPU threads at most."""
    adapts: bool = True
    """Whether it takes what its neighbours leave idle; see ``sharing``."""
    encoder_weight: float = NORMAL_WEIGHT
    """That of the encoder inside it, or of the encoder that it is."""


@dataclass(frozen=True)
class Place:
    """A GPU, or some cores of a CPU, that work is divided on."""

    device: Device
    cores: int = 1
    number: int = 0
    """The GPU's place in --devices, counted from 0."""

    @property
    def device_type(self) -> str:
        """``cpu`` or ``cuda``."""
        return "cpu" if isinstance(self.device, Cpu) else "cuda"


@dataclass(frozen=True)
class Candidate:
    """A deployment that could be."""

    layout: Layout
    places: tuple[Place, ...]
    instances: tuple[PlannedInstance, ...]
    options: str
    """What ``chiasm serve MODEL`` needs to start it."""

    @property
    def counts(self) -> dict[Role, int]:
        """Number of instances by role, of the roles that there are."""
        found = Counter(instance.role for instance in self.instances)
        return {role: found[role] for role in _ROLES if found[role]}

    @property
    def name(self) -> str:
        return f"{self.layout}: {in_words(self.counts)}"

    @property
    def on_gpus(self) -> bool:
        return isinstance(self.places[0].device, Gpu)

    @property
    def num_devices(self) -> int:
        """GPUs; the cores of a CPU are one device."""
        return len({place.number for place in self.places})


def places_of(devices: Sequence[Device]) -> list[Place]:
    """Return all of each device."""
    return [
        Place(device, device.cores if isinstance(device, Cpu) else 1, number) for number, device in enumerate(devices)
    ]


def candidates(devices: Sequence[Device]) -> list[Candidate]:
    """Return what is worth trying on these devices."""
    if isinstance(devices[0], Cpu):
        return list(_on_cpu(devices[0]))
    return list(_on_gpus(places_of(devices)))


# ---- CPU ---------------------------------------------------------------------------------------------------------------


def _on_cpu(cpu: Cpu) -> Iterator[Candidate]:
    cores = cpu.cores
    for count in dict.fromkeys((1, min(cores, _MOST_PAIRS))):
        yield aggregated_on_cpu(cpu, count)
    for pairs in range(1, min(cores, _MOST_PAIRS) + 1):
        yield colocated_on_cpu(cpu, pairs, pairs)
    for total in dict.fromkeys((2, cores)):
        step = max(1, total // _FINE_DEVICES)
        for encoders in range(step, total, step) if total <= cores else ():
            yield split_on_cpu(cpu, encoders, total - encoders)


def aggregated_on_cpu(cpu: Cpu, count: int, *, divided: bool = False) -> Candidate:
    """Return aggregated instances on all cores, which they share or divide."""
    threads = even_shares(cpu.cores, count) if divided else [cpu.cores] * count
    instances = [PlannedInstance(Role.AGGREGATED, 0, one, encoder_weight=NICE_5_WEIGHT) for one in threads]
    if divided:
        options = _dividing(cpu, f"--aggregated {count}", instances)
    else:
        options = _sharing(cpu, f"--layout aggregated --aggregated {count}")
    return Candidate(Layout.AGGREGATED, (Place(cpu, cpu.cores),), tuple(instances), options)


def colocated_on_cpu(cpu: Cpu, encoders: int, pds: int) -> Candidate:
    """Return encoders beside PDs on all cores."""
    place = Place(cpu, cpu.cores)
    instances = (
        *(PlannedInstance(Role.ENCODER, 0, cpu.cores, encoder_weight=NICE_5_WEIGHT),) * encoders,
        *(PlannedInstance(Role.PD, 0, cpu.cores),) * pds,
    )
    options = _sharing(cpu, f"--layout colocated --encoders {encoders} --pds {pds}")
    return Candidate(Layout.COLOCATED, (place,), instances, options)


def _sharing(cpu: Cpu, options: str) -> str:
    """Return the options of instances that share the cores."""
    return f"{options} --devices {show_cpus(cpu.cpus)}" if cpu.cpus else options


def split_on_cpu(cpu: Cpu, encoders: int, pds: int) -> Candidate:
    """Return encoders and PDs that divide the cores evenly; those that are left over go to PDs first."""
    shares = [max(1, share) for share in even_shares(cpu.cores, encoders + pds)]
    dealt = [*((Role.ENCODER, share) for share in shares[pds:]), *((Role.PD, share) for share in shares[:pds])]
    places = tuple(Place(cpu, cores) for _, cores in dealt)
    instances = tuple(PlannedInstance(role, index, cores) for index, (role, cores) in enumerate(dealt))
    options = _dividing(cpu, f"--layout split --encoders {encoders} --pds {pds}", instances)
    return Candidate(Layout.SPLIT, places, instances, options)


def _dividing(cpu: Cpu, options: str, instances: Sequence[PlannedInstance]) -> str:
    """Return the options of instances whose roles divide the cores: each role has as many as its threads."""
    left = list(cpu.cpus)
    for role in dict.fromkeys(instance.role for instance in instances) if left else ():
        number = sum(instance.threads for instance in instances if instance.role is role)
        options += f" --{role}-cpus {show_cpus(left[:number])}"
        del left[:number]
    return options


# ---- GPUs --------------------------------------------------------------------------------------------------------------


def _on_gpus(places: Sequence[Place]) -> Iterator[Candidate]:
    # The weakest first: encoders need the least memory, decode more bandwidth, prefill the most arithmetic.
    weakest = sorted(places, key=lambda place: (_gpu(place).flops, _gpu(place).memory_bytes_per_second))
    number = len(places)
    step = max(1, number // _FINE_DEVICES)
    counts = range(step, number, step)
    yield _built(Layout.AGGREGATED, weakest, [(Role.AGGREGATED,)] * number)
    yield _built(Layout.COLOCATED, weakest, [(Role.ENCODER, Role.PD)] * number)
    for prefills in counts:
        decodes = [(Role.ENCODER, Role.DECODE)] * (number - prefills)
        yield _built(Layout.COLOCATED, weakest, [*decodes, *[(Role.ENCODER, Role.PREFILL)] * prefills])
    for encoders in counts:
        rest = number - encoders
        yield _built(Layout.SPLIT, weakest, [*[(Role.ENCODER,)] * encoders, *[(Role.PD,)] * rest])
        for prefills in range(step, rest, step):
            roles = [(Role.ENCODER,)] * encoders + [(Role.DECODE,)] * (rest - prefills) + [(Role.PREFILL,)] * prefills
            yield _built(Layout.SPLIT, weakest, roles)


def _gpu(place: Place) -> Gpu:
    assert isinstance(place.device, Gpu)
    return place.device


def _built(layout: Layout, places: Sequence[Place], roles: Sequence[tuple[Role, ...]]) -> Candidate:
    instances = tuple(_on_gpu(role, index) for index, group in enumerate(roles) for role in group)
    made = Candidate(layout, tuple(places), instances, "")
    options = [f"--layout {layout}"]
    mixed = len({_gpu(place).name for place in places}) > 1
    if layout is Layout.COLOCATED and Role.PREFILL in made.counts:
        # The devices don't all have the same roles, so each role names its own.
        options, mixed = [f"--layout {Layout.SPLIT}"], True
    if options == [f"--layout {Layout.SPLIT}"]:
        options += [f"--{role}s {count}" for role, count in made.counts.items()]
        if mixed:
            options += [
                f"--{role}-devices {','.join(str(places[one.place].number) for one in instances if one.role is role)}"
                for role in made.counts
            ]
    return Candidate(layout, tuple(places), instances, " ".join(options))


def _on_gpu(role: Role, place: int) -> PlannedInstance:
    weight = STREAM_WEIGHT if role is Role.AGGREGATED else NORMAL_WEIGHT
    return PlannedInstance(role, place, encoder_weight=weight)


# ---- memory ------------------------------------------------------------------------------------------------------------


class DoesNotFitError(Exception):
    """A candidate needs more memory than there is. The message says what doesn't fit."""


def limits_of(candidate: Candidate, shape: ModelShape, longest_tokens: int) -> list[LanguageLimits | None]:
    """Return what each instance has room for, None for encoders. Raises DoesNotFitError.

    ``longest_tokens`` is the length of the longest request, prompt and answer together. Room that requests can never use is
    left out, since it would only take the simulation's time.
    """
    rooms = [_room(candidate, index, shape) for index in range(len(candidate.places))]
    found: list[LanguageLimits | None] = []
    for instance in candidate.instances:
        if instance.role is Role.ENCODER:
            found.append(None)
        else:
            found.append(
                _language_limits(candidate.places[instance.place], shape, rooms[instance.place], longest_tokens)
            )
    return found


def _room(candidate: Candidate, place: int, shape: ModelShape) -> float:
    """Return the bytes that each language model at a place has for KV. Raises DoesNotFitError if its weights don't fit."""
    roles = [instance.role for instance in candidate.instances if instance.place == place]
    encoders = sum(role in (Role.ENCODER, Role.AGGREGATED) for role in roles)
    languages = sum(role is not Role.ENCODER for role in roles)
    weights = encoders * shape.vision_bytes + languages * shape.language_bytes
    device = candidate.places[place].device
    if isinstance(device, Cpu):
        total = float(free_memory())
        weights *= len(candidate.places)
        other = 0.0
    else:
        total, other = device.memory_bytes * USABLE_SHARE, ACTIVATION_BYTES * float(len(roles))
    room = total - weights - other
    if room <= 0:
        raise DoesNotFitError(
            f"the weights of {' and '.join(roles)} ({weights / 1e9:.0f} GB) do not fit the "
            f"{total / 1e9:.0f} GB of {device.name}"
        )
    return room / max(1, languages)


def _language_limits(place: Place, shape: ModelShape, room: float, longest_tokens: int) -> LanguageLimits:
    from chiasm.engine.device import (
        CPU_KV_CACHE_BYTES,
        KV_CACHE_SHARE,
        MAX_PREFILL_TOKENS,
        MAX_REST_TOKENS,
        MIN_TEXT_BEFORE_ITEM,
    )

    kind = place.device_type
    kv_bytes = room * KV_CACHE_SHARE[kind]
    if kind == "cpu":
        kv_bytes = min(kv_bytes, CPU_KV_CACHE_BYTES)
    block_size = EngineConfig.block_size
    useful = EngineConfig.max_num_seqs * -(-shape.max_model_len // block_size)
    blocks = int(kv_bytes // (block_size * shape.kv_bytes_per_token))
    if blocks * block_size < longest_tokens:
        needed = longest_tokens * shape.kv_bytes_per_token
        raise DoesNotFitError(
            f"the KV of the longest request, {longest_tokens} tokens, takes {needed / 1e9:.1f} GB, and {place.device.name} has "
            f"{kv_bytes / 1e9:.1f} GB for it"
        )
    return LanguageLimits(
        num_blocks=min(blocks, useful),
        block_size=block_size,
        max_model_len=shape.max_model_len,
        max_num_batched_tokens=EngineConfig.max_num_batched_tokens,
        max_prefill_tokens=MAX_PREFILL_TOKENS[kind],
        max_rest_tokens=MAX_REST_TOKENS,
        device_type=kind,
        min_text_before_item=MIN_TEXT_BEFORE_ITEM,
        max_num_seqs=EngineConfig.max_num_seqs,
        max_queued_requests=EngineConfig.max_queued_requests,
        encoder_cache_bytes=EngineConfig.encoder_cache_bytes,
        entry_bytes_per_row=shape.entry_bytes_per_row,
    )


def fitting(
    candidates_: Sequence[Candidate], shape: ModelShape, longest_tokens: int, note: Callable[[Candidate, str], None]
) -> list[Candidate]:
    """Return those that fit; ``note`` is told of the others, and why. Raises ConfigurationError if none fits."""
    found: list[Candidate] = []
    reasons: list[str] = []
    for candidate in candidates_:
        try:
            limits_of(candidate, shape, longest_tokens)
        except DoesNotFitError as error:
            reasons.append(str(error))
            note(candidate, str(error))
        else:
            found.append(candidate)
    if not found:
        raise ConfigurationError(f"{shape.name} does not fit these devices in any layout: {reasons[0]}.")
    return found
