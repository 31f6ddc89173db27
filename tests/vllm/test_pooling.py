"""Records of requests to a vLLM instance that pools: they have the stages of the prompt, and no token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import Launch
from .fleet import front, record_of, spans_of
from .processes import MODEL, Server, vllm
from .wire import chat, image_bytes, image_part

TEXT, OTHER = "a red circle", "a blue square"


@pytest.fixture(scope="module")
def pooling(launch: Launch, logs: Path) -> Server:
    return launch(vllm(logs, "pooling", None, "--runner", "pooling", "--convert", "embed"))


@pytest.fixture(scope="module")
def proxy(launch: Launch, logs: Path, pooling: Server) -> Server:
    server = launch(front(logs, "pooling-front", aggregated=[pooling]))
    pooling.wait_ready()
    server.wait_ready()
    return server


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/embeddings", {"input": TEXT}),
        ("/v1/embeddings", {"input": [TEXT, OTHER]}),
        ("/v2/embed", {"texts": [TEXT, OTHER], "embedding_types": ["float"]}),
        ("/v1/embeddings", {"messages": chat(image_part(image_bytes(9600)), TEXT)["messages"]}),
        ("/pooling", {"input": TEXT}),
        ("/score", {"text_1": TEXT, "text_2": OTHER}),
        ("/rerank", {"query": TEXT, "documents": [OTHER, TEXT]}),
    ],
)
def test_a_record_has_the_stages_of_a_prompt_that_is_pooled(
    proxy: Server, pooling: Server, path: str, more: dict[str, Any]
) -> None:
    record = record_of(proxy, {"model": MODEL, **more}, path)
    assert spans_of(record)[pooling.url] == {"prepare", "queue", "prefill", "answer"}
    assert record["covered"] >= 0.98
    assert {"queue", "prefill"} <= record["stages"].keys()
    assert "decode" not in record["stages"]
