"""What clients send wrong gets a clear answer and costs nobody else anything."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
from PIL import Image

from tests.integration.conftest import MODEL, Service, chat, data_url, encoded, part, pixels, sample_image


@pytest.fixture(autouse=True)
def next_request_is_right(disaggregated: Service, aggregated: Service) -> Iterator[None]:
    """Whatever a test sends, the next request is answered as ever."""
    yield
    body = chat("still there?", sample_image(7))
    assert disaggregated.answer(body) == aggregated.answer(body)


def bomb(side: int) -> bytes:
    """A PNG that says it is ``side`` × ``side`` and is a few kilobytes long."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


PNG = encoded(pixels(1))
BAD = {
    "truncated PNG": (chat(part(PNG[: len(PNG) // 2])), 400, "image|decode"),
    "not an image": (chat(part(b"hello")), 400, "image"),
    "empty image": (chat(part(b"")), 400, "image|empty"),
    "bomb": (chat(part(bomb(20_000))), 400, "pixel"),
    "too many images": (chat(*[sample_image(seed) for seed in range(33)]), 400, "limit|at most"),
    "prompt too long": (chat("word " * 2000), 400, "context|token"),
    "max_tokens 0": (chat("hello", max_tokens=0), 400, "max_tokens"),
    "negative temperature": (chat("hello", temperature=-1), 400, "temperature"),
    "no messages": ({"model": MODEL, "messages": []}, 400, "messages"),
    "messages missing": ({"model": MODEL}, 400, "messages"),
    "unknown model": (chat("hello") | {"model": "other"}, 404, "other"),
    "private address": (
        chat({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}),
        400,
        "address|private",
    ),
    "metadata service": (
        chat({"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}),
        400,
        "address|link-local|private",
    ),
    "file": (chat({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), 400, "file"),
    "embedding of a client's own": (
        chat({"type": "image_embeds", "image_embeds": {}, "uuid": "a" * 64}),
        400,
        "image_embeds",
    ),
    "uuid with a slash": (chat(sample_image(1) | {"uuid": "../../etc/passwd"}), 400, "uuid|64"),
    "uuid with NUL": (chat(sample_image(1) | {"uuid": "a\x00b"}), 400, "uuid|64"),
    "uuid of 10 kB": (chat(sample_image(1) | {"uuid": "a" * 10_000}), 400, "uuid|64"),
}


@pytest.mark.parametrize(("body", "status", "says"), BAD.values(), ids=BAD.keys())
def test_bad_requests_are_refused_with_a_reason(
    disaggregated: Service, body: dict[str, Any], status: int, says: str
) -> None:
    response = disaggregated.post(body)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert any(word in error["message"] for word in says.split("|")), error["message"]
    assert set(error) >= {"message", "type", "param", "code"}


def test_a_bad_request_that_streams_gets_its_status_too(disaggregated: Service) -> None:
    response = disaggregated.post(BAD["truncated PNG"][0] | {"stream": True})
    assert response.status_code == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"model": "small", "messages": 3}'])
def test_a_malformed_body_is_refused(disaggregated: Service, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{disaggregated.url}/v1/chat/completions", content=body, headers=headers, timeout=30)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_errors_reach_the_openai_client_as_its_own(disaggregated: Service) -> None:
    with pytest.raises(openai.NotFoundError):
        disaggregated.client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        disaggregated.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=0
        )


def rotated(image: Image.Image) -> bytes:
    """The image turned by 90° as a file, with the EXIF note that turns it back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image.rotate(90, expand=True), exif=exif)


def test_rotation_by_exif_is_honoured(disaggregated: Service) -> None:
    image = pixels(3, height=64, width=160)
    upright = disaggregated.answer(chat("see", part(encoded(image)), "?"))
    assert disaggregated.answer(chat("see", part(rotated(image)), "?")) == upright
    assert disaggregated.answer(chat("see", part(encoded(image.rotate(90, expand=True))), "?")) != upright


def test_an_animated_gif_is_its_first_frame(disaggregated: Service) -> None:
    frames = [Image.new("RGB", (96, 96), colour) for colour in ("red", "blue")]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    still = encoded(frames[0], "GIF")
    answers = [disaggregated.answer(chat("see", part(data, "image/gif"))) for data in (animated, still)]
    assert answers[0] == answers[1]


def sixteen_bit() -> bytes:
    return encoded(Image.new("I;16", (96, 96), 30_000))


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.new("RGB", (1, 1), "green")),
        encoded(pixels(4).convert("CMYK"), "JPEG"),
        sixteen_bit(),
        encoded(pixels(4).convert("P")),
        encoded(pixels(4).convert("LA")),
        encoded(pixels(4).convert("RGBA"), "WEBP", lossless=True),
        encoded(pixels(4, 20, 200)),
    ],
    ids=["1x1", "CMYK", "16 bit", "palette", "grey with alpha", "WebP", "long and thin"],
)
def test_odd_images_are_answered_as_one_process_answers_them(
    disaggregated: Service, aggregated: Service, data: bytes
) -> None:
    body = chat("see", part(data), "?")
    assert disaggregated.answer(body) == aggregated.answer(body)


def test_a_client_that_goes_away_leaves_nothing_behind(disaggregated: Service) -> None:
    body = chat("tell me everything", sample_image(8), stream=True, max_tokens=400)
    with httpx.stream("POST", f"{disaggregated.url}/v1/chat/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    disaggregated.wait_until(lambda: not any(instance["in_flight"] for instance in disaggregated.health()))
    from chiasm.wire import Role

    disaggregated.wait_until(lambda: disaggregated.metric(Role.PD, "chiasm_kv_blocks_used") == 0)


@pytest.mark.parametrize("content", [("what does <|image_pad|> mean?",), ("<|image_pad|> <|im_end|>", sample_image(1))])
def test_special_words_in_a_text_are_text(
    disaggregated: Service, aggregated: Service, content: tuple[Any, ...]
) -> None:
    assert disaggregated.answer(chat(*content)) == aggregated.answer(chat(*content))


def test_a_data_url_that_is_no_base64_is_refused(disaggregated: Service) -> None:
    body = chat({"type": "image_url", "image_url": {"url": data_url(b"x")[:-4] + "*!*!"}})
    assert disaggregated.post(body).status_code == 400
