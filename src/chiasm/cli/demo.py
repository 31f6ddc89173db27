"""``chiasm demo``: images drawn a moment ago, and a model in two processes that answers questions about them."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from chiasm.cli.conversation import Answer, ImageFile, Turn
    from chiasm.cli.signals import EndSignals
    from chiasm.launch import Deployment, ProcessStatus

DEFAULT_SEED = 20
_POLL_SECONDS = 0.05
_IMAGE_COLUMNS = 36
_CHARACTER_COLUMNS = 56
_WRONG_EXIT_CODE = 1
_QUIET = ("--log-level", "warning")
_SIGNAL_EXIT_CODE = 128
"""Plus the signal's number, as shells have it."""


def demo(
    image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="An image of your own, with --question.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about it.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=999_999, help="Which images are drawn; none of these was trained on.")
    ] = DEFAULT_SEED,
    model: Annotated[str, typer.Option(help="The model that answers.")] = "demo",
) -> None:
    """Draw an image, ask about it, and show what each process did for the answer.

    Ends with exit code 1 if an answer is wrong, or if there is none.
    """
    from rich.console import Console

    from chiasm.cli.conversation import AnswerError, Turn, all_agree, read_image
    from chiasm.cli.signals import EndSignals
    from chiasm.launch import Deployment, DeploymentConfig

    if (image is None) != (question is None):
        raise typer.BadParameter("give both --image and --question, or neither")
    if image is not None and question is not None:
        turns = [Turn("Your image", question, (read_image(image),))]
    else:
        turns = draw_turns(seed)
    console = Console(highlight=False)
    deployment = Deployment(DeploymentConfig(model, proxy_flags=_QUIET, instance_flags=_QUIET))
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
                raise typer.Exit(_WRONG_EXIT_CODE) from None
            if answer is None:
                break
            answers.append(answer)
            _show_answer(console, turn, answer, deployment.processes)
    if signals.received:
        raise typer.Exit(_SIGNAL_EXIT_CODE + signals.received)
    if not all_agree(turns, answers):
        console.print("\n[bold red]Not all answers are right.")
        raise typer.Exit(_WRONG_EXIT_CODE)


def draw_turns(seed: int) -> list[Turn]:
    """A question about one image, one about the second of two, and one about none."""
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


# ---- the way -----------------------------------------------------------------------------------------------------------


def _start(deployment: Deployment, signals: EndSignals) -> None:
    """Wait until all is healthy, or a signal comes."""
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
    """The answer, or None if a signal came first."""
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


# ---- what a person sees ------------------------------------------------------------------------------------------------


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
    """The images side by side: in colours where there are some, else in characters."""
    from rich.text import Text

    from chiasm.cli.image_text import draw_in_characters
    from chiasm.demo.terminal import render

    in_colours = console.is_terminal and not console.no_color and console.color_system is not None
    columns = min(_IMAGE_COLUMNS if in_colours else _CHARACTER_COLUMNS, (console.width - 4) // len(images) - 4)
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
    """Which process did what for an answer, and how long it took."""
    took = answer.milliseconds
    count = len(answer.items)
    proxy = f"{took['proxy']:.1f} ms of its own work" if "proxy" in took else "passed it on"
    if not count:
        encoder = "was not asked"
    elif took.get("encode"):
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
