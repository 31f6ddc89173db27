"""The demo's images and questions: reproducible, varied, and disjoint from those of training."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest

from chiasm.demo import images, talk


@pytest.mark.parametrize("kind", images.KINDS)
def test_an_example_follows_from_its_seed(kind: str) -> None:
    first, again, other = (images.draw_example(seed, kind) for seed in (7, 7, 8))
    assert [i.tobytes() for i in first.images] == [i.tobytes() for i in again.images]
    assert (first.question, first.answer, first.kind) == (again.question, again.answer, kind)
    assert [i.tobytes() for i in first.images] != [i.tobytes() for i in other.images]


def test_questions_and_answers_are_those_of_training() -> None:
    """The checkpoint understands these phrases only; another digest means that it must be trained again."""
    texts: list[str] = []
    for kind in images.KINDS:
        for seed in range(50):
            scenes = random.Random(f"{kind} {seed}")
            topic = "describe" if kind == "which-picture" else kind.removeprefix("which-")
            scene = images.draw_scene(scenes, images.content_for(scenes, topic), many=topic == "describe")
            texts += images.ask(scenes, scene, topic, "second" if kind in images.WHICH_KINDS else None)
    exchanges = random.Random(0)
    texts += [text for _ in range(200) for text in talk.draw_exchange(exchanges)]
    texts += [talk.missing("third"), *talk.SYSTEM_MESSAGES]
    assert (
        hashlib.sha256("\n".join(texts).encode()).hexdigest()
        == "ef3bf71257a9e1ac210e7c6dff124f1916b1de6bc7a2bb1b941535d2e5ee9290"
    )


@pytest.mark.parametrize("kind", images.WHICH_KINDS)
@pytest.mark.parametrize("number", [2, 3, 4])
def test_all_images_of_a_request_have_different_answers(kind: str, number: int) -> None:
    example = images.draw_example(3, kind, number)
    topic = "describe" if kind == "which-picture" else kind.removeprefix("which-")
    answers = [images.answer_for(scene, topic) for scene in example.scenes]
    assert len(example.images) == len(set(answers)) == number
    asked = next(i for i, nth in enumerate(images.ORDINALS) if nth in example.question)
    assert answers[asked] == example.answer


def test_no_number_is_in_both_training_and_evaluation() -> None:
    held_out = {images.draw_example(seed, "number").answer for seed in range(100)}
    first = images.HELD_OUT_SEEDS
    trained = {images.draw_example(seed, "number").answer for seed in range(first, first + 100)}
    assert not held_out & trained
    assert all(images.number_is_held_out(int(n)) for n in held_out)
    assert not any(images.number_is_held_out(int(n)) for n in trained)
    kept = [n for n in range(1000) if not images.number_is_held_out(n)]
    for place in (1, 10, 100):
        assert {n // place % 10 for n in kept} == set(range(10)), "a digit is never trained in some place"


def test_canvases_differ_in_size_and_aspect() -> None:
    sizes = [images.draw_example(seed, "colour").images[0].size for seed in range(60)]
    assert min(map(min, sizes)) < 130
    assert max(map(max, sizes)) > 350
    assert any(w > 1.3 * h for w, h in sizes)
    assert any(h > 1.3 * w for w, h in sizes)
    assert images.draw_example(1, "word", size=(512, 512)).images[0].size == (512, 512)


def test_marks_are_where_something_was_drawn() -> None:
    rng = random.Random(2)
    scene = images.Scene("shape", "red", "circle", 1, "bottom left")
    image, (mark,) = images.draw_marked(rng, scene, (200, 120))
    assert mark.name == "circle"
    assert mark.x < 0.4
    assert mark.y > 0.6
    red, green, blue = np.asarray(image)[int(mark.y * 120), int(mark.x * 200)]
    assert red > 170
    assert max(green, blue) < 90
    _, marks = images.draw_marked(rng, images.Scene("word", "red", text="lion"))
    assert [m.name for m in marks] == list("lion")
    assert [m.x for m in marks] == sorted(m.x for m in marks)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="no such kind"):
        images.draw_example(1, "taste")
    with pytest.raises(ValueError, match="cannot have 3 images"):
        images.draw_example(1, "colour", 3)


def test_drawing_needs_no_torch() -> None:
    code = "import sys; from chiasm.demo import images; images.draw_example(1); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_an_image_renders_as_half_blocks() -> None:
    pytest.importorskip("rich")
    from PIL import Image

    from chiasm.demo.terminal import render

    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (0, 10, 40, 20))
    text = render(image, 8)
    assert text.plain == "\n".join(["▀" * 8] * 2)
    styles = [str(span.style) for span in text.spans]
    assert (styles[0], styles[-1]) == ("#ff0000 on #ff0000", "#0000ff on #0000ff")
    with pytest.raises(ValueError, match="columns"):
        render(image, 0)
