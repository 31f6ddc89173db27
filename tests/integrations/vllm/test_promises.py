"""What was promised is there when the model runs, whatever happens to the folder meanwhile."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from chiasm.ec_transfer import ECTransferRole
from chiasm.integrations.vllm.messages import StepReport

from .conftest import Encoder
from .engine import KV_CACHE_TOKENS, Engine, Request, Step, embedding_of, far, identifier_of, request


def overwrite(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARM: dict[str, Callable[[Path], None]] = {
    "removed": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "cut off": lambda path: os.truncate(path, 4100),
    "overwritten": overwrite,
    "folder removed": lambda path: shutil.rmtree(path.parent),
    "replaced by a folder": replace_by_folder,
}


@pytest.mark.parametrize("harm", HARM)
def test_an_entry_is_loaded_whatever_happens_to_it_after_planning(encoder: Encoder, pd: Engine, harm: str) -> None:
    path = encoder.publish("a")
    one = request(("a", 2))
    step = pd.schedule(one)
    HARM[harm](path)
    assert pd.update(one, report=pd.run(step)) == set()
    assert torch.equal(pd.encoder_cache[identifier_of("a")], embedding_of("a"))


@pytest.mark.parametrize("harm", HARM)
def test_an_entry_that_goes_before_it_arrives_is_waited_for(encoder: Encoder, pd: Engine, harm: str) -> None:
    HARM[harm](encoder.publish("a"))
    one = request(("a", 2))
    step = pd.schedule(one)
    assert step.tokens == {}
    assert pd.update(one, report=pd.run(step)) == set()


@pytest.mark.parametrize("harm", HARM)
def test_an_entry_is_loaded_whatever_happens_to_it_after_it_has_arrived(
    encoder: Encoder, pd: Engine, harm: str
) -> None:
    path = encoder.publish("a")
    one = request(("a", 2))
    half, name = pd.scheduler, identifier_of("a")
    pd.wait_for_arrivals(one)
    HARM[harm](path)
    assert half.ensure_cache_available(one, 0)
    assert half.can_get("request", 0)
    assert half.has_cache_item(name)
    pd.memory.use(name, "request")
    half.update_state_after_alloc(one, 0)
    report = pd.run(Step(half.build_connector_meta(0), [], touched={name}))
    assert pd.update(one, report=report) == set()
    assert torch.equal(pd.encoder_cache[name], embedding_of("a"))


def descriptors() -> set[tuple[str, str]]:
    """What this process has open: numbers, and what they stand for."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def test_copies_are_released_when_the_step_is_done(encoder: Encoder, pd: Engine) -> None:
    encoder.publish("a")
    before = descriptors()
    one = request(("a", 2))
    step = pd.schedule(one)
    metadata, step.metadata = step.metadata, pickle.loads(pickle.dumps(step.metadata))
    del metadata
    held = descriptors() - before
    assert held
    pd.update(one, report=pd.run(step))
    pd.worker.clear()
    del step
    assert len(held & descriptors()) <= 1  # the page of the counters


# ---- a worker on another host ------------------------------------------------------------------------------------------


def test_a_far_worker_finds_the_entry_by_its_name(encoder: Encoder, pd: Engine) -> None:
    encoder.publish("a")
    one = request(("a", 2))
    assert pd.update(one, report=run_far(pd, pd.schedule(one))) == set()
    assert torch.equal(pd.encoder_cache[identifier_of("a")], embedding_of("a"))


def run_far(engine: Engine, step: Step) -> StepReport | None:
    """Run the step on a worker on another host."""
    step.metadata = far(step.metadata)
    return engine.run(step)


def lose(pd: Engine, encoder: Encoder, *requests: Request) -> set[str]:
    """Run a step in which the entry "a" goes before a worker on another host has it; return the requests that failed."""
    path = encoder.publish("a")
    step = pd.schedule(*requests)
    path.unlink()
    report = run_far(pd, step)
    assert not pd.encoder_cache[identifier_of("a")].any(), "zeros take the place"
    pd.update(report=report)
    return pd.update(*requests)


def test_an_entry_that_a_far_worker_lost_fails_exactly_the_requests_that_used_it(encoder: Encoder, pd: Engine) -> None:
    encoder.publish("b")
    first, second, good = request(("a", 2), of="1"), request(("b", 2), ("a", 8), of="2"), request(("b", 2), of="good")
    assert lose(pd, encoder, first, second, good) == {"1", "2"}


def test_an_entry_that_a_far_worker_lost_is_loaded_once_it_is_back(encoder: Encoder, pd: Engine) -> None:
    lose(pd, encoder, request(("a", 2), of="lost"))
    one = request(("a", 2))
    assert pd.step(one).tokens == {}
    encoder.publish("a")
    assert pd.step(one).tokens == {"request": 8}
    assert torch.equal(pd.encoder_cache[identifier_of("a")], embedding_of("a"))


def test_an_entry_that_a_far_worker_lost_is_loaded_at_once_if_it_is_back_already(encoder: Encoder, pd: Engine) -> None:
    lose(pd, encoder, request(("a", 2), of="lost"))
    encoder.publish("a")
    assert pd.step(request(("a", 2))).tokens == {"request": 8}
    assert torch.equal(pd.encoder_cache[identifier_of("a")], embedding_of("a"))


def test_a_far_worker_does_not_use_an_entry_of_another_shape(encoder: Encoder, pd: Engine) -> None:
    path = encoder.publish("a")
    one = request(("a", 2))
    step = pd.schedule(one)
    path.unlink()
    encoder.publish("a", embedding_of("a", rows=2))
    pd.update(report=run_far(pd, step))
    assert pd.update(one) == {"request"}


def test_zeros_are_never_published(folder: Path, encoder: Encoder) -> None:
    both = Engine(folder, ECTransferRole.BOTH)
    path = encoder.publish("a")
    first, second = request(("a", 2), of="1"), request(("a", 2), of="2")
    step = both.schedule(first)
    path.unlink()
    following = both.schedule(second)  # planned before the first step has reported its failure
    assert following.metadata.publish == (identifier_of("a"),)
    report = run_far(both, step)
    both.run(following)
    assert not path.exists()
    both.update(report=report)
    assert both.update(first, second) == {"1", "2"}


def test_a_request_that_used_the_embedding_earlier_goes_on(encoder: Encoder, pd: Engine) -> None:
    path = encoder.publish("a")
    earlier = request(("a", 2), of="earlier")
    pd.step(earlier)
    earlier.num_tokens += 1
    pd.memory.users.clear()
    pd.encoder_cache.clear()
    path.unlink()
    assert lose(pd, encoder, earlier, request(("a", 2), of="lost")) == {"lost"}


def test_blocks_computed_from_zeros_are_not_taken_from_the_prefix_cache(encoder: Encoder, pd: Engine) -> None:
    lose(pd, encoder, request(("a", 2), of="lost"))
    encoder.publish("a")
    one = request(("a", 2), tokens=9)
    assert pd.step(one, cached_tokens=8).tokens == {}
    assert one.skip_reading_prefix_cache
    assert pd.step(one, cached_tokens=8).tokens == {"request": 9}
    assert not request(("b", 2)).skip_reading_prefix_cache


def test_such_blocks_are_forgotten_once_the_kv_cache_has_been_overwritten(encoder: Encoder, pd: Engine) -> None:
    lose(pd, encoder, request(("a", 2), of="lost"))
    encoder.publish("a")
    pd.scheduler.build_connector_meta(KV_CACHE_TOKENS - 1)
    assert pd.step(request(("a", 2), of="early", tokens=9), cached_tokens=8).tokens == {}
    pd.scheduler.build_connector_meta(1)
    assert pd.step(request(("a", 2), of="late", tokens=9), cached_tokens=8).tokens == {"late": 1}


def test_many_lost_items_cost_other_images_no_prefix_hit(encoder: Encoder, pd: Engine) -> None:
    pd.scheduler.update_connector_output(StepReport(1, frozenset(map(identifier_of, map(str, range(2000))))))
    encoder.publish("a")
    assert pd.step(request(("a", 2), tokens=9), cached_tokens=8).tokens == {"request": 1}


def test_a_request_that_got_such_blocks_in_the_same_step_fails(encoder: Encoder, pd: Engine) -> None:
    path = encoder.publish("a")
    first, second = request(("a", 2), of="1", tokens=9), request(("a", 2), of="2", tokens=9)
    step = pd.schedule(first)
    following = pd.schedule(second, cached_tokens=8)  # before the first step is done
    assert following.tokens == {"2": 1}
    path.unlink()
    pd.update(report=run_far(pd, step))
    assert pd.update(first, second) == {"1", "2"}


# ---- encoders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def producer(folder: Path) -> Engine:
    engine = Engine(folder, ECTransferRole.PRODUCER)
    engine.embeddings = {identifier_of(name): embedding_of(name) for name in "ab"}
    return engine


def encode(producer: Engine, name: str, of: str = "request") -> Step:
    one = request((name, 2), of=of, pixels=True)
    step = producer.step(one)
    producer.finish(one)
    return step


def test_an_encoder_publishes(producer: Engine, encoder: Encoder) -> None:
    encode(producer, "a")
    assert encoder.path("a").exists()
    counts = producer.counts()
    assert (counts["misses"], counts["saves"], counts["saved_bytes"]) == (1, 1, embedding_of("a").nbytes)


def test_what_the_store_has_is_not_encoded(producer: Engine, encoder: Encoder) -> None:
    encoder.publish("a")
    assert encode(producer, "a").encoded == []
    assert producer.counts() == {"hits": 1}
    assert producer.scheduler.is_published(identifier_of("a"))


def test_what_the_store_has_lost_is_encoded_again(producer: Engine, encoder: Encoder) -> None:
    encoder.publish("a")
    encode(producer, "a")
    encoder.path("a").unlink()
    assert encode(producer, "a", "again").encoded == [identifier_of("a")]
    assert encoder.path("a").exists()


def test_what_is_in_memory_is_published_again_if_the_store_has_lost_it(producer: Engine, encoder: Encoder) -> None:
    encode(producer, "a")
    encoder.path("a").unlink()
    assert encode(producer, "a", "again").encoded == []
    assert encoder.path("a").exists()


def test_evictions_are_counted(folder: Path) -> None:
    room = 4096 + embedding_of("a").nbytes
    producer = Engine(folder, ECTransferRole.PRODUCER, max_bytes=room + 100)
    producer.embeddings = {identifier_of(name): embedding_of(name) for name in "ab"}
    encode(producer, "a")
    encode(producer, "b")
    assert producer.counts()["evictions"] == 1


def test_an_instance_that_encodes_and_reads_loads_what_it_does_not_have(folder: Path, encoder: Encoder) -> None:
    both = Engine(folder, ECTransferRole.BOTH)
    both.embeddings = {identifier_of("b"): embedding_of("b")}
    encoder.publish("a")
    step = both.step(request(("a", 2), ("b", 8), pixels=True))
    assert step.encoded == [identifier_of("b")]
    assert torch.equal(both.encoder_cache[identifier_of("a")], embedding_of("a"))
    assert encoder.path("b").exists()
