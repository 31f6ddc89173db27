"""Which embeddings the encoder cache evicts when room is short."""

from chiasm.engine.encoder_cache_manager import EncoderCacheManager


def test_entries_fit_up_to_the_capacity() -> None:
    cache = EncoderCacheManager(100)
    assert cache.allocate("a", 60, rank=(False, 0.0, 0))
    cache.hold("a", "first", (False, 0.0, 0))
    assert not cache.allocate("b", 60, rank=(False, 0.0, 1))
    assert cache.used_bytes == 60


def test_unheld_entries_are_evicted_first_least_recently_used_first() -> None:
    cache = EncoderCacheManager(100)
    for name in ("a", "b"):
        cache.allocate(name, 50, rank=(False, 0.0, 0))
    cache.hold("a", "s", (False, 0.0, 0))
    cache.release("a", "s")
    assert cache.allocate("c", 50, rank=(False, 0.0, 1))
    assert "a" in cache
    assert cache.take_evicted() == ["b"]


def test_an_earlier_sequence_takes_room_from_a_later_one_but_not_the_other_way_round() -> None:
    cache = EncoderCacheManager(50)
    cache.allocate("late", 50, rank=(False, 0.0, 5))
    cache.hold("late", "s5", (False, 0.0, 5))
    assert not cache.allocate("later", 50, rank=(False, 0.0, 6))
    assert cache.allocate("early", 50, rank=(False, 0.0, 1))
    assert "late" not in cache


def test_an_entry_that_an_earlier_sequence_shares_stays() -> None:
    cache = EncoderCacheManager(50)
    cache.allocate("shared", 50, rank=(False, 0.0, 5))
    cache.hold("shared", "s5", (False, 0.0, 5))
    cache.hold("shared", "s1", (False, 0.0, 1))
    assert not cache.allocate("other", 50, rank=(False, 0.0, 3))


def test_an_entry_to_keep_is_not_evicted_even_if_no_sequence_holds_it() -> None:
    cache = EncoderCacheManager(100)
    cache.allocate("a", 50, rank=(False, 0.0, 0))
    cache.allocate("b", 50, rank=(False, 0.0, 0))
    assert cache.allocate("c", 50, rank=(False, 0.0, 0), keep={"a"})
    assert "a" in cache
    assert "b" not in cache


def test_an_entry_larger_than_the_capacity_evicts_nothing() -> None:
    cache = EncoderCacheManager(100)
    cache.allocate("a", 50, rank=(False, 0.0, 0))
    assert not cache.allocate("huge", 101, rank=(False, 0.0, 0))
    assert "a" in cache


def test_an_entry_that_came_back_is_not_reported_as_evicted() -> None:
    cache = EncoderCacheManager(50)
    cache.allocate("a", 50, rank=(False, 0.0, 0))
    cache.allocate("b", 50, rank=(False, 0.0, 0))
    cache.allocate("a", 50, rank=(False, 0.0, 0))
    assert cache.take_evicted() == ["b"]
    assert cache.take_evicted() == []


def test_removing_an_unknown_entry_changes_nothing() -> None:
    cache = EncoderCacheManager(50)
    cache.remove("nothing")
    cache.release("nothing", "s")
    assert cache.used_bytes == 0
