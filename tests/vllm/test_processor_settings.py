"""Settings of the image processor on vLLM's command line: a PD expects as much of an image as its encoder makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Launch
from .fleet import front
from .processes import Server, transfer_config, vllm
from .serving import Question

SMALLER = json.dumps({"size": {"shortest_edge": 4096, "longest_edge": 9216}})
"""The checkpoint's own are 9216 and 20480."""


@pytest.fixture(scope="module")
def proxy(launch: Launch, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    store = tmp_path_factory.mktemp("smaller")
    encoder, pd = (
        launch(vllm(logs, f"smaller-{role}", transfer_config(role, store), "--mm-processor-kwargs", SMALLER))
        for role in ("ec_producer", "ec_consumer")
    )
    for server in (encoder, pd):
        server.wait_ready()
    made = launch(front(logs, "smaller", encoder=[encoder], pd=[pd]))
    made.wait_ready()
    return made


def test_an_image_that_they_make_smaller_is_answered(proxy: Server) -> None:
    question = Question(30_000, (224, 160))
    response = proxy.post(question.body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"].strip() == question.answer
