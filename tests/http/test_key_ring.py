"""Who holds an API key, what it may have under way, and files that are replaced."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from chiasm.errors import ConfigurationError, RateLimitError
from chiasm.http import watch
from chiasm.http.config import HttpConfig
from chiasm.http.key_file import ApiKey
from chiasm.http.key_ring import KeyHolder, KeyRing, Share
from chiasm.http.limits import Limit
from chiasm.tasks import beside
from tests.unreadable import REASON, make_unreadable

FIRST, SECOND, THIRD = (name * 4 for name in ("first", "second", "third"))


def holder(ring: KeyRing, key: str) -> KeyHolder:
    found = ring.holder_of(key)
    assert found is not None
    return found


def ring_of(tmp_path: Path, *entries: str) -> KeyRing:
    path = tmp_path / "keys"
    path.write_text("keys:\n" + "".join(f"- {{{entry}}}\n" for entry in entries))
    return KeyRing(HttpConfig(api_key_file=path))


def replace(tmp_path: Path, *entries: str) -> None:
    new = tmp_path / "new"
    new.write_text("keys:\n" + "".join(f"- {{{entry}}}\n" for entry in entries))
    new.rename(tmp_path / "keys")


def test_keys_of_one_name_have_one_holder(tmp_path: Path) -> None:
    ring = ring_of(tmp_path, f"key: {FIRST}, name: a", f"key: {SECOND}, name: a", f"key: {THIRD}")
    assert holder(ring, FIRST) is holder(ring, SECOND)
    assert (holder(ring, FIRST).id, ring.names) == ("a", {"a"})
    assert holder(ring, THIRD).name == ""
    assert THIRD not in holder(ring, THIRD).id
    assert ring.holder_of("x") is ring.holder_of("") is None


@pytest.mark.parametrize("limit", [3, 4, 8])
def test_workers_divide_the_limits_of_a_key(limit: int) -> None:
    key = ApiKey(FIRST, "a", max_requests_in_flight=limit, max_requests_per_minute=limit)
    holders = [KeyHolder(key, "", share=Share(number, 3)) for number in range(3)]
    parts = [limit // 3 + (number < limit % 3) for number in range(3)]
    assert sum(parts) == limit
    for one, part in zip(holders, parts, strict=True):
        for _ in range(part):
            one.enter()
        with pytest.raises(RateLimitError, match=rf"its limit at this one of 3 workers is {part}"):
            one.enter()


@pytest.mark.parametrize("limit", [6, 7, 20])
def test_proxies_and_their_workers_divide_the_limits_of_a_key(limit: int) -> None:
    """Proxies don't know their numbers, so what can't be divided among them is nobody's."""
    key = ApiKey(FIRST, "a", max_requests_in_flight=limit)
    parts = [Share(number, 2, proxies=3).of(key).max_requests_in_flight for number in range(2)]
    assert sum(part or 0 for part in parts) == limit // 3
    assert min(part or 0 for part in parts) >= 1


@pytest.mark.parametrize(
    ("share", "servers"),
    [
        (Share(0, 3), "3 workers"),
        (Share(proxies=3), "3 proxies"),
        (Share(0, 2, proxies=2), "2 workers in each of 2 proxies"),
    ],
)
def test_who_divides_a_limit_is_named(share: Share, servers: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"is 2, which can't be divided among {servers}; raise it to \d or more"
    ):
        share.of(ApiKey(FIRST, "a", max_requests_per_minute=2))
    most = share.workers * share.proxies
    holder = KeyHolder(ApiKey(FIRST, "a", max_requests_in_flight=most), "", share=share)
    holder.enter()
    with pytest.raises(RateLimitError, match=f"its limit at this one of {servers} is"):
        holder.enter()


def test_a_limit_that_leaves_a_worker_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"keys: [{{key: {FIRST}, name: a, max_requests_in_flight: 2}}]")
    with pytest.raises(ConfigurationError, match="max_requests_in_flight of a is 2"):
        KeyRing(HttpConfig(api_key_file=path), Share(0, 3))
    assert KeyRing(HttpConfig(api_key_file=path), Share(0, 2))


def test_a_key_of_the_command_line_and_of_the_file_is_one(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"keys: [{{key: {FIRST}, name: a}}]")
    ring = KeyRing(HttpConfig(api_key=(FIRST, FIRST), api_key_file=path))
    assert holder(ring, FIRST).name == "a"


def test_a_tenant_keeps_its_secret_while_its_first_key_stays(tmp_path: Path) -> None:
    ring = ring_of(tmp_path, f"key: {FIRST}, tenant: t", f"key: {SECOND}, tenant: t", f"key: {THIRD}, tenant: u")
    of_first, of_second, of_other = (holder(ring, key).tenant_secret for key in (FIRST, SECOND, THIRD))
    assert of_first == of_second != of_other
    again = ring_of(tmp_path, f"key: {FIRST}, tenant: t, name: n", f"key: {THIRD}, tenant: t")
    assert {holder(again, key).tenant_secret for key in (FIRST, THIRD)} == {of_first}
    renewed = ring_of(tmp_path, f"key: {SECOND}, tenant: t")
    assert holder(renewed, SECOND).tenant_secret != of_first


def test_requests_in_flight_are_bounded() -> None:
    one = KeyHolder(ApiKey(FIRST, max_requests_in_flight=1), "")
    one.enter()
    with pytest.raises(RateLimitError) as refusal:
        one.enter()
    assert (refusal.value.limit, refusal.value.retry_after_seconds) == (Limit.KEY_REQUESTS, 1)
    one.leave()
    one.enter()


def test_requests_of_any_minute_are_bounded() -> None:
    now = 100.0
    one = KeyHolder(ApiKey(FIRST, max_requests_per_minute=2), "", clock=lambda: now)
    one.enter()
    now = 130.0
    one.enter()
    now = 159.5
    with pytest.raises(RateLimitError) as refusal:
        one.enter()
    assert (refusal.value.limit, refusal.value.retry_after_seconds) == (Limit.KEY_RATE, 1)
    now = 160.0
    one.enter()
    with pytest.raises(RateLimitError) as refusal:
        one.enter()
    assert refusal.value.retry_after_seconds == 31


async def test_a_file_that_is_replaced_counts_on(tmp_path: Path) -> None:
    ring = ring_of(tmp_path, f"key: {FIRST}, name: a, max_requests_in_flight: 1", f"key: {SECOND}")
    before = holder(ring, FIRST)
    before.enter()
    replace(tmp_path, f"key: {THIRD}, name: a, max_requests_in_flight: 1")
    await ring.read_again()
    assert ring.holder_of(FIRST) is ring.holder_of(SECOND) is None
    after = holder(ring, THIRD)
    with pytest.raises(RateLimitError):
        after.enter()
    before.leave()
    after.enter()


async def test_a_file_that_is_gone_or_wrong_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = ring_of(tmp_path, f"key: {FIRST}")
    os.unlink(tmp_path / "keys")
    await ring.read_again()
    replace(tmp_path, "key: short")
    await ring.read_again()
    assert caplog.text.count("the API keys stay as they are") == 2
    assert ring.holder_of(FIRST) is not None


async def test_a_file_that_is_replaced_written_or_removed_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "INTERVAL_SECONDS", 0.001)
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("one")
    changes = watch.FileWatch([path, other]).changes()
    async with asyncio.timeout(60):
        other.write_text("two")
        await anext(changes)
        other.rename(path)
        await anext(changes)
        path.write_text("three")
        await anext(changes)
        path.unlink()
        await anext(changes)


async def test_a_file_that_could_not_be_read_is_read_again_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A key that was taken out must not stay valid because the file's share was away for a moment."""
    monkeypatch.setattr(watch, "INTERVAL_SECONDS", 0.001)
    ring = ring_of(tmp_path, f"key: {FIRST}")
    make_unreadable(monkeypatch, tmp_path / "keys", times=3)
    replace(tmp_path, f"key: {SECOND}")
    async with asyncio.timeout(60), beside(ring.follow()):
        while ring.holder_of(SECOND) is None:  # noqa: ASYNC110 - a ring has no event
            await asyncio.sleep(0.001)
    assert ring.holder_of(FIRST) is None
    assert caplog.text.count(REASON) == 1, "the same reason is logged once"


async def test_a_file_whose_mode_is_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been refused because others could write to it."""
    monkeypatch.setattr(watch, "INTERVAL_SECONDS", 0.001)
    path = tmp_path / "a"
    path.touch(0o666)
    changes = watch.FileWatch([path]).changes()
    path.chmod(0o600)
    async with asyncio.timeout(60):
        await anext(changes)
