"""``chiasm demo``: what it asks, what it shows, and how it ends."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image, ImageDraw
from rich.console import Console

from chiasm import checkpoints
from chiasm.cli.conversation import (
    Answer,
    AnswerError,
    ImageTiming,
    Turn,
    all_agree,
    ask,
    draw_in_characters,
    drawn,
    read_image,
)
from chiasm.cli.demo import _images, draw_turns, explain
from chiasm.launch import ProcessState, ProcessStatus
from chiasm.wire import Role
from tests.cli.running import run

needs_checkpoint = pytest.mark.skipif(
    "demo" not in checkpoints.names(), reason="the demo checkpoint has not been trained in this tree"
)
PROCESSES = [
    ProcessStatus("proxy", None, "http://p", 1, ProcessState.READY, 0),
    ProcessStatus("encoder-0", Role.ENCODER, "http://e", 2, ProcessState.READY, 0),
    ProcessStatus("pd-0", Role.PD, "http://d", 3, ProcessState.READY, 0),
]


@needs_checkpoint
def test_every_answer_is_right_and_each_process_is_named() -> None:
    done = run("demo")
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in (
        "1. An image",
        "2. Two images",
        "3. No image",
        "(right: ",
        "encoder-0",
        "pd-0",
        "was not asked",
    ):
        assert expected in done.stdout
    assert "WRONG" not in done.stdout
    assert "\x1b" not in done.stdout
    assert "ready at http://" in done.stderr


def test_a_wrong_answer_ends_with_exit_code_1(checkpoint: Path) -> None:
    done = run("demo", "--model", str(checkpoint))
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("(WRONG, it is: ") == 3
    # An answer may begin before the encoder has told how long it took.
    assert done.stdout.count(" encoded ") + done.stdout.count("had not said what it did when the answer began") == 2
    assert "had the embedding" not in done.stdout


@pytest.mark.parametrize(
    ("status", "said", "missing_bytes"),
    [
        (200, b"{}", 0),
        (200, b"[]", 0),
        (200, b"no JSON", 0),
        (200, b"[" * 10_000, 0),
        (200, b"{", 1),
        (500, b"\xff", 0),
    ],
)
def test_an_answer_that_is_none_is_an_error(status: int, said: bytes, missing_bytes: int) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(said) + missing_bytes))
            self.end_headers()
            self.wfile.write(said)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        answering = threading.Thread(target=server.handle_request)
        answering.start()
        with pytest.raises(AnswerError):
            ask(f"http://127.0.0.1:{server.server_port}", Turn("", "x"))
        answering.join()


def test_the_images_are_drawn_by_the_seed_and_were_not_trained_on() -> None:
    one, two, none = draw_turns(7)
    assert [len(turn.images) for turn in (one, two, none)] == [1, 2, 0]
    assert all(turn.right_answer for turn in (one, two, none))
    assert draw_turns(7)[0].images[0].data == one.images[0].data
    assert draw_turns(8)[0].images[0].data != one.images[0].data


@pytest.mark.parametrize(
    ("answer", "encoder", "pd"),
    [
        (
            Answer("", {"encode": 12, "prefill": 3, "ttft": 20, "total": 30, "proxy": 1}, (ImageTiming("waited", 15),)),
            "encoded 1 image in 12.0 ms",
            "waited 15.0 ms for image 1, prefill 3.0 ms, first token after 20.0 ms, all of it 30.0 ms",
        ),
        (
            Answer("", {"encode": 0}, (ImageTiming("hit", 0), ImageTiming("hit", 0))),
            "had the embeddings already",
            "found the embedding of image 1, found the embedding of image 2",
        ),
        (
            Answer("", {"prefill": 3}, (ImageTiming("waited", 15),)),
            "had not said what it did when the answer began",
            "waited 15.0 ms for image 1, prefill 3.0 ms",
        ),
        (Answer("", {"prefill": 3}), "was not asked", "prefill 3.0 ms"),
    ],
)
def test_each_process_is_explained(answer: Answer, encoder: str, pd: str) -> None:
    _, of_encoder, of_pd = explain(answer, PROCESSES)
    assert of_encoder.split(maxsplit=3) == ["encoder-0", "pid", "2", encoder]
    assert of_pd.split(maxsplit=3) == ["pd-0", "pid", "3", pd]


@pytest.mark.parametrize(("text", "agrees"), [("Red.", True), (" red ", True), ("dark red", False), ("", False)])
def test_case_and_full_stop_do_not_make_an_answer_wrong(text: str, agrees: bool) -> None:
    assert all_agree([Turn("", "", right_answer="red"), Turn("", "")], [Answer(text), Answer("?")]) is agrees


def test_an_image_file_is_sent_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.new("RGB", (20, 10), "red").save(path)
    sample_image = read_image(path)
    assert sample_image.data == path.read_bytes()
    assert sample_image.url.startswith("data:image/jpeg;base64,")
    assert sample_image.image.size == (20, 10)


@pytest.mark.parametrize("background", ["white", "black", (120, 122, 126)])
def test_without_colours_a_shape_is_drawn_in_characters(background: str | tuple[int, int, int]) -> None:
    image = Image.new("RGB", (80, 80), background)
    ImageDraw.Draw(image).rectangle((20, 20, 59, 59), fill="red")
    lines = draw_in_characters(image, 20).split("\n")
    assert len(lines) == 10
    assert lines[0] == ""
    assert lines[5].startswith("     @")
    assert len(lines[5]) == 15


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("color_system", [None, "truecolor"])
def test_images_fit_into_any_terminal(number: int, color_system: Literal["truecolor"] | None) -> None:
    narrow = Console(width=5, color_system=color_system, force_terminal=True)
    assert len(_images(narrow, [drawn(Image.new("RGB", (80, 80), "red"))] * number)) == number
