"""Exchanges without an image, and questions about an image that was not sent. The checkpoint was trained on these texts."""

from __future__ import annotations

import random

from chiasm.demo import images

SYSTEM_MESSAGES: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You answer questions about pictures.",
    "Answer briefly.",
    "You are a small vision model.",
    "Look at the picture and answer.",
)

EXCHANGES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("hello", "hi", "hey", "good morning", "hello there", "hi there"), "hello! send me a picture and ask about it."),
    (("who are you?", "what are you?", "what model are you?"), "i am a small demo model that looks at pictures."),
    (
        ("what can you do?", "help", "how can you help me?", "what do you know?"),
        "i can name colours, shapes, counts, positions, words and numbers in pictures.",
    ),
    (("thanks", "thank you", "thank you very much"), "you are welcome."),
    (("bye", "goodbye", "see you"), "goodbye!"),
    (("how are you?", "how is it going?"), "i am well. show me a picture."),
)

NO_IMAGE = "there is no picture."


def draw_exchange(rng: random.Random) -> tuple[str, str]:
    """Return a message sent without any image and its answer."""
    if rng.random() < 0.5:
        topic = rng.choice(images.SINGLE_KINDS)
        scene = images.draw_scene(rng, images.content_for(rng, topic), many=topic == "describe")
        nth = rng.choice(images.ORDINALS) if rng.random() < 0.2 else None
        return images.ask(rng, scene, topic, nth)[0], NO_IMAGE
    messages, answer = rng.choice(EXCHANGES)
    message = rng.choice(messages)
    style = rng.random()
    if style < 0.4:
        message = message[0].upper() + message[1:]
    if rng.random() < 0.3:
        message = message.rstrip("?") if message.endswith("?") else message + rng.choice(("!", "."))
    return message, answer


def missing(nth: str) -> str:
    """Return the answer to a question about an nth image that was not sent."""
    return f"there is no {nth} picture."
