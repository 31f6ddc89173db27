"""Parsing of bodies, and replacing parts of them."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.proxy.request import parse_chat, with_member

EMBEDS = b'{"type":"image_embeds"}'

URLS = st.sampled_from(
    ["http://a/é", "data:x", "data:" + "A" * 5000, "data:" + "A" * 4999 + "B", 'data:"\\' + "A" * 5000]
)
TEXTS = st.one_of(URLS, st.text(max_size=5))
PARTS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, TEXTS),
    st.builds(
        lambda url, more: {"image_url": {"url": url} | more, "type": "image_url"}, URLS, st.just({"detail": "low"})
    ),
    st.builds(lambda url: {"type": "image_url", "image_url": url}, URLS),
)
MESSAGES = st.builds(
    lambda content, more: {"role": "user", "content": content} | more,
    st.one_of(st.none(), TEXTS, st.lists(PARTS, max_size=4)),
    st.dictionaries(st.sampled_from(["name", "url", "image_url", "data:x"]), TEXTS, max_size=2),
)
BODIES = st.builds(
    lambda messages, more: more | {"messages": messages},
    st.lists(MESSAGES, min_size=1, max_size=3),
    st.dictionaries(st.sampled_from(["user", "url", "metadata"]), TEXTS, max_size=2),
)


def media_parts(body: dict[str, Any]) -> list[dict[str, Any]]:
    contents = [message["content"] for message in body["messages"] if isinstance(message["content"], list)]
    return [part for content in contents for part in content if part["type"] == "image_url"]


@settings(deadline=None, max_examples=200)
@given(BODIES, st.booleans(), st.booleans(), st.data())
def test_only_media_parts_are_replaced(
    body: dict[str, Any], ascii_only: bool, spaced: bool, data: st.DataObject
) -> None:
    encoded = json.dumps(body, ensure_ascii=ascii_only, indent=1 if spaced else None).encode()
    request = parse_chat(encoded)
    wanted = media_parts(body)
    urls = [part["image_url"] if isinstance(part["image_url"], str) else part["image_url"]["url"] for part in wanted]
    assert [part.url.decode() for part in request.media] == urls
    if not wanted:
        return
    parts = [data.draw(st.sampled_from([EMBEDS, EMBEDS, None])) for _ in wanted]
    for part, replacement in zip(wanted, parts, strict=True):
        if replacement is not None:
            part.clear()
            part.update(json.loads(replacement))
    assert json.loads(request.with_parts(parts)) == body


def test_the_last_of_repeated_keys_counts() -> None:
    image = b'{"type":"image_url","image_url":{"url":"http://a/"}}'
    body = b'{"messages":[{"content":[%b]}],"messages":[{"content":"x","content":[%b],"role":"user"}],"a":1,"a":2}'
    request = parse_chat(body % (image, image))
    assert len(request.media) == 1
    assert request.with_parts([EMBEDS]) == b'{"messages":[{"content":[%b],"role":"user"}],"a":2}' % EMBEDS


def test_escaped_keys_are_recognized() -> None:
    body = b'{"mess\\u0061ges":[{"cont\\u0065nt":[{"t\\u0079pe":"image\\u005furl","image\\u005furl":{"url":"http:\\/\\/a"}}]}]}'
    request = parse_chat(body)
    assert [part.url for part in request.media] == [b"http://a"]
    assert request.with_parts([EMBEDS]) == b'{"messages":[{"content":[%b]}]}' % EMBEDS


def test_a_request_frees_its_body_and_images() -> None:
    request = parse_chat(b'{"messages":[{"content":"x"}]}')
    request.forget()
    assert (request.body, request.media) == (b"", [])


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=3), st.one_of(st.integers(), st.text(max_size=3), st.just({})), max_size=3),
    st.sampled_from([None, 1]),
    st.text(" \n\r\t", max_size=3),
)
def test_an_appended_member_overrides_earlier_ones(body: dict[str, Any], indent: int | None, end: str) -> None:
    encoded = (json.dumps(body, indent=indent) + end).encode()
    assert json.loads(with_member(encoded, b"k", b"[1]")) == body | {"k": [1]}
    taken = json.dumps({"k": 0} | body).encode()
    assert json.loads(with_member(taken, b"k", b"[1]"))["k"] == [1]


def test_tools_and_calls_pass_unchanged_beside_images() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"image_url": {"url": "data:x"}}'}}
    image = {"type": "image_url", "image_url": {"url": "data:" + "A" * 5000}}
    body = {
        "messages": [
            {"role": "user", "content": [image]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "done"}, image]},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": ""},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_object"},
    }
    request = parse_chat(json.dumps(body).encode())
    assert len(request.media) == 2
    image.clear()
    image["type"] = "image_embeds"
    assert json.loads(request.with_parts([EMBEDS, EMBEDS])) == body
