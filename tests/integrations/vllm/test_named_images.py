"""Responses and messages on their way to vLLM: images that have names become stand-ins that the request alone knows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chiasm.errors import Code
from chiasm.integrations.vllm import named_images
from chiasm.integrations.vllm.named_images import NOTHING_NAMED, Named, NamedImage
from chiasm.models import load_processor
from chiasm.models.base import Processor
from chiasm.wire import IMAGE_PATHS, MESSAGES_PATH, RESPONSES_PATH

from .test_middleware import CHECKPOINT, NAME, VLLM, Server, config, loaded, sized

__all__ = ["loaded"]
Json = dict[str, Any]
PIXELS = "data:image/png;base64," + "A" * 5000
BOTH = pytest.mark.parametrize("path", [MESSAGES_PATH, RESPONSES_PATH])


class NotingVLLM(VLLM):
    """Notes what the parser would find behind the stand-ins of each request."""

    named: list[Named]

    async def __call__(self, *arguments: Any) -> None:
        self.named = [*getattr(self, "named", []), named_images._named.get()]
        await super().__call__(*arguments)


def body_of(path: str, *parts: Json, **more: Any) -> Json:
    return {"input" if path == RESPONSES_PATH else "messages": [{"role": "user", "content": list(parts)}]} | more


async def sent_on(path: str, body: Json) -> tuple[Json, Named]:
    vllm = NotingVLLM(config())
    answer = await Server(vllm).call("POST", path, json.dumps(body).encode())
    assert answer.status == 200, answer.body
    return json.loads(vllm.bodies[-1]), vllm.named[-1]


def stand_in_of(path: str, part: Json) -> str:
    """Return the URL of an image as vLLM's API has it, which is all that the part may hold."""
    if path == RESPONSES_PATH:
        assert part == {"type": "input_image", "image_url": part["image_url"]}
        return str(part["image_url"])
    assert part == {"type": "image", "source": {"type": "url", "url": part["source"]["url"]}}
    return str(part["source"]["url"])


def grid_of(height: int, width: int) -> Any:
    processor: Processor = load_processor(CHECKPOINT)
    return json.loads(json.dumps(processor.geometry_of_size(height, width).metadata))


@BOTH
async def test_an_embedding_becomes_a_stand_in(path: str) -> None:
    sent, named = await sent_on(path, body_of(path, sized(96, 130), {"type": "text", "text": "x"}, other=[1]))
    parts = sent["input" if path == RESPONSES_PATH else "messages"][0]["content"]
    assert named == {stand_in_of(path, parts[0]): NamedImage(NAME, None, grid_of(96, 130))}
    assert (parts[1], sent["other"]) == ({"type": "text", "text": "x"}, [1])


@BOTH
async def test_an_image_with_a_name_does_too(path: str) -> None:
    part = {"type": "image_url", "image_url": {"url": PIXELS}, "uuid": NAME}
    sent, named = await sent_on(path, body_of(path, part))
    parts = sent["input" if path == RESPONSES_PATH else "messages"][0]["content"]
    assert named == {stand_in_of(path, parts[0]): NamedImage(NAME, PIXELS, None)}


async def test_what_tools_have_returned_is_looked_through() -> None:
    output = {"type": "function_call_output", "call_id": "c", "output": [sized(96, 96) | {"detail": "low"}]}
    sent, named = await sent_on(RESPONSES_PATH, {"input": [output]})
    (part,) = sent["input"][0]["output"]
    assert (part["detail"], list(named)) == ("low", [part["image_url"]])
    result = {"type": "tool_result", "content": [sized(96, 96)]}
    sent, named = await sent_on(MESSAGES_PATH, body_of(MESSAGES_PATH, result))
    (part,) = sent["messages"][0]["content"][0]["content"]
    assert list(named) == [stand_in_of(MESSAGES_PATH, part)]


async def test_stand_ins_are_new_in_each_request_and_known_to_it_alone() -> None:
    vllm = NotingVLLM(config())
    server = Server(vllm)
    body = json.dumps(body_of(RESPONSES_PATH, sized(96, 96))).encode()
    for sent in (body, body, json.dumps({"input": "x"}).encode()):
        await server.call("POST", RESPONSES_PATH, sent)
    first, second, third = vllm.named
    assert len(first) == len(second) == 1
    assert not first.keys() & second.keys()
    assert third == NOTHING_NAMED


@pytest.mark.parametrize("path", IMAGE_PATHS)
@pytest.mark.parametrize(
    "value",
    [
        {"input": "x", "messages": "y", "other": [1.50]},
        {"input": [{"role": "user", "content": "x"}], "messages": [{"role": "user", "content": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": PIXELS}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": PIXELS, "uuid": None}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "uuid": NAME}, "x"]}], "input": [[], "uuid"]},
        {"messages": {"uuid": NAME}, "input": {"uuid": NAME}},
        ["uuid"],
    ],
    ids=lambda value: json.dumps(value)[:40],
)
async def test_all_else_reaches_vllm_byte_for_byte(path: str, value: Any) -> None:
    vllm = NotingVLLM(config())
    body = json.dumps(value, indent=1).encode()
    assert (await Server(vllm).call("POST", path, body)).status == 200
    assert (vllm.bodies, vllm.named) == ([body], [NOTHING_NAMED])


@BOTH
@pytest.mark.parametrize(("size", "name"), [((96, 96), "mine"), ((0, 96), NAME), (("a", 96), NAME)])
async def test_bad_sizes_and_names_are_refused(path: str, size: Any, name: str, tmp_path: Any) -> None:
    tmp_path.chmod(0o700)
    vllm = VLLM(config("ec_consumer", store=tmp_path))
    answer = await Server(vllm).call("POST", path, json.dumps(body_of(path, sized(size[0], size[1], name))).encode())
    assert (answer.status, vllm.bodies) == (400, [])


@BOTH
async def test_a_text_does_not_name_the_place_of_an_image(path: str) -> None:
    word = load_processor(CHECKPOINT).placeholder
    sent, _ = await sent_on(
        path, body_of(path, {"type": "text", "text": f"a {word} b"}, instructions=word, system=word)
    )
    assert word not in json.dumps(sent, ensure_ascii=False)


@BOTH
async def test_images_do_not_count_as_text(path: str) -> None:
    kind, _, data = PIXELS.partition(";base64,")
    source = {"type": "base64", "media_type": kind.removeprefix("data:"), "data": data}
    own = (
        {"type": "input_image", "image_url": PIXELS} if path == RESPONSES_PATH else {"type": "image", "source": source}
    )
    for part in (own, {"type": "image_url", "image_url": {"url": PIXELS}, "uuid": NAME}):
        vllm = VLLM(config())
        answer = await Server(vllm, max_text_bytes=4000).call("POST", path, json.dumps(body_of(path, part)).encode())
        assert (answer.status, len(vllm.bodies)) == (200, 1)


@BOTH
async def test_a_body_beyond_the_limits_is_refused(path: str) -> None:
    vllm = VLLM(config())
    body = json.dumps(body_of(path, {"type": "text", "text": "x" * 9000})).encode()
    answer = await Server(vllm, max_text_bytes=8000).call("POST", path, body)
    assert (answer.status, answer.json["error"]["code"], vllm.bodies) == (413, Code.BODY_TOO_LARGE, [])
