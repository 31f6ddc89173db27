"""POST /embeddings/places: the proxy tells where embeddings are, and whatever else comes is refused."""

from __future__ import annotations

from typing import Any

import pytest

from chiasm.wire import MAX_PLACES, PLACES_PATH, ECPlace
from tests.mutations import mutations
from tests.server.conftest import Served, ServedEncoder
from tests.server.serving import post

A, B = "a" * 64, "b" * 64
PLACE = {"host": "e.example", "port": 7002, "engine_id": "engine-e"}
BODY: dict[str, Any] = {"places": {A: PLACE}, "stored": [B]}


@pytest.mark.parametrize("role", ["pd", "prefill"])
def test_what_the_proxy_tells_is_passed_on(request: pytest.FixtureRequest, role: str) -> None:
    served: Served = request.getfixturevalue(role)
    assert post(served.url + PLACES_PATH, BODY).status == 204
    told = ({A: ECPlace(host="e.example", port=7002, engine_id="engine-e")}, [B])
    assert served.engine.expected.get_nowait() == told


def test_fields_of_later_versions_are_ignored(pd: Served) -> None:
    body = {"places": {A: PLACE | {"rail": 3}}, "of_a_later_version": {}}
    assert post(pd.url + PLACES_PATH, body).status == 204
    assert list(pd.engine.expected.get_nowait()[0]) == [A]


@pytest.mark.parametrize("role", ["encoder", "aggregated", "decode"])
def test_other_roles_read_no_embeddings(request: pytest.FixtureRequest, role: str) -> None:
    served: Served | ServedEncoder = request.getfixturevalue(role)
    assert post(served.url + PLACES_PATH, BODY).status == 404


@pytest.mark.parametrize(
    "body",
    [
        {"places": {A: {}}},
        {"places": {A: PLACE | {"host": ""}}},
        {"places": {A: PLACE | {"host": "h" * 257}}},
        {"places": {A: PLACE | {"port": 0}}},
        {"places": {A: PLACE | {"engine_id": "x" * 257}}},
        {"places": {"../../etc/passwd": PLACE}},
        {"places": {f"{number:064x}": PLACE for number in range(MAX_PLACES + 1)}},
        {"stored": [A + "\n"]},
        {"stored": [A] * (MAX_PLACES + 1)},
    ],
    ids=lambda body: str(body)[:40],
)
def test_what_is_out_of_bounds_is_refused_and_nothing_of_it_is_passed_on(pd: Served, body: dict[str, Any]) -> None:
    assert post(pd.url + PLACES_PATH, body).status == 400
    assert pd.engine.expected.empty()


def test_a_body_of_more_than_a_mebibyte_is_refused(pd: Served) -> None:
    assert post(pd.url + PLACES_PATH, BODY | {"padding": "x" * (1 << 20)}).status == 413
    assert pd.engine.expected.empty()


def test_whatever_a_field_holds_the_answer_says_what_is_wrong_with_it(pd: Served) -> None:
    for mutation in mutations(BODY):
        assert post(pd.url + PLACES_PATH, mutation.body).status in (204, 400)
