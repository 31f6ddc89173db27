"""A server that is full, refuses, hangs, dies, or holds what nobody wrote: a miss or a fault, and never a wrong byte."""

from __future__ import annotations

import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from chiasm.ec_transfer.stores import (
    AbsentEntryError,
    CorruptEntryError,
    Store,
    StoredEntry,
    StoreError,
    StoreFullError,
    open_store,
    redis,
)

from ...store_server import Relay, StoreServer
from .conftest import FINGERPRINT, entry_of, read

SIZE = 10 << 20


@pytest.fixture
def store(server: StoreServer) -> Iterator[Store]:
    opened = open_store(server.url)
    yield opened
    opened.close()


@pytest.fixture
def entry(store: Store) -> StoredEntry:
    """An entry that the store has."""
    entry, data = entry_of(1)
    store.put(entry, data)
    return entry


def chunk_keys(server: StoreServer) -> list[bytes]:
    return [key for key in server.all_keys() if key.count(b":") > 4]


def header_key(server: StoreServer) -> bytes:
    (key,) = (key for key in server.all_keys() if key.count(b":") == 4)
    return key


def test_keys_name_format_model_and_item(server: StoreServer, store: Store, entry: StoredEntry) -> None:
    assert header_key(server) == f"chiasm:ec:1:{FINGERPRINT}:{entry.identifier}".encode()
    assert len(chunk_keys(server)) == len(entry.checksums)


def test_entries_expire_when_the_url_says(server: StoreServer) -> None:
    for url, expected in (
        (server.url, 86400),
        (f"{server.url}?ttl_seconds=60", 60),
        (f"{server.url}?ttl_seconds=0", -1),
    ):
        store = open_store(url)
        store.put(*entry_of(1, 64))
        ttls = {server.call("TTL", key) for key in server.all_keys()}
        store.close()
        server.call("FLUSHALL")
        assert all(isinstance(ttl, int) and (ttl == expected or 0 < expected - ttl < 20) for ttl in ttls)


def test_a_missing_chunk_makes_the_entry_absent_for_all(server: StoreServer, store: Store, entry: StoredEntry) -> None:
    server.call("DEL", chunk_keys(server)[1])
    with pytest.raises(AbsentEntryError):
        read(store, entry)
    assert store.exists_many([entry.identifier], FINGERPRINT) == [None]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(("SETRANGE", "1000", b"another"), id="other bytes"),
        pytest.param(("SET", b"short"), id="shorter"),
        pytest.param(("SET", b"x" * (5 << 20)), id="longer"),
        pytest.param(("SET", b""), id="empty"),
    ],
)
def test_a_chunk_that_a_person_overwrote_is_corrupt(
    server: StoreServer, store: Store, entry: StoredEntry, command: tuple[str | bytes, ...]
) -> None:
    server.call(command[0], chunk_keys(server)[1], *command[1:])
    with pytest.raises(CorruptEntryError):
        read(store, entry)
    assert store.exists_many([entry.identifier], FINGERPRINT) == [None]


def test_a_chunk_of_another_type_is_corrupt(server: StoreServer, store: Store, entry: StoredEntry) -> None:
    key = chunk_keys(server)[0]
    server.call("DEL", key)
    server.call("RPUSH", key, "no string")
    with pytest.raises(CorruptEntryError):
        read(store, entry)


def test_a_header_that_a_person_overwrote_is_a_miss(server: StoreServer, store: Store, entry: StoredEntry) -> None:
    key = header_key(server)
    server.call("SET", key, b"something else")
    assert store.exists_many([entry.identifier], FINGERPRINT) == [None]
    server.call("DEL", key)
    server.call("HSET", key, "field", "value")
    assert store.exists_many([entry.identifier], FINGERPRINT) == [None]


def test_a_header_of_any_size_is_a_miss_and_hides_no_other_entry(
    server: StoreServer, store: Store, entry: StoredEntry
) -> None:
    names = ["0" * 64, entry.identifier, "f" * 64]
    key = header_key(server)
    server.call("SET", key.replace(entry.identifier.encode(), b"0" * 64), b"x" * (1 << 20))
    server.call("RPUSH", key.replace(entry.identifier.encode(), b"f" * 64), "no string")
    assert store.exists_many(names, FINGERPRINT) == [None, entry, None]


def test_a_server_that_is_full_and_evicts_nothing_says_so(program: Path) -> None:
    with StoreServer(program, "--maxmemory", "12mb", "--maxmemory-policy", "noeviction") as server:
        store = open_store(server.url)
        store.put(*entry_of(1, 4 << 20))
        with pytest.raises(StoreFullError, match="maxmemory-policy"):
            store.put(*entry_of(2, 16 << 20))
        assert store.health().evicts is False
        store.close()


def test_a_server_that_evicts_takes_every_entry_and_gives_no_wrong_byte(program: Path) -> None:
    """Which entries stay is for the server to choose: of keys used in the same second any may go, and answers take room too."""
    with StoreServer(program, "--maxmemory", "24mb", "--maxmemory-policy", "allkeys-lru") as server:
        store = open_store(server.url)
        entries = [entry_of(number) for number in range(5)]
        for entry, data in entries:
            store.put(entry, data)
        absent = 0
        for entry, data in entries:
            try:
                assert read(store, entry) == data
            except AbsentEntryError:
                absent += 1
        assert absent >= 3
        server.reconfigure(maxmemory="0")
        entry, data = entries[0]
        store.put(entry, data)
        assert read(store, entry) == data
        store.close()


def test_a_password_is_given_and_a_wrong_one_is_refused_without_being_shown(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StoreServer(program, "--requirepass", "right-secret") as server:
        address = f"127.0.0.1:{server.port}"
        store = open_store(f"redis://:right-secret@{address}")
        store.put(*entry_of(1, 64))
        store.close()
        monkeypatch.setenv("CHIASM_EC_STORE_PASSWORD", "right-secret")
        store = open_store(f"redis://default@{address}")
        assert store.health().server
        store.close()
        for url in (f"redis://:wrong-secret@{address}", f"redis://nobody:wrong-secret@{address}"):
            with pytest.raises(StoreError, match="refused the password") as refused:
                open_store(url).health()
            assert "secret" not in str(refused.value)
        monkeypatch.delenv("CHIASM_EC_STORE_PASSWORD")
        with pytest.raises(StoreError, match="NOAUTH"):
            open_store(f"redis://{address}").exists_many(["a" * 64], FINGERPRINT)


def test_a_server_that_is_down_is_a_fault_and_used_again_when_it_is_back(
    server: StoreServer, store: Store, entry: StoredEntry
) -> None:
    server.kill()
    with pytest.raises(StoreError, match="can't be reached"):
        store.exists_many([entry.identifier], FINGERPRINT)
    server.start()
    assert store.exists_many([entry.identifier], FINGERPRINT) == [None]
    store.put(*entry_of(1))
    assert store.exists_many([entry.identifier], FINGERPRINT) == [entry]


def test_a_server_that_hangs_is_a_fault_within_seconds(
    server: StoreServer, store: Store, entry: StoredEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.freeze()
    with monkeypatch.context() as patch:
        patch.setattr(redis, "_CALL_SECONDS", 1.0)
        with pytest.raises(StoreError, match="too long"):
            store.exists_many([entry.identifier], FINGERPRINT)
        with pytest.raises(StoreError, match="too long"):
            open_store(server.url).health()
    server.thaw()
    assert store.exists_many([entry.identifier], FINGERPRINT) == [entry]


@pytest.mark.parametrize("sent_bytes", [0, 1, 5 << 20])
def test_a_server_that_dies_while_an_entry_is_read_is_a_fault(
    server: StoreServer, store: Store, entry: StoredEntry, sent_bytes: int
) -> None:
    with _CutOff(server.port, sent_bytes) as between:
        cut = open_store(f"redis://127.0.0.1:{between.port}")
        with pytest.raises(StoreError):
            read(cut, entry)
        cut.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"*99999999\r\n",
        b"*1\r\n*1\r\n*1\r\n$1\r\nx\r\n",
        b"*1\r\n$9223372036854775807\r\n",
        b"*1\r\n$-2\r\n",
        b"*1\r\n$99999999999999999999999\r\n",
        b"*1\r\n$2\r\nlonger than two\r\n",
        b"*2\r\n$-1\r\n$-1\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\r\n\r\n",
        b"x" * 100_000,
        b"-" + b"e" * 100_000,
    ],
    ids=lambda reply: repr(reply[:20]),
)
def test_what_is_no_answer_to_the_question_is_a_fault(reply: bytes) -> None:
    with _Player(reply) as player:
        store = open_store(f"redis://127.0.0.1:{player.port}")
        with pytest.raises(StoreError):
            store.exists_many(["a" * 64], FINGERPRINT)
        store.close()


def test_tls_is_used_and_an_unknown_certificate_is_refused(
    server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    where = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make.split(), *where], check=True, capture_output=True)
    with _TlsEnd(server.port, certificate, key) as tls:
        url = f"rediss://localhost:{tls.port}"
        with pytest.raises(StoreError, match="certificate"):
            open_store(url).health()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        store = open_store(url)
        entry, data = entry_of(1)
        store.put(entry, data)
        assert read(store, entry) == data
        store.close()


# ---- ends of connections -----------------------------------------------------------------------------------------------


class _Player:
    """Answers whatever comes with the same bytes."""

    def __init__(self, reply: bytes) -> None:
        self._reply = reply
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._play, daemon=True)

    def _play(self) -> None:
        with self._listener.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(self._reply)

    def __enter__(self) -> _Player:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        self._listener.close()


class _CutOff:
    """Passes bytes on in both directions until the server has sent so many, then cuts the connection."""

    def __init__(self, port: int, sent_bytes: int) -> None:
        self._server = port
        self._left = sent_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._pass_on, daemon=True)

    def _pass_on(self) -> None:
        with self._listener.accept()[0] as client, socket.create_connection(("127.0.0.1", self._server)) as server:
            server.sendall(client.recv(1 << 16))
            while self._left:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(1 << 16 if ready is client else min(self._left, 1 << 16))
                    if ready is client:
                        server.sendall(data)
                    else:
                        client.sendall(data)
                        self._left -= len(data)

    def __enter__(self) -> _CutOff:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._listener.close()


class _TlsEnd(Relay):
    """Takes TLS and speaks without it to a server, as a TLS proxy in front of one does."""

    def __init__(self, port: int, certificate: Path, key: Path) -> None:
        super().__init__(port)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)

    def taken(self, client: socket.socket) -> socket.socket:
        return self._context.wrap_socket(client, server_side=True)
