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


class Streaming:
    """A client that reads one long stream after another through one proxy, until one fails or it is told to finish."""

    def __init__(self, client: Client, proxy: JoinedProxy) -> None:
        self._client = client
        self._proxy = proxy
        self._has_begun = asyncio.Event()
        self._is_over = False
        self.texts: list[str] = []
        """Of the streams that are whole."""
        self.part = ""
        """Of the stream that failed."""
        self.failure = ""
        """Its message."""
        self._reading = asyncio.create_task(self._read())

    async def begun(self) -> None:
        await asyncio.wait_for(self._has_begun.wait(), 60)

    async def failed(self) -> None:
        await asyncio.wait_for(self._reading, 60)

    async def finish(self) -> None:
        """Read the stream that is open to its end, and begin no other."""
        self._is_over = True
        await self._reading

    async def _read(self) -> None:
        while not self._is_over:
            self.part = ""
            try:
                async for answer in self._client.follow(self._proxy.url, LONG):
                    self.part = answer.text
                    if answer.token_times:
                        self._has_begun.set()
            except RequestFailedError as error:
                self.failure = error.message
                return
            self.texts.append(self.part)


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
            streamings = [Streaming(client, one) for one in churn.proxies]
            for streaming in streamings:
                await streaming.begun()
            ending.signal(number)
            code = await ending.ended()
            cut, *kept = streamings
            await cut.failed()
            await ending.start()
            after = [await churn.answer(ending, body) for body in expected]  # not one of them fails
            for streaming in kept:
                await streaming.finish()
        assert (found.failures, found.differences) == ([], [])
        assert after == list(expected.values())
        assert [one.failure for one in kept] == ["", ""]
        assert {text for one in streamings for text in one.texts} == {whole}
        assert cut.failure
        if number is signal.SIGTERM:  # the stream that was open is whole; the next one was refused
            assert (code, cut.part) == (0, "")
            assert cut.texts
        else:
            assert code == -number
            assert whole.startswith(cut.part)
