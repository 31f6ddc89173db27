"""``chiasm demo``: a model in two processes answers questions about images that were just drawn."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from chiasm.cli.instance import MODEL_HELP
from chiasm.cli.parser import Parser
from chiasm.errors import ConfigurationError
from chiasm.options import Option, fields_from

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from chiasm.cli.conversation import Answer, ImageFile, Turn
    from chiasm.launch import Deployment, ProcessStatus
    from chiasm.launch.signals import EndSignals

_POLL_SECONDS = 0.05
_IMAGE_COLUMNS = 36
_CHARACTER_COLUMNS = 56
_WRONG_EXIT_CODE = 1
_QUIET = {"log_level": "warning"}
_SIGNAL_EXIT_CODE = 128
"""Exit code after a signal, to which the signal's number is added, as shells do."""


@dataclass(frozen=True)
class DemoConfig:
    """What to ask, and which model."""

    image: Annotated[Path | None, Option("An image of your own, with --question.")] = None
    question: Annotated[str | None, Option("Question about --image.")] = None
    seed: Annotated[
        int, Option("Chooses the images to draw; the model was trained on none of them.", min=0, max=999_999)
    ] = 20
    model: Annotated[str, Option(MODEL_HELP, metavar="MODEL")] = "demo"


def parser() -> Parser:
    made = Parser(
        "demo",
        "[OPTIONS]",
        "Draw images, ask about them, and show what each process did for the answer.\n\n"
        "The exit code is 1 if an answer is wrong or missing.",
    )
    made.add("demo", DemoConfig)
    return made


def run(settings: Mapping[str, Any]) -> int | None:
    """Run a deployment, ask, show the answers, and return the exit code."""
    from rich.console import Console

    from chiasm.cli.conversation import AnswerError, Turn, all_agree, read_image
    from chiasm.launch import Deployment, DeploymentConfig, RoleConfig
    from chiasm.launch.layout import Layout
    from chiasm.launch.signals import EndSignals
    from chiasm.wire import Role

    config = DemoConfig(**fields_from(settings, DemoConfig))
    if (config.image is None) != (config.question is None):
        raise ConfigurationError("Give both --image and --question, or neither.")
    if config.image is not None and config.question is not None:
        turns = [Turn("Your image", config.question, (read_image(config.image),))]
    else:
        turns = draw_turns(config.seed)
    console = Console(highlight=False)
    roles = {Role.ENCODER: RoleConfig(), Role.PD: RoleConfig()}
    deployment = Deployment(
        DeploymentConfig(config.model, roles, layout=Layout.COLOCATED, settings=_QUIET, proxy_settings=_QUIET)
    )
    answers: list[Answer] = []
    with EndSignals() as signals, deployment:
        _start(deployment, signals)
        for number, turn in enumerate(turns, 1):
            if signals.received:
                break
            _show_turn(console, f"{number}. {turn.title}", turn)
            try:
                answer = _ask(deployment, turn, signals)
            except AnswerError as error:
                console.print(f"  Error     {error.message}", style="bold red", markup=False, soft_wrap=True)
                return _WRONG_EXIT_CODE
            if answer is None:
                break
            answers.append(answer)
            _show_answer(console, turn, answer, deployment.processes)
    if signals.received:
        return _SIGNAL_EXIT_CODE + signals.received
    if not all_agree(turns, answers):
        console.print("\n[bold red]Not all answers are right.")
        return _WRONG_EXIT_CODE
    return None


def draw_turns(seed: int) -> list[Turn]:
    """Return a question about one image, one about one of two images, and one without an image."""
    from chiasm.cli.conversation import Turn, drawn
    from chiasm.demo.images import SINGLE_KINDS, WHICH_KINDS, draw_example
    from chiasm.demo.talk import EXCHANGES

    rng = random.Random(seed)
    one = draw_example(seed, rng.choice(SINGLE_KINDS))
    two = draw_example(seed, rng.choice(WHICH_KINDS), 2)
    messages, reply = EXCHANGES[2]
    return [
        Turn("An image drawn just now", one.question, tuple(map(drawn, one.images)), one.answer),
        Turn("Two images in one request", two.question, tuple(map(drawn, two.images)), two.answer),
        Turn("No image at all", messages[0].capitalize(), (), reply),
    ]


# ---- asking ------------------------------------------------------------------------------------------------------------


def _start(deployment: Deployment, signals: EndSignals) -> None:
    """Wait until every instance is healthy, or a signal comes."""
    from rich.console import Console

    started = time.monotonic()
    console = Console(stderr=True, highlight=False)
    starting = "Starting an encoder, a language model and the proxy …"
    if not console.is_terminal:
        console.print(starting)
    with console.status(starting):
        while not signals.received and not deployment.is_ready():
            deployment.check()
            time.sleep(_POLL_SECONDS)
    if not signals.received:
        parts = ", ".join(f"{process.name} (pid {process.pid})" for process in deployment.processes)
        console.print(f"{parts}: ready at {deployment.url} after {time.monotonic() - started:.1f} s", soft_wrap=True)


def _ask(deployment: Deployment, turn: Turn, signals: EndSignals) -> Answer | None:
    """Return the answer, or None if a signal came first."""
    from chiasm.cli.conversation import ask

    pool = ThreadPoolExecutor(1)
    try:
        answer: Future[Answer] = pool.submit(ask, deployment.url, turn)
        while not answer.done():
            if signals.received:
                return None
            time.sleep(_POLL_SECONDS)
        return answer.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ---- showing -----------------------------------------------------------------------------------------------------------


def _show_turn(console: Console, title: str, turn: Turn) -> None:
    from rich.table import Table

    console.print(f"\n[bold]{title}[/bold]\n")
    if turn.images:
        grid = Table.grid(padding=(0, 4, 0, 0))
        grid.add_row(*_images(console, turn.images))
        console.print(grid)
        console.print()
    console.print(f"  Question  {turn.question}", markup=False, soft_wrap=True)


def _images(console: Console, images: Sequence[ImageFile]) -> list[RenderableType]:
    """Return the images as text: half blocks where the terminal has colours, else characters."""
    from rich.text import Text

    from chiasm.cli.conversation import draw_in_characters
    from chiasm.demo.terminal import render

    in_colours = console.is_terminal and not console.no_color and console.color_system is not None
    room = max(1, (console.width - 4) // len(images) - 4)
    columns = min(_IMAGE_COLUMNS if in_colours else _CHARACTER_COLUMNS, room)
    if in_colours:
        return [render(one.image, columns) for one in images]
    return [Text(draw_in_characters(one.image, columns), no_wrap=True) for one in images]


def _show_answer(console: Console, turn: Turn, answer: Answer, processes: Sequence[ProcessStatus]) -> None:
    from rich.text import Text

    right = turn.right_answer
    if right is None:
        said = Text(answer.text)
    elif answer.agrees_with(right):
        said = Text.assemble((answer.text, "bold green"), f"   (right: {right})")
    else:
        said = Text.assemble((answer.text, "bold red"), f"   (WRONG, it is: {right})")
    console.print(Text.assemble("  Answer    ", said), soft_wrap=True)
    for line in explain(answer, processes):
        console.print(f"  {line}", style="dim", markup=False, soft_wrap=True)


def explain(answer: Answer, processes: Sequence[ProcessStatus]) -> list[str]:
    """Return a line for each process: what it did for an answer, and how long that took."""
    took = answer.milliseconds
    count = len(answer.items)
    proxy = f"{took['proxy']:.1f} ms of its own work" if "proxy" in took else "passed it on"
    if not count:
        encoder = "was not asked"
    elif "encode" not in took:
        encoder = "had not said what it did when the answer began"
    elif took["encode"]:
        encoder = f"encoded {_images_in_words(count)} in {took['encode']:.1f} ms"
    else:
        encoder = f"had the {'embedding' if count == 1 else 'embeddings'} already"
    pd = [f"{item.outcome} {item.milliseconds:.1f} ms for image {n}" for n, item in enumerate(answer.items, 1)]
    pd = [part.replace("hit 0.0 ms for", "found the embedding of") for part in pd]
    pd += [f"{label} {took[name]:.1f} ms" for name, label in _PD_PARTS.items() if name in took]
    said = {None: proxy, "encoder": encoder, "pd": ", ".join(pd)}
    return [
        f"{process.name:<9} pid {process.pid or '?':<7} {said[process.role]}"
        for process in processes
        if process.role in said
    ]


_PD_PARTS = {"prefill": "prefill", "ttft": "first token after", "total": "all of it"}


def _images_in_words(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
