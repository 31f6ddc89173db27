"""Whatever value a client puts into a field, the proxy passes the request on or answers with an error that names the field."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from aiohttp import web

from tests.mutations import mutations

from .conftest import Answer, Front, Start, ask, image, image_bytes
from .instances import MODEL, FakeInstance, Received

CHAT: dict[str, Any] = ask("x", image(image_bytes()) | {"uuid": "a" * 64}) | {
    "model": MODEL,
    "stream": False,
    "cache_salt": "s",
    "max_tokens": 3,
    "ec_transfer_params": {},
    "kv_transfer_params": {},
    "mm_processor_kwargs": {},
}
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "x", "stream": False, "cache_salt": "s", "max_tokens": 3}
ADMIN = {"Authorization": f"Bearer {'k' * 16}"}


@pytest.fixture
async def front(start: Start) -> Front:
    pd = FakeInstance("pd")
    pd.answer = take_anything
    return await start([FakeInstance("encoder"), pd], admin_key="k" * 16)


async def take_anything(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    return web.json_response({})


def is_fine(answer: Answer, names: tuple[str, ...]) -> bool:
    if answer.status in {200, 413}:
        return True
    error = answer.error
    said = f"{error['message']} {error['param']}"
    return (
        answer.status in {400, 404, 409}
        and len(error["message"]) < 1000
        and (any(name in said for name in names) or (error["code"] == "invalid_json" and ", near " in said))
    )


@pytest.mark.parametrize(
    ("path", "request_"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", COMPLETION),
        ("/instances", {"url": "http://h", "role": "encoder"}),
    ],
    ids=["chat", "completion", "instances"],
)
async def test_any_value_of_any_field(
    front: Front, caplog: pytest.LogCaptureFixture, path: str, request_: dict[str, Any]
) -> None:
    with caplog.at_level(logging.WARNING):
        answers = [(body, names, await front.post(body, path, **ADMIN)) for body, names in mutations(request_)]
    wrong = [(body[:400], answer.body[:400]) for body, names, answer in answers if not is_fine(answer, names)]
    assert not wrong, f"{len(wrong)} of {len(answers)}: {wrong[:10]}"
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


async def test_the_name_of_an_unknown_field_that_is_not_utf8_is_refused(front: Front) -> None:
    body = json.dumps(CHAT).encode().replace(b'"role":', b'"\xff": 1, "role":')
    answer = await front.post(body)
    assert answer.status == 400
    assert answer.error["code"] == "invalid_json"


@pytest.mark.parametrize("value", ["9" * 400, "9e400", "nan", "-0.0", "1.5", "true", ""])
async def test_a_deadline_that_is_no_number_is_refused(front: Front, value: str) -> None:
    answer = await front.post(ask("x"), **{"X-Request-Deadline-Ms": value})
    assert answer.status == 400
    assert "X-Request-Deadline-Ms" in answer.error["message"]


HEALTH = b'{"status":"ok","model":"tiny","role":"pd",%b}'
BAD_HEALTH = {
    "not UTF-8": HEALTH % b'"version":"\xff"',
    "half a pair": HEALTH % b'"version":"\\ud800"',
    "deep": HEALTH % (b'"x":' + b"[" * 400_000 + b"]" * 400_000),  # Python 3.14 reads more than 100,000
    "400 digits": HEALTH % (b'"max_model_len":' + b"9" * 400),
    "9e400": HEALTH % b'"costs":{"decode_step_seconds":9e400}',
    "negative": HEALTH % b'"costs":{"decode_step_seconds":-1}',
    "NaN": HEALTH % b'"max_items":NaN',
}


@pytest.mark.parametrize("health", BAD_HEALTH.values(), ids=BAD_HEALTH.keys())
async def test_an_instance_whose_health_is_malformed_is_unhealthy_until_it_is_not(
    start: Start, caplog: pytest.LogCaptureFixture, health: bytes
) -> None:
    instance = FakeInstance("pd")
    front = await start([instance])
    good, instance.health_body = instance.health_body, health
    await front.until(instance, "unhealthy")
    instance.health_body = good
    await front.until(instance, "healthy")
    assert not [record.getMessage() for record in caplog.records if record.exc_info]
