"""Exchanges without a picture, and questions about a picture that was not sent."""

from __future__ import annotations

import random

from chiasm.demo import pictures

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

NO_PICTURE = "there is no picture."


def draw_exchange(rng: random.Random) -> tuple[str, str]:
    """Return a message sent without any picture and its answer."""
    if rng.random() < 0.5:
        topic = rng.choice(pictures.SINGLE_KINDS)
        scene = pictures.draw_scene(rng, pictures.content_for(rng, topic), many=topic == "describe")
        nth = rng.choice(pictures.ORDINALS) if rng.random() < 0.2 else None
        return pictures.ask(rng, scene, topic, nth)[0], NO_PICTURE
    messages, answer = rng.choice(EXCHANGES)
    message = rng.choice(messages)
    style = rng.random()
    if style < 0.4:
        message = message[0].upper() + message[1:]
    if rng.random() < 0.3:
        message = message.rstrip("?") if message.endswith("?") else message + rng.choice(("!", "."))
    return message, answer


def missing(nth: str) -> str:
    """Return the answer to a question about an nth picture that was not sent."""
    return f"there is no {nth} picture."
