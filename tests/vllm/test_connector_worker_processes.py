"""A connector from memory to memory in instances whose workers are processes of their own: two tensor-parallel ranks each.

Every answer is the same as that of a single vLLM instance. The last tests end instances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from chiasm.ec_transfer.stores.address import URL_VARIABLE
from chiasm.errors import ConfigurationError
from chiasm.media import identifier
from tests.store_server import StoreServer, running

from .conftest import Launch
from .fleet import WAIT_SECONDS, ask_all, bodies, front, images
from .processes import CALL_SECONDS, CLIENT, Server, transfer_config, vllm
from .wire import chat, image_part

CONNECTOR = "TcpConnector"
RANKS = ("--tensor-parallel-size", "2", "--distributed-executor-backend", "mp")


@dataclass
class Fleet:
    encoder: Server
    pd: Server
    proxy: Server
    shared_cache: StoreServer


@pytest.fixture(scope="module")
def fleet(launch: Launch, logs: Path) -> Iterator[Fleet]:
    with running() as shared_cache:
        environment = {URL_VARIABLE: shared_cache.url, "PYTHONHASHSEED": "1"}
        consumer = transfer_config("ec_consumer", CONNECTOR, wait_seconds=WAIT_SECONDS)
        producer = transfer_config("ec_producer", CONNECTOR)
        encoder, pd = (
            launch(vllm(logs, f"wide-{name}", transfer, *RANKS, environment=environment))
            for name, transfer in (("encoder", producer), ("pd", consumer))
        )
        for server in (encoder, pd):
            server.wait_ready()
        proxy = launch(front(logs, "wide", shared_cache.url, encoder=[encoder], pd=[pd]))
        proxy.wait_ready()
        yield Fleet(encoder, pd, proxy, shared_cache)


def test_answers_are_those_of_one_instance(fleet: Fleet, aggregated: Server) -> None:
    some = bodies(9000)
    assert ask_all(fleet.proxy, some) == ask_all(aggregated, some)
    fleet.encoder.until(lambda: fleet.encoder.count("saves") == len(images(9000)))
    fleet.pd.until(lambda: fleet.pd.count("loads") >= len(images(9000)))
    assert fleet.pd.count("failed_requests") == fleet.pd.count("load_failures") == 0


def test_streams_are_those_of_one_instance(fleet: Fleet, aggregated: Server) -> None:
    some = bodies(9100)
    assert ask_all(fleet.proxy, some, stream=True) == ask_all(aggregated, some)


def test_health_says_where_the_embeddings_are(fleet: Fleet) -> None:
    place = fleet.encoder.health().ec_place
    assert place is not None
    assert place.port > 0
    assert fleet.pd.health().ec_place is None


def test_an_image_whose_encoder_is_gone_is_answered_from_the_shared_cache(fleet: Fleet, aggregated: Server) -> None:
    data = images(9200)[0]
    name = identifier(data, fingerprint=fleet.encoder.health().fingerprint)
    assert fleet.encoder.post(chat(image_part(data, name), max_tokens=1)).status_code == 200
    fleet.encoder.until(lambda: fleet.shared_cache.has_entry(name))
    fleet.encoder.kill()
    fleet.proxy.until(lambda: not _has_healthy_encoder(fleet.proxy))
    reads, body = fleet.pd.count("store_reads"), chat(image_part(data), "what shape is it?")
    assert fleet.proxy.answer(body) == aggregated.answer(body)
    fleet.pd.until(lambda: fleet.pd.count("store_reads") == reads + 1)


def test_an_instance_whose_worker_dies_ends_and_leaves_no_process(fleet: Fleet) -> None:
    """By vLLM's own doing; what it had received goes with it."""
    processes = psutil.Process(fleet.pd.process.pid).children(recursive=True)
    named = [process for process in processes if "Worker_TP1" in " ".join(process.cmdline())]
    assert len(named) == 1
    named[0].kill()
    fleet.pd.process.wait(CALL_SECONDS)
    assert psutil.wait_procs(processes, CALL_SECONDS)[1] == []


def test_workers_that_may_be_on_other_hosts_are_refused() -> None:
    from vllm.config import ParallelConfig

    from chiasm.integrations.vllm.ec_connector import _check_workers

    _check_workers(ParallelConfig(tensor_parallel_size=2, distributed_executor_backend="mp"), CONNECTOR)
    wide = ParallelConfig(tensor_parallel_size=2, nnodes=2, distributed_executor_backend="mp")
    with pytest.raises(
        ConfigurationError, match=f"{CONNECTOR} needs all workers of an instance on the host of its sch"
    ):
        _check_workers(wide, CONNECTOR)


def _has_healthy_encoder(proxy: Server) -> bool:
    instances = CLIENT.get(f"{proxy.url}/health", timeout=CALL_SECONDS).json()["instances"]
    return any(one["role"] == "encoder" and one["state"] == "healthy" for one in instances)
