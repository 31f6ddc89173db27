"""Looking names up: what is an answer, and what is none."""

from __future__ import annotations

import socket

import pytest

from chiasm.http.lookup import addresses_of


def fail(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have the system's resolver fail."""

    def getaddrinfo(*arguments: object, **options: object) -> list[object]:
        raise socket.gaierror(number, "failed")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


async def test_a_name_without_addresses_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, socket.EAI_NONAME)
    assert await addresses_of("encoders", 8001) == []


async def test_a_resolver_that_fails_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, socket.EAI_AGAIN)
    with pytest.raises(OSError, match="failed"):
        await addresses_of("encoders", 8001)


@pytest.mark.parametrize("name", ["a..b", "a" * 64])
async def test_what_can_be_no_name_is_one_clear_error(name: str) -> None:
    with pytest.raises(OSError, match="is not the name of a host"):
        await addresses_of(name, 8001)
