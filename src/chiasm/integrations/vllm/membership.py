"""How an instance of vLLM joins proxies: by CHIASM_JOIN and CHIASM_ADVERTISE_URL, since vLLM has no options for that."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from chiasm.errors import ConfigurationError
from chiasm.fleet_key import FleetKey
from chiasm.integrations.vllm.engines import has_several_servers
from chiasm.integrations.vllm.health import role_of
from chiasm.integrations.vllm.load import ToldLoad
from chiasm.integrations.vllm.shutdown import ServerEnd
from chiasm.server.advertise import check_proxies, own_url
from chiasm.server.joining import Joiner
from chiasm.wire import DRAINING, Lease, Load

JOIN_VARIABLE = "CHIASM_JOIN"
ADVERTISE_VARIABLE = "CHIASM_ADVERTISE_URL"


class Membership:
    """The leases of one API server of vLLM, which is an instance if it is the only one of its engine."""

    def __init__(self, end: ServerEnd, key: FleetKey | None, environment: Mapping[str, str] = os.environ) -> None:
        self.incarnation = secrets.token_hex(16)
        self.told = ToldLoad()
        self._end = end
        self._key = key
        self._proxies = tuple(url.strip() for url in environment.get(JOIN_VARIABLE, "").split(",") if url.strip())
        self._advertise_url = environment.get(ADVERTISE_VARIABLE, "")
        self._url = self._role = ""

    @property
    def load(self) -> Load:
        """What it has to do, as its engines last told."""
        return replace(self.told.last(), requests=self._end.requests)

    def start(self, state: Any) -> None:
        """Join, if there are proxies; ``state`` is that of vLLM's application, whose engine runs.

        Raises ConfigurationError if no proxy could reach this instance.
        """
        if not self._proxies:
            return
        arguments = state.args
        host, port = arguments.host or "", arguments.port
        if has_several_servers(state):
            raise ConfigurationError(
                f"{JOIN_VARIABLE}: several API servers of one engine share a URL, but an instance has one process; run vLLM "
                "with --api-server-count 1, or name it to the proxy by an option."
            )
        proxies = check_proxies(self._proxies, host, self._advertise_url)
        self._url, self._role = own_url(host, port, proxies, self._advertise_url), str(role_of(state.vllm_config))
        joiner = Joiner(proxies, self._key, self.lease)
        joiner.start()
        self._end.tell, self._end.leave = joiner.tell, joiner.close

    def lease(self) -> Lease:
        """Return what the proxies are told."""
        status = DRAINING if self._end.is_asked else "ok"
        return Lease(url=self._url, role=self._role, incarnation=self.incarnation, status=status, load=self.load)
