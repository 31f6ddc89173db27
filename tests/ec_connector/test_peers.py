"""What every connector from memory to memory promises."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from chiasm.ec_transfer import holder, reader, sources
from chiasm.ec_transfer.peers import PeerConnector
from chiasm.errors import StorageError
from chiasm.launch.ports import HeldPort
from tests.launch.waiting import eventually

from .instance import embedding_of, identifier_of
from .peers import CONNECTORS, PATIENCE_SECONDS, Encoder, LanguageModel, Peer, memory_open

BIG = 1 << 20
"""Bytes of a large embedding."""


@pytest.fixture(params=CONNECTORS)
def connector(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["together", "apart"])
def separate_processes(request: pytest.FixtureRequest) -> bool:
    """Whether the halves of each peer know nothing of each other but metadata."""
    return bool(request.param)


@pytest.fixture
def make(connector: str, separate_processes: bool) -> Iterator[Callable[..., Any]]:
    """Makes peers that are closed at the end."""
    made: list[Peer] = []

    def make_one(kind: type[Peer], **changes: Any) -> Peer:
        made.append(kind(connector, separate_processes=separate_processes, **changes))
        return made[-1]

    yield make_one
    for peer in made:
        peer.close()


@pytest.fixture
def encoder(make: Callable[..., Any]) -> Encoder:
    encoder = make(Encoder)
    assert isinstance(encoder, Encoder)
    return encoder


@pytest.fixture
def model(make: Callable[..., Any]) -> LanguageModel:
    model = make(LanguageModel)
    assert isinstance(model, LanguageModel)
    return model


@pytest.fixture
def address() -> Iterator[HeldPort]:
    """Nobody else takes it between two encoders that listen there."""
    held = HeldPort("127.0.0.1")
    yield held
    held.release()


def big(name: object, megabytes: int = 1) -> torch.Tensor:
    return embedding_of(name, rows=megabytes * BIG // 128, columns=64)


def test_an_embedding_that_is_published_arrives(encoder: Encoder, model: LanguageModel) -> None:
    name = encoder.encode("cat")
    model.scheduler.expect({name: encoder.place})
    request = model.admit("r", "cat")
    model.load(request)
    assert torch.equal(model.memory[name], embedding_of("cat"))


def test_an_encoder_counts_what_nobody_has_fetched_yet(
    encoder: Encoder, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = encoder.holding.free_bytes()
    names = [encoder.encode(name) for name in ("cat", "dog")]
    assert encoder.holding.num_unfetched() == 2
    assert room is not None
    assert encoder.holding.free_bytes() < room  # type: ignore[operator]
    model.scheduler.expect(dict.fromkeys(names, encoder.place))
    request = model.admit("r", "cat")
    model.load(request)
    model.finish(request)
    assert eventually(lambda: encoder.holding.num_unfetched() == 1)
    assert encoder.scheduler.is_published(names[0])  # somebody will come for it again
    assert encoder.holding.num_unfetched() == 2
    monkeypatch.setattr(holder, "FETCH_SECONDS", -1.0)
    assert all(encoder.scheduler.is_published(name) for name in names)
    assert encoder.holding.num_unfetched() == 0


def test_an_encoder_forgets_what_nobody_has_come_for(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder, "FETCH_SECONDS", -1.0)
    for number in range(4):
        encoder.encode(number)
    assert isinstance(encoder.holding, PeerConnector)
    assert encoder.holding._holder is not None
    assert len(encoder.holding._holder._unfetched) == 1  # the last


def test_an_embedding_may_be_wanted_before_it_is_made(encoder: Encoder, model: LanguageModel) -> None:
    request = model.admit("r", "cat")
    model.scheduler.expect({identifier_of("cat"): encoder.place})
    assert not model.scheduler.is_coming(identifier_of("cat"))
    name = encoder.encode("cat")
    model.load(request)
    assert torch.equal(model.memory[name], embedding_of("cat"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (0, 64)])
def test_shape_and_dtype_are_kept(
    encoder: Encoder, model: LanguageModel, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    embedding = embedding_of("cat", *shape, dtype=dtype)
    name = encoder.encode("cat", embedding)
    model.scheduler.expect({name: encoder.place})
    model.load(model.admit("r", "cat"))
    assert model.memory[name].dtype == dtype
    assert torch.equal(model.memory[name], embedding)


def test_several_requests_share_what_they_want(encoder: Encoder, model: LanguageModel) -> None:
    name = encoder.encode("cat")
    first, second = model.admit("1", "cat"), model.admit("2", "cat")
    model.scheduler.expect({name: encoder.place})
    model.load(first)
    model.finish(first)
    model.load(second)
    assert torch.equal(model.memory[name], embedding_of("cat"))


def test_a_place_that_comes_twice_changes_nothing(encoder: Encoder, model: LanguageModel) -> None:
    name = encoder.encode("cat")
    request = model.admit("r", "cat")
    for _ in range(3):
        model.scheduler.expect({name: encoder.place})
    model.load(request)
    model.scheduler.expect({name: encoder.place})
    assert torch.equal(model.memory[name], embedding_of("cat"))
    assert model.worker.stats.loads == 1


def test_what_the_engine_has_given_up_comes_again(encoder: Encoder, model: LanguageModel) -> None:
    name = encoder.encode("cat")
    model.scheduler.expect({name: encoder.place})
    request = model.admit("r", "cat")
    model.load(request)
    del model.memory[name]
    gc.collect()
    model.load(request)
    assert torch.equal(model.memory[name], embedding_of("cat"))


def test_what_was_computed_already_comes_when_it_is_asked_for_after_all(encoder: Encoder, model: LanguageModel) -> None:
    name = encoder.encode("cat")
    model.scheduler.expect({name: encoder.place})
    request = model.admit("r", "cat", num_computed_tokens=4)
    model.load(request)
    assert torch.equal(model.memory[name], embedding_of("cat"))


def test_a_tensor_in_use_doesnt_change_when_its_entry_is_evicted(make: Callable[..., Any]) -> None:
    encoder, model = make(Encoder, max_bytes=8 * BIG), make(LanguageModel)
    name = encoder.encode("cat", big("cat"))
    model.scheduler.expect({name: encoder.place})
    request = model.admit("r", "cat", rows=BIG)
    model.load(request)
    for number in range(20):
        encoder.encode(number, big(number))
    assert not encoder.scheduler.has_cache_item(identifier_of(0))
    assert torch.equal(model.memory[name], big("cat"))


def test_a_tensor_in_use_outlives_its_encoder(make: Callable[..., Any], model: LanguageModel) -> None:
    encoder = make(Encoder)
    name = encoder.encode("cat", big("cat"))
    model.scheduler.expect({name: encoder.place})
    model.load(model.admit("r", "cat", rows=BIG))
    encoder.close()
    assert torch.equal(model.memory[name], big("cat"))


def test_an_encoder_that_is_closed_closes_its_memory_file(encoder: Encoder) -> None:
    file = encoder.memory_file
    os.fstat(file.descriptor)  # it is open
    encoder.close()
    assert file.descriptor == -1


def test_what_an_encoder_has_evicted_is_lost_and_comes_from_elsewhere(make: Callable[..., Any]) -> None:
    small, other, model = make(Encoder, max_bytes=3 * BIG), make(Encoder), make(LanguageModel)
    name = small.encode("cat", big("cat"))
    for number in range(3):
        small.encode(number, big(number))
    model.scheduler.expect({name: small.place})
    request = model.admit("r", "cat", rows=BIG)
    model.step(request)
    assert not model.scheduler.is_coming(name)
    other.encode("cat", big("cat"))
    model.scheduler.expect({name: other.place})
    model.load(request)
    assert torch.equal(model.memory[name], big("cat"))


def test_an_encoder_that_ends_is_noticed(encoder: Encoder, make: Callable[..., Any]) -> None:
    model = make(LanguageModel, receive_bytes=BIG)
    names = [encoder.encode(number, big(number)[: BIG // 256]) for number in range(4)]  # two have room at the same time
    model.scheduler.expect(dict.fromkeys(names, encoder.place))
    request = model.admit("r", *range(4), rows=BIG)
    model.until(lambda: all(model.scheduler.is_coming(name) for name in names[:2]))
    encoder.close()
    model.lose(request)


def test_a_place_where_nobody_is_loses_what_should_come_from_there(encoder: Encoder, model: LanguageModel) -> None:
    place = encoder.place
    encoder.close()
    request = model.admit("r", "cat")
    model.scheduler.expect({identifier_of("cat"): place})
    model.lose(request)


def test_what_is_expected_from_an_encoder_outlasts_an_idle_connection_to_it(
    make: Callable[..., Any], model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_IDLE_HOLDERS", 1)
    first, second = make(Encoder), make(Encoder)
    assert isinstance(model.scheduler, PeerConnector)
    assert model.scheduler._reader is not None
    holders = model.scheduler._reader._holders
    for name, encoder in (("cat", first), ("bird", second)):
        model.scheduler.expect({encoder.encode(name): encoder.place, first.encode("dog"): first.place})
        request = model.admit(name, name)
        model.load(request)
        model.finish(request)
        assert eventually(lambda: not any(one.num_reads for one in list(holders.values())))
    assert list(holders) == [second.place]
    model.load(model.admit("r", "dog"))
    assert torch.equal(model.memory[identifier_of("dog")], embedding_of("dog"))


def test_an_encoder_of_another_start_is_not_believed(encoder: Encoder, model: LanguageModel) -> None:
    import msgspec

    name = encoder.encode("cat")
    request = model.admit("r", "cat")
    model.scheduler.expect({name: msgspec.structs.replace(encoder.place, engine_id="earlier")})
    model.lose(request)
    model.scheduler.expect({name: encoder.place})
    model.load(request)


def test_an_encoder_of_another_model_is_not_believed(make: Callable[..., Any], model: LanguageModel) -> None:
    encoder = make(Encoder, fingerprint="0ther")
    name = encoder.encode("cat")
    request = model.admit("r", "cat")
    model.scheduler.expect({name: encoder.place})
    model.lose(request)


def test_an_encoder_that_was_restarted_with_another_model_at_the_same_address_is_not_believed(
    make: Callable[..., Any], model: LanguageModel, address: HeldPort, caplog: pytest.LogCaptureFixture
) -> None:
    first = make(Encoder, port=address.port)
    earlier = first.place
    model.scheduler.expect({first.encode("dog"): earlier})
    model.load(model.admit("before", "dog"))
    first.close()
    second = make(Encoder, port=earlier.port, fingerprint="0ther")
    name = second.encode("cat")
    request = model.admit("r", "cat")
    for place in (earlier, second.place):
        caplog.clear()
        model.scheduler.expect({name: place})
        assert eventually(lambda: "Gave up encoder" in caplog.text, PATIENCE_SECONDS)
    assert not model.scheduler.is_coming(name)
    third = make(Encoder)
    model.scheduler.expect({third.encode("cat"): third.place})
    model.load(request)
    assert torch.equal(model.memory[name], embedding_of("cat"))


def test_more_than_fits_comes_in_turn(encoder: Encoder, make: Callable[..., Any]) -> None:
    model = make(LanguageModel, receive_bytes=BIG + BIG // 2)
    names = [encoder.encode(number, big(number)) for number in range(6)]
    model.scheduler.expect(dict.fromkeys(names, encoder.place))
    requests = [model.admit(str(number), number, number + 1, number + 2, rows=BIG) for number in (0, 3)]
    model.load(*requests)
    for number, name in enumerate(names):
        assert torch.equal(model.memory[name], big(number))


def test_what_nobody_takes_makes_room_for_what_is_needed_first(encoder: Encoder, make: Callable[..., Any]) -> None:
    model = make(LanguageModel, receive_bytes=BIG + BIG // 2)
    names = [encoder.encode(number, big(number)) for number in range(2)]
    model.scheduler.expect(dict.fromkeys(names, encoder.place))
    first, second = model.admit("1", 0, rows=BIG), model.admit("2", 1, rows=BIG)
    model.until(
        lambda: model.scheduler.layout_of(names[0]) is not None
    )  # has_cache_item would say that it is needed first
    model.load(second)
    assert torch.equal(model.memory[names[1]], big(1))
    model.load(first)


def test_the_largest_embedding_finds_room_between_those_in_use(make: Callable[..., Any]) -> None:
    encoder, model = make(Encoder, max_bytes=16 * BIG), make(LanguageModel)
    room = 4 * BIG
    header = 4096
    sizes = {"large": room - 3 * header, "small": header, "largest": room}
    requests = {}
    for name, num_bytes in sizes.items():
        model.scheduler.expect({encoder.encode(name, embedding_of(name, num_bytes // 128)): encoder.place})
        requests[name] = model.admit(name, name, rows=room)
        model.load(requests[name])
        if name == "small":  # which lies in the middle
            model.finish(requests["large"])
            gc.collect()
    assert torch.equal(model.memory[identifier_of("largest")], embedding_of("largest", room // 128))


def test_an_encoder_finds_room_however_many_language_models_use_what_it_has(make: Callable[..., Any]) -> None:
    encoder = make(Encoder)  # with room for sixteen of these
    for number in range(16):
        embedding = embedding_of(number, BIG // 2 // 128 - 32)
        model = make(LanguageModel)
        model.scheduler.expect({encoder.encode(number, embedding): encoder.place})
        model.load(model.admit("r", number, rows=BIG))
    assert eventually(lambda: encoder.holding.num_unfetched() == 0)
    encoder.encode("cat", embedding_of("cat", BIG // 128 - 32))  # an eighth of its memory


@pytest.mark.parametrize("in_use", [0, 5])
def test_a_large_embedding_costs_few_small_ones_whatever_the_order_of_their_use(
    make: Callable[..., Any], in_use: int
) -> None:
    encoder, model = make(Encoder), make(LanguageModel)
    small = torch.zeros(12 << 10, dtype=torch.uint8).view(-1, 128)  # 16 KiB with its header
    names = list(range((8 << 20) // (16 << 10)))
    for name in names:
        encoder.encode(name, small)
    for name in random.Random(0).sample(names, in_use):
        model.scheduler.expect({identifier_of(name): encoder.place})
        model.load(model.admit(str(name), name, rows=BIG))
    assert eventually(lambda: not encoder.holding._holder._table.claimed())
    for name in random.Random(1).sample(names, len(names)):
        encoder.scheduler.is_published(identifier_of(name))  # which counts as use
    large = torch.zeros((512 << 10) - 4096, dtype=torch.uint8).view(-1, 128)  # as much as 32 of them
    encoder.encode("large", large)
    assert encoder.holding.stats.evictions <= 2 * 32


def test_many_small_embeddings_in_use_take_few_descriptors(
    encoder: Encoder, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_LENT_ENTRIES", 3)
    counts = []
    for number in range(8):
        model.scheduler.expect({encoder.encode(number): encoder.place})
        model.load(model.admit(str(number), number))
        counts.append(memory_open(os.getpid()))
    gc.collect()
    assert eventually(lambda: memory_open(os.getpid()) <= counts[0] + 2)
    assert all(torch.equal(model.memory[identifier_of(number)], embedding_of(number)) for number in range(8))


def test_an_embedding_that_can_never_fit_is_refused(encoder: Encoder, make: Callable[..., Any]) -> None:
    model = make(LanguageModel, receive_bytes=BIG)
    assert model.scheduler.max_received_bytes == BIG
    name = encoder.encode("cat", big("cat", 2))
    model.scheduler.expect({name: encoder.place})
    request = model.admit("r", "cat", rows=2 * BIG)
    model.lose(request)


def test_an_encoder_refuses_what_it_can_never_hold(encoder: Encoder) -> None:
    assert encoder.holding.max_entry_bytes < 9 * BIG
    with pytest.raises(StorageError, match="--ec-max-bytes"):
        encoder.encode("cat", big("cat", 9))


def test_what_no_request_wants_any_more_is_let_go(encoder: Encoder, model: LanguageModel) -> None:
    name = encoder.encode("cat")
    model.scheduler.expect({name: encoder.place})
    request = model.admit("r", "cat")
    model.until(lambda: model.scheduler.has_cache_item(name))
    model.finish(request)
    assert not model.scheduler.has_cache_item(name)


def test_what_has_the_wrong_shape_is_offered_no_more(
    encoder: Encoder, model: LanguageModel, separate_processes: bool
) -> None:
    name = encoder.encode("cat")
    model.scheduler.expect({name: encoder.place})
    request = model.admit("r", "cat")
    model.load(request)
    del model.memory[name]
    (model.scheduler if separate_processes else model.worker).discard(name, "it has the wrong shape")
    model.lose(request)
    while encoder.scheduler.has_cache_item(name):
        time.sleep(0.001)
    encoder.encode("cat")
    model.scheduler.expect({name: encoder.place})
    model.load(request)


def test_a_language_model_that_was_restarted_wants_again(encoder: Encoder, make: Callable[..., Any]) -> None:
    name = encoder.encode("cat")
    for _ in range(2):
        model = make(LanguageModel)
        model.scheduler.expect({name: encoder.place})
        model.load(model.admit("r", "cat"))
        model.close()
