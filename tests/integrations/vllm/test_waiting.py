"""A request waits for its embeddings, runs once they are there, and fails alone if they don't come."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from chiasm.ec_transfer import ECTransferRole
from chiasm.integrations.vllm.outputs import WAITS
from chiasm.integrations.vllm.scheduler import Reach

from .conftest import Encoder
from .engine import LAYOUT, ROWS, WAIT_SECONDS, WINDOW, Engine, embedding_of, identifier_of, request


def loaded(pd: Engine, name: str) -> torch.Tensor:
    return pd.encoder_cache[identifier_of(name)]


def test_an_item_is_loaded_once_it_has_arrived(encoder: Encoder, pd: Engine) -> None:
    one = request(("a", 2))
    assert pd.step(one).tokens == {}
    encoder.publish("a")
    assert pd.step(one).tokens == {"request": 8}
    assert torch.equal(loaded(pd, "a"), embedding_of("a"))


def test_waiting_is_counted_once_and_timed(encoder: Encoder, pd: Engine) -> None:
    one = request(("a", 2))
    pd.step(one)
    pd.step(one)
    pd.clock.now = 1.5
    encoder.publish("a")
    pd.step(one)
    counts = pd.counts()
    assert (counts["waits"], counts["wait_seconds"], counts["hits"], counts["loads"]) == (1, 1.5, 1, 1)
    assert counts["loaded_bytes"] == embedding_of("a").nbytes
    assert pd.counts() == {}


def test_what_a_request_waited_for_is_told_once_with_its_outputs_and_at_its_end(encoder: Encoder, pd: Engine) -> None:
    pd.scheduler.waits.are_wanted = True
    one, other = request(("a", 2), ("b", 8), of="one"), request(of="other", tokens=4)
    outputs = [SimpleNamespace(request_id=name, ec_transfer_params=None) for name in ("other", "one", "one")]

    def step(now: float) -> None:
        pd.clock.now = now
        pd.step(one, other)
        pd.scheduler.waits.tell([SimpleNamespace(outputs=outputs[:2])])

    step(1.0)
    step(1.5)
    encoder.publish("a")
    step(2.0)  # what is missing now is the other item
    encoder.publish("b")
    step(4.0)
    waits = [(1.0, 2.0, 0), (2.0, 4.0, 1)]
    assert outputs[0].ec_transfer_params is None
    assert outputs[1].ec_transfer_params == {WAITS: waits}
    pd.scheduler.waits.tell([SimpleNamespace(outputs=outputs[2:])])
    assert outputs[2].ec_transfer_params is None
    assert pd.scheduler.request_finished(one) == waits
    assert pd.scheduler.request_finished(other) == []


def test_waits_that_nobody_wants_to_know_are_not_kept(encoder: Encoder, pd: Engine) -> None:
    one = request(("a", 2))
    pd.step(one)
    encoder.publish("a")
    pd.step(one)
    assert pd.scheduler.request_finished(one) == []


def test_an_item_that_does_not_arrive_fails_its_request_alone(encoder: Encoder, pd: Engine) -> None:
    encoder.publish("b")
    lost, good = request(("a", 2), of="lost"), request(("b", 2), of="good")
    pd.step(lost, good)
    pd.clock.now = WAIT_SECONDS + 0.1
    assert pd.update(lost, good) == {"lost"}
    assert pd.update(good) == set()
    assert pd.counts()["failed_requests"] == 1


def test_an_item_that_has_arrived_fails_no_request_at_which_vllm_does_not_look(encoder: Encoder, pd: Engine) -> None:
    """As while others have all the places among the requests that run."""
    one = request(("a", 2))
    pd.step(one)
    encoder.publish("a")
    pd.wait_for_arrivals(one)
    pd.clock.now = WAIT_SECONDS + 0.1
    assert pd.update(one) == set()
    assert pd.step(one).tokens == {"request": 8}


def test_the_next_request_with_the_same_item_waits_anew(encoder: Encoder, pd: Engine) -> None:
    first = request(("a", 2), of="first")
    pd.step(first)
    pd.clock.now = WAIT_SECONDS + 0.1
    pd.update(first)
    second = request(("a", 2), of="second")
    pd.step(second)
    assert pd.update(second) == set()
    encoder.publish("a")
    assert pd.step(second).tokens == {"second": 8}


def test_a_request_whose_client_leaves_is_forgotten(pd: Engine) -> None:
    one = request(("a", 2))
    pd.step(one)
    pd.finish(one)
    pd.clock.now = WAIT_SECONDS + 0.1
    assert pd.update() == set()


@pytest.mark.parametrize("name", ["../escaped", "a/b", "nul\0", "x" * 10_000, "", "A" * 64])
def test_a_name_that_is_not_an_identifier_fails_its_request(pd: Engine, folder: Path, name: str) -> None:
    before = sorted(folder.parent.rglob("*"))
    bad = request(("a", 2))
    bad.mm_features = [type(bad.mm_features[0])(name, bad.mm_features[0].mm_position, bad.mm_features[0].data)]
    step = pd.schedule(bad)
    assert step.tokens == {}
    assert pd.update(bad, report=pd.run(step)) == {"request"}
    assert sorted(folder.parent.rglob("*")) == before


def test_a_foreign_entry_counts_as_missing(folder: Path, encoder: Encoder, pd: Engine) -> None:
    Encoder(folder, "bb").publish("a")
    one = request(("a", 2))
    assert pd.step(one).tokens == {}
    encoder.publish("a")
    assert pd.step(one).tokens == {"request": 8}


@pytest.mark.parametrize("size_bytes", [0, 100, 4096, 4100])
def test_a_torn_entry_counts_as_missing(encoder: Encoder, pd: Engine, size_bytes: int) -> None:
    os.truncate(encoder.publish("a"), size_bytes)
    one = request(("a", 2))
    assert pd.step(one).tokens == {}
    while "corrupt_entries" not in (counts := pd.counts()):  # the connector's own thread looks at it
        time.sleep(0.001)
    assert counts["corrupt_entries"] == 1
    encoder.publish("a")
    assert pd.step(one).tokens == {"request": 8}


def test_damaged_bytes_are_found_before_the_entry_is_promised(encoder: Encoder, pd: Engine) -> None:
    path = encoder.publish("a")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    one = request(("a", 2))
    pd.step(one)
    while path.exists():  # the connector's own thread reads it
        time.sleep(0.001)
    assert pd.step(one).tokens == {}
    encoder.publish("a")
    pd.step(one)
    assert torch.equal(loaded(pd, "a"), embedding_of("a"))


def test_ten_requests_with_one_item_load_it_once(encoder: Encoder, pd: Engine) -> None:
    encoder.publish("a")
    pd.step(*(request(("a", 2), of=str(index)) for index in range(10)))
    assert pd.counts()["loads"] == 1


def test_an_item_that_occurs_twice_is_loaded_once(encoder: Encoder, pd: Engine) -> None:
    encoder.publish("a")
    assert pd.step(request(("a", 2), ("a", 10))).tokens == {"request": 16}
    assert pd.counts()["loads"] == 1


def test_an_item_in_memory_needs_no_entry(encoder: Encoder, pd: Engine) -> None:
    path = encoder.publish("a")
    pd.step(request(("a", 2), of="first"))
    path.unlink()
    assert pd.step(request(("a", 2), of="second")).tokens == {"second": 8}


def test_a_request_past_its_items_does_not_look_for_them(encoder: Encoder, pd: Engine, folder: Path) -> None:
    encoder.publish("a")
    one = request(("a", 2), tokens=8)
    pd.step(one)
    one.num_tokens = 9
    pd.memory.users.clear()
    for path in folder.iterdir():
        path.unlink()
    assert pd.step(one).tokens == {"request": 1}


# ---- while nothing runs ------------------------------------------------------------------------------------------------


def test_an_entry_that_arrives_ends_the_sleep(encoder: Encoder, pd: Engine) -> None:
    woken = threading.Event()
    pd.scheduler.on_arrival = woken.set
    pd.scheduler.begin_step()
    pd.step(request(("a", 2), of="first"), request(("b", 2), of="second"))
    assert pd.scheduler.num_waiting == 2
    assert pd.scheduler.seconds_to_news() == WAIT_SECONDS
    encoder.publish("b")
    assert woken.wait(60)
    assert pd.scheduler.seconds_to_news() == 0
    pd.scheduler.begin_step()
    assert pd.scheduler.seconds_to_news() == WAIT_SECONDS


def test_a_deadline_that_passes_ends_the_sleep(pd: Engine) -> None:
    pd.step(request(("a", 2)))
    pd.clock.now = WAIT_SECONDS - 3
    assert pd.scheduler.seconds_to_news() == pytest.approx(3)
    pd.clock.now = WAIT_SECONDS + 0.1
    assert pd.scheduler.seconds_to_news() == 0
    pd.update()
    assert pd.scheduler.num_waiting == 0


# ---- how far prefill goes ----------------------------------------------------------------------------------------------


def test_an_item_beyond_the_step_need_not_be_there(encoder: Encoder, pd: Engine) -> None:
    encoder.publish("a")
    one = request(("a", 2), ("b", WINDOW + 2))
    assert pd.step(one).tokens == {"request": WINDOW}
    assert pd.step(one).tokens == {}
    encoder.publish("b")
    assert pd.step(one).tokens == {"request": 8}


def test_prefill_runs_up_to_the_first_item_that_is_missing(folder: Path, encoder: Encoder) -> None:
    pd = Engine(folder, ECTransferRole.CONSUMER, Reach(WINDOW, max_ahead=1, min_tokens=6))
    encoder.publish("a")
    one = request(("a", 2), ("b", 8), ("c", 14))
    assert pd.step(one).tokens == {"request": 8}
    assert pd.step(one).tokens == {}
    encoder.publish("b")
    assert pd.step(one).tokens == {"request": 6}
    encoder.publish("c")
    assert pd.step(one).tokens == {"request": 6}
    assert all(torch.equal(loaded(pd, name), embedding_of(name)) for name in "abc")


def test_a_request_does_not_begin_for_few_tokens(folder: Path) -> None:
    pd = Engine(folder, ECTransferRole.CONSUMER, Reach(WINDOW, max_ahead=1, min_tokens=6))
    assert pd.step(request(("a", 5))).tokens == {}
    assert pd.step(request(("a", 6), of="other")).tokens == {"other": 6}


def test_only_so_many_requests_run_ahead(folder: Path, encoder: Encoder) -> None:
    pd = Engine(folder, ECTransferRole.CONSUMER, Reach(WINDOW, max_ahead=1, min_tokens=6))
    first, second = request(("a", 6), of="first"), request(("b", 6), of="second")
    assert pd.step(first, second).tokens == {"first": 6}
    pd.finish(first)
    assert pd.step(second).tokens == {"second": 6}


def test_a_request_that_has_run_ahead_fails_in_time(folder: Path) -> None:
    pd = Engine(folder, ECTransferRole.CONSUMER, Reach(WINDOW, max_ahead=1, min_tokens=6))
    one = request(("a", 6))
    pd.step(one)
    pd.step(one)
    pd.clock.now = WAIT_SECONDS + 0.1
    assert pd.update(one) == {"request"}


def test_an_item_that_leaves_memory_in_the_same_step_stops_prefill(folder: Path, encoder: Encoder) -> None:
    pd = Engine(folder, ECTransferRole.CONSUMER)
    path = encoder.publish("a")
    pd.step(request(("a", 2), of="first"))
    path.unlink()
    one = request(("a", 2))
    assert pd.scheduler.ensure_cache_available(one, 0)
    pd.memory.users.clear()
    assert not pd.scheduler.can_get("request", 0)


# What is lost.


def test_what_requests_wait_for_and_the_store_lacks_is_awaited(encoder: Encoder, pd: Engine) -> None:
    encoder.publish("b")
    waiting, other = request(("a", 2), ("b", 8), of="waiting"), request(("a", 2), of="other")
    pd.step(waiting, other)
    assert pd.awaited() == [identifier_of("a")]
    encoder.publish("a")
    assert pd.awaited() == []
    pd.step(waiting, other)
    encoder.path("a").unlink()
    assert pd.awaited() == []  # it is in memory


def test_a_question_waits_until_a_published_embedding_is_lost(encoder: Encoder, pd: Engine) -> None:
    names = [identifier_of("a"), identifier_of("b")]
    path = encoder.publish("a")
    told = pd.scheduler.lost("proxy", names)
    first = request(("a", 2), of="first")
    assert pd.step(first).tokens.keys() == {"first"}
    pd.finish(first)
    path.unlink()
    assert not told.done()  # nobody needs it any more
    pd.step(request(("b", 2), of="second"))
    assert told.result(60) == names[1:]
    assert pd.scheduler.lost("proxy", names).result(60) == names[1:]  # which it is still


def test_a_question_waits_for_an_item_before_which_prefill_stops(encoder: Encoder, folder: Path) -> None:
    pd = Engine(folder, ECTransferRole.CONSUMER, Reach(WINDOW, max_ahead=1, min_tokens=4))
    told = pd.scheduler.lost("proxy", [identifier_of("a")])
    one = request(("a", 10))
    pd.step(one)
    pd.step(one)
    assert told.result(60) == [identifier_of("a")]


def test_an_item_before_which_prefill_has_stopped_is_awaited(encoder: Encoder, folder: Path) -> None:
    pd = Engine(folder, ECTransferRole.CONSUMER, Reach(WINDOW, max_ahead=1, min_tokens=4))
    one = request(("a", 10))
    assert pd.step(one).tokens == {"request": 10}
    pd.step(one)
    assert pd.awaited() == [identifier_of("a")]
    encoder.publish("a")
    pd.step(one)
    assert pd.awaited() == []


@pytest.mark.parametrize("shape", [(ROWS + 1, LAYOUT.width), (ROWS, LAYOUT.width + 1)])
def test_an_entry_that_does_not_fit_is_removed_and_awaited_and_fails_its_request_if_it_comes_again(
    encoder: Encoder, pd: Engine, shape: tuple[int, int]
) -> None:
    one = request(("a", 2))
    encoder.publish("a", embedding_of("a", *shape))
    assert pd.step(one).tokens == {}
    assert not encoder.path("a").exists()
    assert pd.awaited() == [identifier_of("a")]
    encoder.publish("a", embedding_of("a", *shape))
    step = pd.schedule(one)
    assert pd.update(one, report=pd.run(step)) == {"request"}
    encoder.path("a").unlink()
    second = request(("a", 2), of="second")
    pd.step(second)
    encoder.publish("a")
    assert pd.step(second).tokens == {"second": 8}


def test_a_prompt_that_is_computed_again_awaits_an_embedding_that_is_gone(encoder: Encoder, pd: Engine) -> None:
    path = encoder.publish("a")
    one = request(("a", 2), tokens=100)
    pd.step(one)
    path.unlink()
    assert pd.memory.forget(identifier_of("a"))
    one.num_computed_tokens = 0  # preempted
    assert pd.step(one).tokens == {}
    assert pd.awaited() == [identifier_of("a")]
    encoder.publish("a")
    assert pd.step(one).tokens.keys() == {"request"}
    assert pd.awaited() == []
