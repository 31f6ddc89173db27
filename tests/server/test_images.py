"""Images in requests, by role."""

from __future__ import annotations

from typing import Any

import pytest

from chiasm.engine.request import ItemOutcome
from chiasm.errors import StorageError
from chiasm.media import identifier
from tests.server.conftest import Served, ServedEncoder
from tests.server.fake_engine import FINGERPRINT
from tests.server.images import bomb, chat, data_url, embeds_part, image_part, png, rotated_jpeg
from tests.server.serving import Reply, post

A = "a" * 64
B = "b" * 64


def assert_refused(reply: Reply, *words: str) -> None:
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    for word in words:
        assert word in reply.error["message"]


class TestPD:
    """Takes names of published embeddings, and no images."""

    @pytest.mark.parametrize(
        "metadata",
        [{"image_size": [28, 56]}, {"image_grid_thw": [1, 1, 2]}, {"image_grid_thw": [[1, 1, 2]]}],
    )
    def test_item_is_placed_by_its_size(self, pd: Served, metadata: dict[str, Any]) -> None:
        assert post(pd.chat, chat("See ", embeds_part(A, **metadata), "?")).status == 200
        (item,) = pd.engine.requests[0].prompt.items
        assert (item.identifier, item.offset, item.length) == (A, 4, 2)
        assert pd.engine.requests[0].pixels == {}

    def test_items_keep_their_order_and_one_may_occur_twice(self, pd: Served) -> None:
        size = {"image_size": [28, 28]}
        reply = post(pd.chat, chat(embeds_part(B, **size), embeds_part(A, **size), embeds_part(B, **size)))
        assert reply.status == 200
        assert [item.identifier for item in pd.engine.requests[0].prompt.items] == [B, A, B]
        assert {"item0", "item1", "item2"} <= reply.timing.keys()
        assert 'item0;desc="waited";dur=20.000' in reply.headers["server-timing"]

    def test_one_item_of_two_sizes_is_refused(self, pd: Served) -> None:
        parts = [embeds_part(A, image_size=[28, 28]), embeds_part(A, image_size=[28, 56])]
        assert_refused(post(pd.chat, chat(*parts)), "same uuid")

    @pytest.mark.parametrize(
        "uuid",
        [None, "", "a" * 63, "a" * 65, "A" * 64, "../" + "a" * 61, "a/b", "..", "a\x00" + "a" * 62, "a" * 10_000],
    )
    def test_a_malformed_uuid_is_refused(self, pd: Served, uuid: str | None) -> None:
        reply = post(pd.chat, chat(embeds_part(uuid, image_size=[28, 28])))
        assert_refused(reply, "64 lower-case hex digits")
        assert len(reply.body) < 1000

    @pytest.mark.parametrize(
        "embeds", [None, {}, "AAAA", [1, 2], {"image_size": [0, 5]}, {"image_size": ["a", 5]}, {"other": [1]}, 7]
    )
    def test_a_malformed_size_is_refused(self, pd: Served, embeds: Any) -> None:
        assert_refused(post(pd.chat, chat({"type": "image_embeds", "image_embeds": embeds, "uuid": A})))

    def test_image_is_refused_with_a_hint(self, pd: Served) -> None:
        assert_refused(post(pd.chat, chat(image_part(png()))), "no encoder", "proxy", "aggregated")

    def test_more_items_than_the_limit_are_refused(self, pd: Served) -> None:
        reply = post(pd.chat, chat(*[embeds_part(A, image_size=[28, 28])] * 4))
        assert_refused(reply, "4 images", "3 is the limit")
        assert reply.error["code"] == "too_many_images"

    def test_items_count_towards_the_context(self, pd: Served) -> None:
        reply = post(pd.chat, chat(embeds_part(A, image_size=[2800, 2800])))
        assert reply.error["code"] == "context_length_exceeded"


class TestAggregated:
    """Takes images and names them by content."""

    def test_image_is_named_by_content_and_preprocessed(self, aggregated: Served) -> None:
        assert post(aggregated.chat, chat("See ", image_part(png()), "?")).status == 200
        (request,) = aggregated.engine.requests
        name = identifier(png(), fingerprint=FINGERPRINT)
        assert [item.identifier for item in request.prompt.items] == [name]
        assert request.pixels[name].geometry == request.prompt.items[0].geometry

    def test_openai_client_sends_images(self, aggregated: Served) -> None:
        messages: Any = [{"role": "user", "content": [image_part(png()), {"type": "text", "text": "What is it?"}]}]
        answer = aggregated.client.chat.completions.create(model="bytes", messages=messages)
        assert answer.choices[0].message.content == "Hello"

    def test_a_uuid_does_not_name_content(self, aggregated: Served) -> None:
        parts = [image_part(png(color="red"), uuid=A), image_part(png(color="blue"), uuid=A)]
        assert post(aggregated.chat, chat(*parts)).status == 200
        names = {item.identifier for item in aggregated.engine.requests[0].prompt.items}
        assert len(names) == 2
        assert A not in names

    def test_a_uuid_must_be_an_identifier_nevertheless(self, aggregated: Served) -> None:
        assert_refused(post(aggregated.chat, chat(image_part(png(), uuid="../x"))), "64 lower-case hex digits")

    def test_salt_keeps_tenants_apart(self, aggregated: Served) -> None:
        post(aggregated.chat, chat(image_part(png()), cache_salt="mine"))
        (request,) = aggregated.engine.requests
        assert request.prompt.items[0].identifier == identifier(png(), fingerprint=FINGERPRINT, salt="mine")
        assert request.cache_salt == "mine"

    def test_same_image_twice_is_one_item_in_two_places(self, aggregated: Served) -> None:
        post(aggregated.chat, chat(image_part(png()), image_part(png())))
        (request,) = aggregated.engine.requests
        assert len(request.prompt.items) == 2
        assert len(request.pixels) == 1

    def test_size_is_that_after_exif_rotation(self, aggregated: Served) -> None:
        post(aggregated.chat, chat(image_part(rotated_jpeg(width=56, height=28))))
        (item,) = aggregated.engine.requests[0].prompt.items
        assert item.geometry.metadata == {"image_grid_thw": [1, 2, 1]}

    def test_base64_in_lines_and_without_padding_is_read(self, aggregated: Served) -> None:
        head, _, text = data_url(png()).partition(",")
        part = {"type": "image_url", "image_url": {"url": f"\n{head},{text[:76]}\r\n{text[76:].rstrip('=')} "}}
        assert post(aggregated.chat, chat(part)).status == 200
        (item,) = aggregated.engine.requests[0].prompt.items
        assert item.identifier == identifier(png(), fingerprint=FINGERPRINT)

    def test_server_timing_has_fetch_and_preprocess(self, aggregated: Served) -> None:
        assert {"fetch", "preprocess"} <= post(aggregated.chat, chat(image_part(png()))).timing.keys()

    @pytest.mark.parametrize(
        ("url", "word"),
        [
            ("data:image/png;base64,!!!!", "base64"),
            ("data:image/png,abc", "data:"),
            (data_url(b"no image"), "image"),
            (data_url(png()[:60]), "PNG"),
            (data_url(png(200, 200)[:-40]), "PNG"),
            (data_url(bomb()), "pixels"),
            ("http://127.0.0.1:9/x.png", "not public"),
            ("http://[::1]:9/x.png", "not public"),
            ("http://169.254.169.254/latest", "not public"),
            ("file:///etc/passwd", "file:"),
            ("ftp://example.org/x.png", "http"),
            ("", "http"),
        ],
    )
    def test_an_image_that_cannot_be_had_is_refused(self, aggregated: Served, url: str, word: str) -> None:
        reply = post(aggregated.chat, chat({"type": "image_url", "image_url": {"url": url}}))
        assert_refused(reply, word)
        assert aggregated.engine.requests == []
        assert post(aggregated.chat, chat("still well?")).status == 200

    def test_published_items_are_refused_with_a_hint(self, aggregated: Served) -> None:
        assert_refused(post(aggregated.chat, chat(embeds_part(A, image_size=[28, 28]))), "image_url")

    def test_more_images_than_the_limit_are_refused(self, aggregated: Served) -> None:
        assert_refused(post(aggregated.chat, chat(*[image_part(png())] * 4)), "4 images")


class TestEncoder:
    """Takes images only, and answers with what it published."""

    def test_answers_with_metadata_that_sizes_placeholders(self, encoder: ServedEncoder) -> None:
        reply = post(encoder.chat, chat(image_part(png(), uuid=A), stream=False, max_tokens=1, model="bytes"))
        assert reply.status == 200
        assert reply.json["object"] == "chat.completion"
        assert reply.json["choices"][0]["message"]["content"] == ""
        assert reply.json["choices"][0]["finish_reason"] == "stop"
        assert reply.json["ec_transfer_params"] == {A: {"item_indices": [0], "metadata": {"image_grid_thw": [1, 2, 3]}}}
        assert [(item.identifier, item.data) for item in encoder.engine.encoded[0]] == [(A, png())]

    def test_item_that_occurs_twice_is_encoded_once_and_keeps_both_places(self, encoder: ServedEncoder) -> None:
        parts = [image_part(png(), uuid=A), image_part(png(color="blue"), uuid=B), image_part(png(), uuid=A)]
        reply = post(encoder.chat, chat(*parts))
        assert reply.json["ec_transfer_params"][A]["item_indices"] == [0, 2]
        assert reply.json["ec_transfer_params"][B]["item_indices"] == [1]
        assert [item.identifier for item in encoder.engine.encoded[0]] == [A, B]

    def test_image_without_uuid_is_named_by_content(self, encoder: ServedEncoder) -> None:
        reply = post(encoder.chat, chat(image_part(png())))
        assert list(reply.json["ec_transfer_params"]) == [identifier(png(), fingerprint=FINGERPRINT)]

    def test_server_timing_has_the_encoders_stages(self, encoder: ServedEncoder) -> None:
        reply = post(encoder.chat, chat(image_part(png(), uuid=A)))
        assert {"queue", "preprocess", "encode", "publish", "item0"} <= reply.timing.keys()
        assert f'item0;desc="{ItemOutcome.ENCODED}";dur=10.000' in reply.headers["server-timing"]

    @pytest.mark.parametrize(
        "body",
        [
            chat("text", image_part(png(), uuid=A)),
            chat("text"),
            chat(),
            {"messages": [{"role": "user", "content": "text"}]},
            chat(image_part(png(), uuid=A), stream=True),
            chat(image_part(png(), uuid="..")),
            chat(embeds_part(A, image_size=[28, 28])),
            chat(image_part(bomb(), uuid=A)),
            chat(*[image_part(png())] * 4),
        ],
    )
    def test_everything_else_is_refused(self, encoder: ServedEncoder, body: Any) -> None:
        assert_refused(post(encoder.chat, body))
        assert encoder.engine.encoded == []

    def test_an_embedding_that_cannot_be_published_is_a_503(self, encoder: ServedEncoder) -> None:
        encoder.engine.encode_error = StorageError("the disk is full")
        reply = post(encoder.chat, chat(image_part(png(), uuid=A)))
        assert reply.status == 503
        assert reply.error["type"] == "storage_error"
