"""The table of leases, at times that the tests choose."""

from __future__ import annotations

import pytest

from chiasm.kv_transfer.leases import LeaseRefused, LeaseTable

A, B = 1, 2


@pytest.fixture
def table() -> LeaseTable:
    """At time 100 the blocks 5, 3 and 8 of request ``r`` were held, for 30 seconds."""
    table = LeaseTable(lease_seconds=30)
    table.hold("r", [5, 3, 8], now=100)
    return table


def test_an_unclaimed_lease_ends_when_its_seconds_are_over(table: LeaseTable) -> None:
    assert table.next_expiry == 130
    assert table.expire(now=129.9) == []
    assert table.expire(now=130) == ["r"]
    assert len(table) == 0
    assert table.next_expiry is None


def test_a_claim_holds_the_blocks_until_the_deadline_of_the_request(table: LeaseTable) -> None:
    table.claim("r", [5, 3, 8], A, seconds=60, now=110)
    assert table.expire(now=169.9) == []
    assert table.is_claimed("r", A, now=169.9)
    assert not table.is_claimed("r", A, now=170)
    assert table.expire(now=170) == ["r"]


def test_a_short_deadline_ends_a_lease_before_its_own_seconds(table: LeaseTable) -> None:
    table.claim("r", [5, 3, 8], A, seconds=1, now=110)
    assert table.expire(now=111) == ["r"]


def test_a_lease_is_claimed_once(table: LeaseTable) -> None:
    table.claim("r", [5, 3, 8], A, seconds=60, now=110)
    for holder in (A, B):
        with pytest.raises(LeaseRefused, match="claimed already"):
            table.claim("r", [5, 3, 8], holder, seconds=60, now=111)
    assert table.is_claimed("r", A, now=112)
    assert not table.is_claimed("r", B, now=112)


@pytest.mark.parametrize("block_ids", [[5, 3], [5, 3, 8, 9], [3, 5, 8], [], [5, 3, 7]])
def test_a_claim_names_exactly_the_blocks_of_its_request(table: LeaseTable, block_ids: list[int]) -> None:
    with pytest.raises(LeaseRefused, match="block ids"):
        table.claim("r", block_ids, A, seconds=60, now=110)
    table.claim("r", [5, 3, 8], B, seconds=60, now=110)


def test_an_expired_lease_cannot_be_claimed_even_before_it_is_swept(table: LeaseTable) -> None:
    with pytest.raises(LeaseRefused, match="lease has ended"):
        table.claim("r", [5, 3, 8], A, seconds=60, now=130)


def test_an_unknown_request_cannot_be_claimed(table: LeaseTable) -> None:
    with pytest.raises(LeaseRefused, match="never had KV here"):
        table.claim("s", [5, 3, 8], A, seconds=60, now=110)


def test_only_the_holder_can_release_a_lease(table: LeaseTable) -> None:
    assert not table.release("r", A)
    table.claim("r", [5, 3, 8], A, seconds=60, now=110)
    assert not table.release("r", B)
    assert table.release("r", A)
    assert not table.release("r", A)
    assert len(table) == 0


def test_all_leases_of_a_holder_can_be_released(table: LeaseTable) -> None:
    for request_id in ("s", "t", "u"):
        table.hold(request_id, [1], now=100)
    for request_id, holder in (("s", A), ("t", B)):
        table.claim(request_id, [1], holder, seconds=60, now=110)
    table.claim("r", [5, 3, 8], A, seconds=60, now=110)
    assert sorted(table.release_all(A)) == ["r", "s"]
    assert table.release_all(A) == []
    assert table.is_claimed("t", B, now=110)
    assert len(table) == 2


def test_a_request_has_one_lease(table: LeaseTable) -> None:
    with pytest.raises(ValueError, match="'r'"):
        table.hold("r", [1], now=101)


def test_a_lease_that_nobody_has_claimed_can_be_given_back_once(table: LeaseTable) -> None:
    assert table.give_back("r")
    assert not table.give_back("r")
    assert len(table) == 0


def test_a_claimed_lease_stays_with_its_holder_when_it_is_given_back(table: LeaseTable) -> None:
    table.claim("r", [5, 3, 8], A, seconds=60, now=110)
    assert not table.give_back("r")
    assert table.is_claimed("r", A, now=111)
