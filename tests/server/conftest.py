"""One server for each role, around a fake engine; all tests share them, and the engines are reset before each test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chiasm import checkpoints
from chiasm.bench import synthetic
from chiasm.engine import EngineConfig, create_engine
from chiasm.media import MediaConfig
from chiasm.server import ServerConfig, create_app
from chiasm.wire import Role
from tests.event_loops import slow_operations
from tests.server.fake_engine import FakeEncoderEngine, FakeLanguageEngine
from tests.server.serving import Listening, Reply, post, serving

MODEL = "bytes"
SMALL = ServerConfig(
    deadline_seconds=20,
    max_body_bytes=400_000,
    max_messages=8,
    max_prompts=4,
    media=MediaConfig(max_image_pixels=1_000_000, fetch_timeout_seconds=5),
)


@pytest.fixture(autouse=True)
def event_loops_wait_for_nothing_slow() -> Iterator[None]:
    """Nothing that these tests ask holds up the event loop of an instance."""
    with slow_operations() as seen:
        yield
    assert not seen


@dataclass
class Served(Listening):
    """A fake language engine behind a real server."""

    engine: FakeLanguageEngine


@dataclass
class ServedEncoder(Listening):
    """A fake encoder engine behind a real server."""

    engine: FakeEncoderEngine


@dataclass
class Demo(Listening):
    """The demo checkpoint behind a real server."""

    def post(self, **body: Any) -> Reply:
        """Ask in a chat."""
        return post(
            self.chat, {"messages": [{"role": "user", "content": "what colour is it?"}], "max_tokens": 200} | body
        )

    def choice(self, **body: Any) -> Any:
        """Return the first choice of the answer."""
        reply = self.post(**body)
        assert reply.status == 200, reply.body
        return reply.json["choices"][0]


@pytest.fixture(scope="session")
def demo() -> Iterator[Demo]:
    folder = checkpoints.folder("demo")
    engine = create_engine(EngineConfig(folder, Role.AGGREGATED, dtype="float32", threads=1, kv_cache_bytes=32 << 20))
    engine.start()
    try:
        with serving(create_app(engine, served_model_name="demo")) as url:
            yield Demo(url)
    finally:
        engine.stop()


def _served(role: Role) -> Iterator[Served]:
    engine = FakeLanguageEngine(role, max_items=3)
    with serving(create_app(engine, served_model_name=MODEL, config=SMALL)) as url:
        yield Served(url, engine)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint for real engines."""
    return synthetic.make("qwen3_vl", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def _pd() -> Iterator[Served]:
    yield from _served(Role.PD)


@pytest.fixture(scope="session")
def _aggregated() -> Iterator[Served]:
    yield from _served(Role.AGGREGATED)


@pytest.fixture(scope="session")
def _encoder() -> Iterator[ServedEncoder]:
    engine = FakeEncoderEngine(max_items=3)
    with serving(create_app(engine, served_model_name=MODEL, config=SMALL)) as url:
        yield ServedEncoder(url, engine)


@pytest.fixture(scope="session")
def _prefill() -> Iterator[Served]:
    yield from _served(Role.PREFILL)


@pytest.fixture(scope="session")
def _decode() -> Iterator[Served]:
    yield from _served(Role.DECODE)


@pytest.fixture
def pd(_pd: Served) -> Served:
    _pd.engine.reset()
    return _pd


@pytest.fixture
def aggregated(_aggregated: Served) -> Served:
    _aggregated.engine.reset()
    return _aggregated


@pytest.fixture
def encoder(_encoder: ServedEncoder) -> ServedEncoder:
    _encoder.engine.reset()
    return _encoder


@pytest.fixture
def prefill(_prefill: Served) -> Served:
    _prefill.engine.reset()
    return _prefill


@pytest.fixture
def decode(_decode: Served) -> Served:
    _decode.engine.reset()
    return _decode
