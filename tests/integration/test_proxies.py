"""Several proxies in front of one fleet, as processes, of which one is killed or restarted while clients ask all of them."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from chiasm.bench import requests
from chiasm.bench.churn import JoinedProxy, churning
from chiasm.bench.client import Client, RequestFailedError, opened
from chiasm.bench.measurements.churn import bodies
from chiasm.wire import Role
from tests.fleet import FORKS

LONG = requests.stream("Tell me a long story.", 200)


class Stream:
    """A long stream through one proxy."""

    def __init__(self, client: Client, proxy: JoinedProxy) -> None:
        self._client = client
        self._proxy = proxy
        self._has_begun = asyncio.Event()
        self.text = ""
        self.ending = asyncio.create_task(self._read())

    async def begun(self) -> None:
        await asyncio.wait_for(self._has_begun.wait(), 60)

    async def _read(self) -> str:
        """Return why it ended early; empty if it is whole."""
        try:
            async for answer in self._client.follow(self._proxy.url, LONG):
                self.text = answer.text
                if answer.token_times:
                    self._has_begun.set()
        except RequestFailedError as error:
            return error.message
        return ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_proxy_that_ends_under_load_costs_its_own_connections_and_is_right_as_soon_as_it_runs_again(
    checkpoint: Path, number: signal.Signals
) -> None:
    async with (
        opened() as client,
        churning(checkpoint, client, FORKS, roles=(Role.ENCODER, Role.PD), proxies=3) as churn,
    ):
        ending, *others = churn.proxies
        expected = {body: await churn.answer(ending, body) for body in bodies(seed=1)}
        whole = await churn.answer(ending, LONG)
        async with churn.asking(others, expected, clients=len(others)) as found:
            streams = [Stream(client, one) for one in churn.proxies]
            for stream in streams:
                await stream.begun()
            ending.signal(number)
            code = await ending.ended()
            await ending.start()
            after = [await churn.answer(ending, body) for body in expected]  # not one of them fails
            early, *rest = [await one.ending for one in streams]
        assert (found.failures, found.differences) == ([], [])
        assert after == list(expected.values())
        assert rest == ["", ""]
        assert [one.text for one in streams[1:]] == [whole, whole]
        if number is signal.SIGTERM:
            assert (code, early, streams[0].text) == (0, "", whole)
        else:
            assert code == -number
            assert early
            assert whole.startswith(streams[0].text)
