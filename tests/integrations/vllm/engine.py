"""A stand-in for vLLM's engine: it calls both halves in vLLM's order, and stops where vLLM's engine would stop.

contract.py holds it to the real one.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from chiasm.ec_transfer import ECConnector, ECConnectorFactory, ECConnectorMetadata, ECConnectorRole, ECTransferRole
from chiasm.ec_transfer.entry_file import InvalidEntryError, open_entry
from chiasm.ec_transfer.pins import PinnedMetadata
from chiasm.integrations.vllm.items import Layout
from chiasm.integrations.vllm.messages import StepMetadata, StepReport
from chiasm.integrations.vllm.scheduler import Reach, SchedulerHalf
from chiasm.integrations.vllm.settings import Settings
from chiasm.integrations.vllm.worker import WorkerHalf

LAYOUT = Layout(hidden=8, levels=1, dtype="float32")
ROWS = 4
WINDOW = 32
WAIT_SECONDS = 10.0
KV_CACHE_TOKENS = 1000
FINGERPRINT = "aa"
IDENTIFIER = re.compile("[0-9a-f]{64}")


def identifier_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def embedding_of(name: str, rows: int = ROWS, width: int = LAYOUT.width) -> torch.Tensor:
    """Return a tensor that no other name has."""
    generator = torch.Generator().manual_seed(int(identifier_of(name)[:12], 16))
    return torch.randn(rows, width, generator=generator)


@dataclass(frozen=True)
class Position:
    offset: int
    length: int

    def get_num_embeds(self) -> int:
        return self.length


@dataclass(frozen=True)
class Feature:
    """One item of a vLLM request; without pixels its data only sizes the placeholders."""

    identifier: str
    mm_position: Position
    data: dict[str, object]
    modality: str = "image"


@dataclass
class Request:
    request_id: str
    mm_features: list[Feature]
    num_tokens: int
    num_computed_tokens: int = 0
    skip_reading_prefix_cache: bool = False
    ends_with_prompt: bool = False
    """Whether it is finished once its prompt is computed."""


def request(*places: tuple[str, int], of: str = "request", tokens: int = 0, pixels: bool = False) -> Request:
    """Return a request with items of these names at these offsets."""
    data: dict[str, object] = {"image_grid_thw": [1, 2, 2], **({"pixel_values": b""} if pixels else {})}
    features = [Feature(identifier_of(name), Position(offset, ROWS), data) for name, offset in places]
    end = max((offset for _, offset in places), default=0) + ROWS + 2
    return Request(of, features, tokens or end)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Memory:
    """vLLM's account of its encoder cache: which requests use which items, and what may go."""

    def __init__(self, half: SchedulerHalf) -> None:
        self._half = half
        self.users: dict[str, set[str]] = {}
        self.freed: list[str] = []
        half.attach(self)

    def holds(self, identifier: str) -> bool:
        return identifier in self.users

    def forget(self, identifier: str) -> bool:
        if self.users.get(identifier):
            return False
        if self.users.pop(identifier, None) is not None:
            self.freed.append(identifier)
        return True

    def use(self, identifier: str, request_id: str) -> None:
        self.users.setdefault(identifier, set()).add(request_id)

    def release(self, request: Request, up_to: int | None = None) -> None:
        """End the request's use of its items, or of those that end within its first ``up_to`` tokens."""
        for feature in request.mm_features:
            place = feature.mm_position
            if up_to is not None and place.offset + place.length > up_to:
                continue
            if request.request_id in self.users.get(feature.identifier, ()):
                self.users[feature.identifier].discard(request.request_id)
                self._half.released(feature.identifier)

    def take_freed(self) -> list[str]:
        freed, self.freed = self.freed, []
        return [identifier for identifier in freed if identifier not in self.users]


@dataclass
class Step:
    """What was decided for a step."""

    metadata: StepMetadata
    freed: list[str]
    tokens: dict[str, int] = field(default_factory=dict)
    """How many tokens are computed, by request."""
    encoded: list[str] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    """Items whose embeddings the model reads."""


def far(metadata: StepMetadata) -> StepMetadata:
    """Return the message as a worker on another host gets it: the scheduler's copies of entries are out of its reach."""
    loads = pickle.loads(pickle.dumps(metadata.loads))
    assert isinstance(loads, PinnedMetadata)
    return replace(metadata, loads=PinnedMetadata(loads.loads))


class _Place(NamedTuple):
    identifier: str
    offset: int = 0
    length: int = ROWS


class _Wanted(NamedTuple):
    request_id: str
    items: list[_Place]


def wait_for_arrivals(store: ECConnector, folder: Path, request_id: str, identifiers: list[str]) -> None:
    """Say what a request wants, and return when the connector has brought in all of it that the folder has."""
    identifiers = [name for name in identifiers if IDENTIFIER.fullmatch(name)]
    store.ensure_cache_available(_Wanted(request_id, [_Place(name) for name in identifiers]), 0)
    for name in identifiers:
        while _is_usable(folder, name) and not store.has_cache_item(name):
            time.sleep(0.001)


def _is_usable(folder: Path, identifier: str) -> bool:
    try:
        entry = open_entry(str(folder / f"{identifier}.safetensors"), identifier, FINGERPRINT, None, mapped=False)
        return entry.matches_checksum()
    except (OSError, InvalidEntryError):
        return False


class Engine:
    """One instance: scheduler and worker with their halves of the connector.

    They are as in two processes if the connector uses a folder, and in one if it doesn't.
    """

    def __init__(
        self,
        settings: Settings | Path,
        role: ECTransferRole,
        reach: Reach | None = None,
        max_bytes: int = 1 << 30,
        store: str = "",
        *,
        apart: bool = False,
    ) -> None:
        """A path stands for settings with that folder; ``store`` is the URL of a shared cache.

        ``apart``: what passes between the halves is what passes between processes, as it always is with a folder.
        """
        if isinstance(settings, Path):
            folder = {"shared_storage_path": settings}
            settings = Settings(wait_seconds=WAIT_SECONDS, max_bytes=max_bytes, connector_extra_config=folder)
        is_producer, is_reader = role is not ECTransferRole.CONSUMER, role is not ECTransferRole.PRODUCER
        self._in_one_process = not settings.uses_folder and not apart
        config = settings.transfer_config(
            role,
            fingerprint=FINGERPRINT,
            device="cpu",
            in_one_process=self._in_one_process,
            fleet_key=None,
            store=store,
            dtype=LAYOUT.dtype,
            entry_width=LAYOUT.width,
        )
        self.clock = Clock()
        self._reach = reach or Reach(WINDOW)
        self.is_producer, self.is_reader = is_producer, is_reader
        self._folder = None if store else settings.folder
        self.scheduler_store = ECConnectorFactory.create_connector(config, ECConnectorRole.SCHEDULER)
        self.worker_store = ECConnectorFactory.create_connector(config, ECConnectorRole.WORKER)
        if self._in_one_process:
            self.scheduler_store.meet(self.worker_store)
            self.worker_store.meet(self.scheduler_store)
        self.scheduler = SchedulerHalf(
            self.scheduler_store,
            settings,
            LAYOUT,
            lambda modality: {"image_grid_thw"},
            reach=self._reach,
            kv_cache_tokens=KV_CACHE_TOKENS,
            is_producer=is_producer,
            is_reader=is_reader,
            clock=self.clock,
        )
        self.worker = WorkerHalf(self.worker_store, torch.float32, is_writer=lambda: True)
        self.memory = Memory(self.scheduler)
        self.encoder_cache: dict[str, torch.Tensor] = {}
        self.embeddings: dict[str, torch.Tensor] = {}
        """What the encoder computes, by identifier."""

    def schedule(self, *requests: Request, cached_tokens: int = 0) -> Step:
        """Plan a step; the prefix cache has ``cached_tokens`` of each request that begins.

        What is in the folder and usable has arrived by then.
        """
        self.wait_for_arrivals(*requests)
        step = Step(StepMetadata(0, ECConnectorMetadata()), [])
        for each in requests:
            hit = cached_tokens if each.num_computed_tokens == 0 and not each.skip_reading_prefix_cache else 0
            computed = each.num_computed_tokens or hit
            if self.scheduler.ensure_cache_available(each, computed):
                each.num_computed_tokens = computed + self._allocate(each, computed, step)
        step.metadata, step.freed = (
            self.scheduler.build_connector_meta(sum(step.tokens.values())),
            self.memory.take_freed(),
        )
        return step

    def wait_for_arrivals(self, *requests: Request) -> None:
        """Return when all that these requests lack has arrived, as far as it is in the folder and usable.

        Does nothing without a folder.
        """
        if self._folder is None:
            return
        for each in requests:
            wanted = [feature.identifier for feature in each.mm_features if "pixel_values" not in feature.data]
            missing = [name for name in wanted if not self.memory.holds(name)]
            wait_for_arrivals(self.scheduler_store, self._folder, each.request_id, missing)

    def awaited(self) -> list[str]:
        return self.scheduler.not_coming(self.scheduler.missing())

    def _allocate(self, request: Request, computed: int, step: Step) -> int:
        end = min(request.num_tokens, computed + self._reach.window_tokens)
        allocated = []
        for index, feature in enumerate(request.mm_features):
            place = feature.mm_position
            if place.offset + place.length <= computed or place.offset >= end:
                continue
            if feature.identifier not in self.memory.users:
                half, request_id = self.scheduler, request.request_id
                if half.is_out_of_reach(request_id, index) or not half.can_get(request_id, index):
                    end = max(place.offset, computed)
                    break
                if not half.has_cache_item(feature.identifier):
                    assert "pixel_values" in feature.data, "the encoder stops the engine: there are no pixels"
                    step.encoded.append(feature.identifier)
                allocated.append(index)
            self.memory.use(feature.identifier, request.request_id)
            step.touched.add(feature.identifier)
        for index in allocated:
            self.scheduler.update_state_after_alloc(request, index)
        if end > computed:
            step.tokens[request.request_id] = end - computed
        return end - computed

    def run(self, step: Step) -> StepReport | None:
        """Do the workers' part."""
        metadata = step.metadata if self._in_one_process else pickle.loads(pickle.dumps(step.metadata))
        for identifier in step.freed:
            self.encoder_cache.pop(identifier, None)
        self.worker.bind(metadata)
        if self.is_producer:
            self.worker.start_save_caches(self.encoder_cache)
        if self.is_reader:
            self.worker.start_load_caches(self.encoder_cache)
        for identifier in step.encoded:
            self.encoder_cache[identifier] = self.embeddings[identifier]
            if self.is_producer:
                self.worker.save_caches(self.encoder_cache, identifier)
        if self.is_reader:
            for identifier in step.touched:
                assert identifier in self.encoder_cache, "a missing embedding stops the engine"
                assert self.encoder_cache[identifier].shape == (ROWS, LAYOUT.width), "so does a wrong shape"
        report = self.worker.report()
        self.worker.clear()
        return report

    def update(self, *requests: Request, report: StepReport | None = None) -> set[str]:
        """End a step, and return the requests that failed and so are finished."""
        for each in requests:
            self.memory.release(each, up_to=each.num_computed_tokens)
            if each.ends_with_prompt and each.num_computed_tokens >= each.num_tokens:
                self.finish(each)
        failed = self.scheduler.take_unavailable_requests()
        for each in requests:
            if each.request_id in failed:
                self.finish(each)
        if report is not None:
            self.scheduler.update_connector_output(report)
        return failed

    def step(self, *requests: Request, cached_tokens: int = 0) -> Step:
        step = self.schedule(*requests, cached_tokens=cached_tokens)
        assert self.update(*requests, report=self.run(step)) == set()
        return step

    def finish(self, request: Request) -> None:
        self.scheduler.request_finished(request)
        self.memory.release(request)

    def close(self) -> None:
        self.scheduler.shutdown()
        self.scheduler_store.shutdown()
        self.worker_store.shutdown()

    def counts(self) -> dict[str, float]:
        return self.scheduler.take_counts()
