"""Which connections a server keeps."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field

import pytest

from chiasm.http.config import HttpConfig
from chiasm.http.connections import Connections, peer_of
from chiasm.http.descriptors import raise_descriptor_limit, room_for_connections
from chiasm.http.limits import Limit, Refusals


@dataclass(eq=False)
class Client:
    """A connection that notes what becomes of it."""

    peer: str | None = "a"
    is_sending: bool = False
    is_closed: bool = False
    refusals: list[Limit] = field(default_factory=list)

    def close(self) -> None:
        self.is_closed = True

    def refuse(self, limit: Limit) -> None:
        self.refusals.append(limit)


def three(**settings: float) -> tuple[Connections, list[Client]]:
    """A server with room for three connections, and three whose requests are being answered."""
    connections = Connections(HttpConfig(max_connections=3, **settings), Refusals())  # type: ignore[arg-type]
    clients = [Client() for _ in range(3)]
    for client in clients:
        assert connections.admit(client) is None
        connections.note_busy(client)
    return connections, clients


def test_who_is_busy_stays_and_a_new_one_is_refused() -> None:
    connections, clients = three()
    assert connections.admit(Client()) is Limit.CONNECTIONS
    assert not any(client.is_closed for client in clients)


def test_the_oldest_idle_one_makes_way_before_one_that_waits() -> None:
    connections, (waiting, first, second) = three()
    connections.note_waiting(waiting)
    connections.note_idle(first)
    connections.note_idle(second)
    for gone in (first, second, waiting):
        new = Client()
        assert connections.admit(new) is None
        connections.note_busy(new)
        assert gone.is_closed
    assert connections.open == 3


def test_a_peer_at_its_limit_makes_way_for_itself_only() -> None:
    connections = Connections(HttpConfig(max_connections=10, max_connections_per_peer=3), Refusals())
    clients, other = [Client() for _ in range(3)], Client("b")
    for client in (*clients, other):
        assert connections.admit(client) is None
        connections.note_busy(client)
    connections.note_idle(other)
    assert connections.admit(Client()) is Limit.CONNECTIONS_PER_PEER
    connections.note_idle(clients[2])
    assert connections.admit(Client()) is None
    assert (clients[2].is_closed, other.is_closed) == (True, False)


def test_few_descriptors_reduce_both_limits_alike() -> None:
    connections = Connections(HttpConfig(max_connections=100, max_connections_per_peer=50), Refusals())
    connections.reduce_to(200)
    connections.reduce_to(4)
    answers = []
    for peer in ("a", "a", "a", "b", "c", "d"):
        client = Client(peer)
        answers.append(connections.admit(client))
        connections.note_busy(client)
    assert answers == [None, None, Limit.CONNECTIONS_PER_PEER, None, None, Limit.CONNECTIONS]


def test_those_that_have_left_count_no_more() -> None:
    connections, clients = three(max_connections_per_peer=3)
    connections.leave(clients[0])
    connections.leave(clients[0])
    new = Client()
    assert connections.admit(new) is None
    connections.note_busy(new)
    assert connections.admit(Client()) is Limit.CONNECTIONS_PER_PEER


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:0:1:2:3:4:5", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("strange:", "strange:"),
        (None, None),
    ],
)
def test_a_peer_is_an_address_or_a_network_of_ipv6(address: str | None, peer: str | None) -> None:
    assert peer_of(address) == peer


def test_the_limit_of_descriptors_is_raised() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
        assert raise_descriptor_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(before[1], 1 << 16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert room_for_connections(1064) == 500
    assert room_for_connections(10) == 1
