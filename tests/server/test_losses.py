"""POST /embeddings/lost: a question waits until an embedding is lost, and ends with whoever takes part in it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from chiasm.server.app import create_app
from chiasm.server.losses import MAX_QUESTION_BYTES
from chiasm.wire import DRAIN_PATH, LOST_PATH, MAX_PUBLISHED, Role
from tests.mutations import mutations
from tests.server.conftest import Served, ServedEncoder
from tests.server.fake_engine import FakeLanguageEngine
from tests.server.serving import Reply, get, post, serving

A, B = "a" * 64, "b" * 64
QUESTION: dict[str, Any] = {"asker": "proxy", "published": [A], "seconds": 60}


class Asking:
    """A question that waits."""

    def __init__(self, url: str, **fields: Any) -> None:
        self._replies: list[Reply] = []
        self._thread = threading.Thread(target=self._ask, args=(url, QUESTION | fields))
        self._thread.start()

    @property
    def identifiers(self) -> Any:
        """The answer, when it is there."""
        self._thread.join()
        (reply,) = self._replies
        assert reply.status == 200
        return reply.json["identifiers"]

    def _ask(self, url: str, body: dict[str, Any]) -> None:
        self._replies.append(post(url + LOST_PATH, body))


def until(is_so: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.005)


def until_asked(engine: FakeLanguageEngine, *askers: str) -> None:
    until(lambda: set(engine.losses._questions) == {*askers})


@pytest.mark.parametrize("role", ["pd", "prefill"])
def test_a_question_waits_until_an_embedding_is_lost(request: pytest.FixtureRequest, role: str) -> None:
    served: Served = request.getfixturevalue(role)
    asking = Asking(served.url, published=[A, B])
    until_asked(served.engine, "proxy")
    served.engine.awaited = [B]
    served.engine.losses.note_missing([B])
    assert asking.identifiers == [B]


def test_a_question_ends_when_its_time_is_over(pd: Served) -> None:
    assert Asking(pd.url, seconds=0.01).identifiers == []
    until_asked(pd.engine)


def test_a_question_ends_when_the_same_proxy_asks_again(pd: Served) -> None:
    first, other = Asking(pd.url), Asking(pd.url, asker="another")
    until_asked(pd.engine, "proxy", "another")
    assert Asking(pd.url, published=[]).identifiers == []
    assert first.identifiers == []
    until_asked(pd.engine, "another")
    assert Asking(pd.url, asker="another", published=[]).identifiers == other.identifiers == []


def test_a_question_ends_when_its_client_leaves(pd: Served) -> None:
    address = urlsplit(pd.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
    connection.request("POST", LOST_PATH, json.dumps(QUESTION), {"Content-Type": "application/json"})
    until_asked(pd.engine, "proxy")
    connection.close()
    until_asked(pd.engine)


def test_a_question_ends_when_the_instance_drains_and_later_ones_do_not_wait() -> None:
    engine = FakeLanguageEngine(Role.PD)
    with serving(create_app(engine, served_model_name="bytes")) as url:
        asking = Asking(url)
        until_asked(engine, "proxy")
        post(f"{url}{DRAIN_PATH}", {})
        assert asking.identifiers == []
        assert Asking(url).identifiers == []
        until_asked(engine)


@pytest.mark.parametrize("role", ["encoder", "aggregated", "decode"])
def test_other_roles_read_no_embeddings(request: pytest.FixtureRequest, role: str) -> None:
    served: Served | ServedEncoder = request.getfixturevalue(role)
    assert post(served.url + LOST_PATH, QUESTION).status == 404
    assert "tells_lost" not in get(f"{served.url}/health").json


@pytest.mark.parametrize(
    "body",
    [
        QUESTION | {"asker": "x" * 257},
        QUESTION | {"published": ["../../etc/passwd"]},
        QUESTION | {"published": [A] * (MAX_PUBLISHED + 1)},
        QUESTION | {"seconds": 61},
        QUESTION | {"seconds": -1},
    ],
    ids=lambda body: str(body)[:40],
)
def test_what_is_out_of_bounds_is_refused(pd: Served, body: dict[str, Any]) -> None:
    assert post(pd.url + LOST_PATH, body).status == 400
    assert not pd.engine.losses.is_asked


def test_the_largest_question_fits_into_a_body_and_larger_bodies_are_refused(pd: Served) -> None:
    largest = QUESTION | {"published": [f"{number:064x}" for number in range(MAX_PUBLISHED)], "seconds": 0}
    assert post(pd.url + LOST_PATH, largest).json == {"identifiers": []}
    assert post(pd.url + LOST_PATH, QUESTION | {"padding": "x" * MAX_QUESTION_BYTES}).status == 413


def test_whatever_a_field_holds_the_answer_says_what_is_wrong_with_it(pd: Served) -> None:
    for mutation in mutations(QUESTION | {"seconds": 0}):
        assert post(pd.url + LOST_PATH, mutation.body).status in (200, 400, 413)
