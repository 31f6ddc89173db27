"""How an instance of vLLM joins proxies."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from chiasm.errors import ConfigurationError
from chiasm.integrations.vllm.membership import Membership
from chiasm.integrations.vllm.shutdown import ServerEnd
from chiasm.wire import LEASE_PATH, Load


def state(**arguments: Any) -> SimpleNamespace:
    """The state of vLLM's application, for an encoder."""
    ec = SimpleNamespace(is_ec_producer=True, is_ec_consumer=False)
    config = SimpleNamespace(ec_transfer_config=ec, kv_transfer_config=None, shutdown_timeout=60)
    given = {"host": "127.0.0.1", "port": 8001, "api_server_count": None} | arguments
    return SimpleNamespace(args=SimpleNamespace(**given), vllm_config=config, server=SimpleNamespace(should_exit=False))


async def test_an_instance_joins_the_proxies_of_the_environment_and_leaves_them_at_its_end() -> None:
    leases: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def take(request: web.Request) -> web.Response:
        lease = await request.json()
        leases.put_nowait(lease)
        if lease.get("waits"):
            await asyncio.Event().wait()
        return web.json_response({"state": "healthy"})

    application = web.Application()
    application.router.add_post(LEASE_PATH, take)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    end = ServerEnd()
    membership = Membership(end, None, {"CHIASM_JOIN": f"http://127.0.0.1:{runner.addresses[0][1]}"})
    vllm = state()
    end.take_over(vllm)
    membership.start(vllm)
    first = await asyncio.wait_for(leases.get(), 10)
    assert first == {
        "url": "http://127.0.0.1:8001",
        "role": "encoder",
        "incarnation": membership.incarnation,
        "status": "ok",
        "load": {"outstanding_seconds": 0.0},
    }
    assert (await asyncio.wait_for(leases.get(), 10))["waits"]
    end.drain()
    assert (await asyncio.wait_for(leases.get(), 10))["status"] == "draining"
    assert (await asyncio.wait_for(leases.get(), 10))["leaves"]
    await asyncio.wait_for(end.ended(), 10)
    assert vllm.server.should_exit
    await runner.cleanup()


def test_an_instance_that_is_told_of_no_proxies_joins_none() -> None:
    end = ServerEnd()
    membership = Membership(end, None, {})
    membership.start(state())
    assert membership.load == Load()


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({"CHIASM_JOIN": "http://127.0.0.1:1"}, {"api_server_count": 2}, "--api-server-count 1"),
        ({"CHIASM_JOIN": "http://10.0.0.1:8000"}, {}, "--advertise-url"),
        ({"CHIASM_JOIN": "proxy"}, {}, "is not the base URL"),
        ({"CHIASM_JOIN": "http://127.0.0.1:1", "CHIASM_ADVERTISE_URL": "x"}, {}, "is not the base URL"),
    ],
)
def test_what_can_not_work_is_one_clear_error_at_the_start(
    environment: dict[str, str], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Membership(ServerEnd(), None, environment).start(state(**arguments))
