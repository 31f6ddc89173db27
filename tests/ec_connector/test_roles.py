"""Which items a connector loads and saves, in which step, and in which role."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from chiasm.ec_transfer import ECConnectorMetadata

from .instance import Instance, Item, Request, config_for, embedding_of, entry_path, identifier_of


def request_for(*names: str) -> Request:
    return Request(tuple(Item(identifier_of(name), offset=10 * i) for i, name in enumerate(names)))


@pytest.mark.parametrize(
    ("saved", "asked", "available"),
    [("", "", True), ("ab", "ab", True), ("", "ab", False), ("a", "ab", False), ("b", "ab", False)],
)
def test_items_are_found_if_all_some_or_none_of_them_exist(
    encoder: Instance, pd: Instance, saved: str, asked: str, available: bool
) -> None:
    for name in saved:
        encoder.encode(name)
    assert [pd.scheduler.has_cache_item(identifier_of(name)) for name in asked] == [name in saved for name in asked]
    assert pd.scheduler.ensure_cache_available(request_for(*asked), 0) is available


def test_an_item_whose_tokens_are_computed_need_not_exist(encoder: Instance, pd: Instance) -> None:
    encoder.encode("b")
    request = request_for("a", "b")  # a covers prompt tokens 0 to 3, b 10 to 13
    assert not pd.scheduler.ensure_cache_available(request, 3)
    assert pd.scheduler.ensure_cache_available(request, 4)


def test_metadata_holds_the_items_of_one_step_in_order(encoder: Instance, pd: Instance) -> None:
    for name in "abc":
        encoder.encode(name)
    assert pd.step(request_for("b", "a")).loads == (identifier_of("b"), identifier_of("a"))
    assert pd.step(request_for("c")).loads == (identifier_of("c"),)
    assert pd.step().loads == ()


def test_an_item_that_does_not_exist_is_not_noted(pd: Instance) -> None:
    request = request_for("a")
    pd.scheduler.update_state_after_alloc(request, 0)
    assert pd.scheduler.build_connector_meta().loads == ()


def test_a_request_without_items_gives_empty_metadata(pd: Instance) -> None:
    request = Request()
    assert pd.scheduler.ensure_cache_available(request, 0)
    assert pd.step(request).loads == ()
    assert pd.encoder_cache == {}


def test_an_item_that_occurs_twice_is_loaded_once(encoder: Instance, pd: Instance) -> None:
    encoder.encode("a")
    request = request_for("a", "a")
    assert pd.step(request, request).loads == (identifier_of("a"),)
    assert [item.offset for item in request.items] == [0, 10]
    assert pd.worker.stats.loads == 1
    rows = torch.cat([pd.encoder_cache[item.identifier] for item in request.items])
    assert torch.equal(rows, torch.cat([embedding_of("a")] * 2))


def test_an_entry_that_exists_is_not_saved_again(encoder: Instance, pd: Instance) -> None:
    encoder.encode("a")
    again = Instance(encoder.worker.config)
    again.encode("a")
    assert again.worker.stats.saves == 0
    pd.step(request_for("a"))
    assert (pd.worker.stats.loads, pd.worker.stats.saves) == (1, 0)


def test_an_item_in_memory_is_not_loaded_again(encoder: Instance, pd: Instance) -> None:
    identifier = encoder.encode("a")
    in_memory = embedding_of("a")
    pd.encoder_cache[identifier] = in_memory
    pd.execute(ECConnectorMetadata((identifier,)))
    assert pd.encoder_cache[identifier] is in_memory
    assert pd.worker.stats.loads == 0


def test_each_step_of_a_request_loads_only_new_items(encoder: Instance, pd: Instance) -> None:
    encoder.encode("a")
    assert pd.step(request_for("a", "b")).loads == (identifier_of("a"),)
    assert pd.step(request_for("a", "b")).loads == ()
    encoder.encode("b")
    assert pd.step(request_for("a", "b")).loads == (identifier_of("b"),)
    assert pd.step(request_for("a", "b", "a")).loads == ()
    assert pd.worker.stats.loads == 2


def test_an_item_that_was_dropped_from_memory_is_loaded_again(encoder: Instance, pd: Instance) -> None:
    identifier = encoder.encode("a")
    assert pd.load(identifier) is not None
    assert pd.load(identifier) is not None
    assert pd.worker.stats.loads == 2


def test_kv_transfer_params_are_left_alone(encoder: Instance, pd: Instance) -> None:
    encoder.encode("a")
    parameters: dict[str, object] = {"do_remote_prefill": True, "remote_block_ids": [1, 2]}
    request = Request(request_for("a").items, kv_transfer_params=dict(parameters))
    pd.step(request)
    assert request.kv_transfer_params == parameters


def test_a_consumer_never_saves(pd: Instance) -> None:
    identifier = pd.encode("a")
    assert not pd.scheduler.has_cache_item(identifier)
    assert pd.worker.stats.saves == 0


def test_a_producer_never_loads(encoder: Instance) -> None:
    identifier = encoder.encode("a")
    encoder.encoder_cache.clear()
    assert encoder.step(request_for("a")).loads == ()
    encoder.execute(ECConnectorMetadata((identifier,)))
    assert encoder.encoder_cache == {}


def test_an_instance_with_both_roles_finds_its_own_entries(folder: Path) -> None:
    both = Instance(config_for(folder))
    loaded = both.load(both.encode("a"))
    assert loaded is not None
    assert torch.equal(loaded, embedding_of("a"))


def test_a_noted_entry_is_loaded_even_if_it_is_evicted_before(encoder: Instance, pd: Instance, folder: Path) -> None:
    identifier = encoder.encode("a")
    metadata = pd.schedule(request_for("a"))
    entry_path(folder, identifier).unlink()
    pd.execute(metadata)
    assert torch.equal(pd.encoder_cache[identifier], embedding_of("a"))


def test_a_found_entry_can_be_noted_even_if_it_is_evicted_before(encoder: Instance, pd: Instance, folder: Path) -> None:
    identifier = encoder.encode("a")
    assert pd.scheduler.has_cache_item(identifier)
    entry_path(folder, identifier).unlink()
    pd.step(request_for("a"))
    assert torch.equal(pd.encoder_cache[identifier], embedding_of("a"))


def test_a_found_entry_that_is_not_noted_is_released_with_the_step(
    encoder: Instance, pd: Instance, folder: Path
) -> None:
    identifier = encoder.encode("a")
    assert pd.scheduler.has_cache_item(identifier)
    pd.scheduler.build_connector_meta()
    entry_path(folder, identifier).unlink()
    assert not pd.scheduler.has_cache_item(identifier)


def test_pickled_metadata_carries_only_names(encoder: Instance, pd: Instance, folder: Path) -> None:
    gone, there = encoder.encode("a"), encoder.encode("b")
    metadata = pickle.loads(pickle.dumps(pd.schedule(request_for("a", "b"))))
    assert metadata.loads == (gone, there)
    entry_path(folder, gone).unlink()
    pd.execute(metadata)
    assert list(pd.encoder_cache) == [there]
    assert (pd.worker.stats.loads, pd.worker.stats.load_failures) == (1, 1)


def test_shutdown_can_be_called_twice(encoder: Instance, pd: Instance) -> None:
    for connector in (encoder.scheduler, encoder.worker, pd.scheduler, pd.worker):
        connector.shutdown()
        connector.shutdown()
