"""The API keys of a server, whose file may be replaced while it runs, and what the holder of each has under way."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from chiasm.errors import Code, ConfigurationError, RateLimitError
from chiasm.http.config import HttpConfig
from chiasm.http.key_file import ApiKey, read_api_keys
from chiasm.http.limits import Limit
from chiasm.http.watch import Replaceable

_ID_CHARACTERS = 16
_MINUTE_SECONDS = 60.0


@dataclass
class _Counts:
    in_flight: int = 0
    begun: deque[float] = field(default_factory=deque)
    """When the requests of the last minute began, if their number is limited."""


@dataclass(frozen=True)
class Share:
    """The part of each key's limits that one server of several has, so that all of them together keep the limits.

    They are workers of as many proxies as there are behind one address.
    """

    number: int = 0
    """Of the worker, from 0."""
    workers: int = 1
    """Of each proxy."""
    proxies: int = 1

    def of(self, key: ApiKey) -> ApiKey:
        """Return the key with this server's part of its limits.

        Raises ConfigurationError for a limit that leaves it nothing: it would refuse whatever comes to it.
        """
        return replace(
            key,
            max_requests_in_flight=self._part(key, "max_requests_in_flight", key.max_requests_in_flight),
            max_requests_per_minute=self._part(key, "max_requests_per_minute", key.max_requests_per_minute),
        )

    def _part(self, key: ApiKey, name: str, limit: int | None) -> int | None:
        if limit is None:
            return None
        of_proxy = limit // self.proxies
        if of_proxy < self.workers:
            least = self.workers * self.proxies
            raise ConfigurationError(
                f"--api-key-file: {name} of {key.name or 'a key without a name'} is {limit}, which can't be divided among "
                f"{self.servers}; raise it to {least} or more, or start fewer of them."
            )
        return of_proxy // self.workers + (self.number < of_proxy % self.workers)

    @property
    def servers(self) -> str:
        """All that have a part; empty if this one has the whole."""
        workers, proxies = f"{self.workers} workers", f"{self.proxies} proxies"
        if self.proxies == 1:
            return "" if self.workers == 1 else workers
        return proxies if self.workers == 1 else f"{workers} in each of {proxies}"


ALONE = Share()


class KeyHolder:
    """Whoever has a key. Keys of one name have one holder."""

    def __init__(
        self, key: ApiKey, tenant_secret: str, clock: Callable[[], float] = time.monotonic, *, share: Share = ALONE
    ) -> None:
        """``share`` of the key's limits is what holds here. Raises ConfigurationError if it is nothing."""
        self.id = _id_of(key)
        """Tells holders apart; tells nobody the key."""
        self.name = key.name
        """For logs and metrics; empty if the key has none."""
        self.tenant_secret = tenant_secret
        """What the salts of the tenant's requests are made of, which nobody else can know; empty without a tenant."""
        self._rights = share.of(key)
        self._limit = f"its limit at this one of {share.servers} is" if share.servers else "its limit is"
        self._clock = clock
        self._counts = _Counts()

    def take_over(self, other: KeyHolder) -> None:
        """Count together with another one, which has this id too; its requests may still leave there."""
        self._counts = other._counts

    @property
    def in_flight(self) -> int:
        """How many requests are being read or answered."""
        return self._counts.in_flight

    def enter(self) -> None:
        """Count a request until ``leave``. Raises RateLimitError beyond the limits of the key."""
        most, per_minute = self._rights.max_requests_in_flight, self._rights.max_requests_per_minute
        if most is not None and self._counts.in_flight >= most:
            raise RateLimitError(
                f"The API key has {self._counts.in_flight} requests in flight, and {self._limit} {most}; wait for one to end.",
                code=Code.RATE_LIMIT_EXCEEDED,
                limit=Limit.KEY_REQUESTS,
            )
        if per_minute is not None:
            self._count(per_minute)
        self._counts.in_flight += 1

    def leave(self) -> None:
        """Count a request no more."""
        self._counts.in_flight -= 1

    def _count(self, per_minute: int) -> None:
        now, begun = self._clock(), self._counts.begun
        while begun and now - begun[0] >= _MINUTE_SECONDS:
            begun.popleft()
        if len(begun) >= per_minute:
            # With a limit that was lowered, more than one has to become older than a minute.
            wait = begun[len(begun) - per_minute] + _MINUTE_SECONDS - now
            raise RateLimitError(
                f"The API key has sent {len(begun)} requests within a minute, and {self._limit} {per_minute}; "
                "try again later.",
                retry_after_seconds=int(wait) + 1,
                code=Code.RATE_LIMIT_EXCEEDED,
                limit=Limit.KEY_RATE,
            )
        begun.append(now)


class _Keys(NamedTuple):
    """All keys of one server."""

    first: str
    holders: dict[bytes, KeyHolder]
    """By the hashes of their keys."""


class KeyRing(Replaceable[_Keys]):
    """All keys of one server, on its event loop."""

    kept = "the API keys stay as they are"

    def __init__(self, config: HttpConfig, share: Share = ALONE) -> None:
        """``share`` of the keys' limits is what holds here.

        Raises ConfigurationError for keys that cannot be read or aren't fit.
        """
        super().__init__(() if config.api_key_file is None else (config.api_key_file,))
        self._config = config
        self._share = share
        self._secret = secrets.token_bytes(32)
        self._keys = self._read()

    def __bool__(self) -> bool:
        """Whether requests need a key."""
        return self._config.needs_key

    def holder_of(self, key: str) -> KeyHolder | None:
        """Return whose key it is; None if it isn't valid.

        What is looked up is a hash that nobody outside can compute, so the time that it takes tells nothing about the keys.
        """
        return self._keys.holders.get(self._hash(key))

    @property
    def first(self) -> str:
        """One of the keys, with which this server asks others that take the same; empty if there is none."""
        return self._keys.first

    @property
    def names(self) -> set[str]:
        """The names of all keys that have one."""
        return {one.name for one in self._keys.holders.values() if one.name}

    def _hash(self, key: str) -> bytes:
        return hmac.digest(self._secret, key.encode("utf-8", "surrogateescape"), "sha256")

    def _read(self) -> _Keys:
        keys = read_keys(self._config)
        tenants: dict[str, str] = {}
        holders: dict[str, KeyHolder] = {}
        found: dict[bytes, KeyHolder] = {}
        for key in keys:
            secret = tenants.setdefault(key.tenant, _secret_of(key)) if key.tenant else ""
            holder = holders.setdefault(_id_of(key), KeyHolder(key, secret, share=self._share))
            found.setdefault(self._hash(key.key), holder)
        return _Keys(keys[0].key if keys else "", found)

    def _take(self, read: _Keys) -> str:
        known = {one.id: one for one in self._keys.holders.values()}
        for one in read.holders.values():
            if one.id in known:
                one.take_over(known[one.id])
        self._keys = read
        return f"the API keys were read again: there are {len(read.holders)}"


def read_keys(config: HttpConfig) -> list[ApiKey]:
    """Return all keys that a request may have; empty if it needs none.

    Raises ConfigurationError for a file that cannot be read or holds no key, and for a key that isn't fit.
    """
    of_file = [] if config.api_key_file is None else read_api_keys(config.api_key_file)
    return [*of_file, *map(ApiKey, _once(config.api_key)), *map(ApiKey, config.keys_of_instances)]


def _once(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(keys))


def _id_of(key: ApiKey) -> str:
    return key.name or hashlib.sha256(f"Bearer {key.key}".encode()).hexdigest()[:_ID_CHARACTERS]


def _secret_of(key: ApiKey) -> str:
    """Return the secret of a tenant whose first key this is: further keys can come and go without changing it."""
    return hmac.digest(key.key.encode(), f"chiasm tenant {key.tenant}".encode(), "sha256").hex()
