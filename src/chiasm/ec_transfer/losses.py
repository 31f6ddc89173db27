"""Says at once when an embedding is lost that was published: an engine's requests need it next, and it is not coming."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from chiasm.ec_transfer.lookout import Lookout

MAX_ASKERS = 64
"""Questions that wait at one engine. One more ends the oldest, whose proxy then asks at intervals."""

_LOOK_SECONDS = 0.01
"""The shortest time from one look for an embedding to the next, beside an engine that may be computing."""


class _Question(NamedTuple):
    published: frozenset[str]
    told: Future[list[str]]


class LossWatch:
    """Questions that wait until one of the embeddings that they name is lost; each asker has one.

    The engine's thread says what is wanted and not in memory; a thread of this object looks what of that is not coming, and
    only while somebody asks about it. It may be wrong for the moment in which the engine takes an embedding into memory, so who
    is told asks the engine again. The methods may be called from any thread.
    """

    def __init__(self, not_coming: Callable[[Iterable[str]], list[str]]) -> None:
        """``not_coming`` returns which of some embeddings the connector neither has nor is about to get; it raises nothing."""
        self._not_coming = not_coming
        self._changed = threading.Lock()
        self._questions: dict[str, _Question] = {}
        """By asker, the oldest first."""
        self._missing: frozenset[str] = frozenset()
        self._watched: frozenset[str] = frozenset()
        self._lookout: Lookout | None = None
        self._has_stopped = False

    @property
    def is_asked(self) -> bool:
        """Whether a question waits; if none does, nobody needs to know what is missing."""
        return bool(self._questions)

    def ask(self, asker: str, published: Collection[str]) -> Future[list[str]]:
        """Return which of these embeddings are lost, once some are; nothing if the question ends before.

        It replaces the asker's earlier question, which ends. It ends at once if nothing is asked about, or after ``stop``.
        Cancelling the future ends it too. The engine's thread has to call ``note_missing`` after this.
        """
        told: Future[list[str]] = Future()
        with self._changed:
            ended = [self._questions.pop(asker, None)]
            if published and not self._has_stopped:
                if not self._questions:
                    self._missing = frozenset()  # nobody has kept it up to date
                elif len(self._questions) == MAX_ASKERS:
                    ended.append(self._questions.pop(next(iter(self._questions))))
                self._questions[asker] = _Question(frozenset(published), told)
            else:
                ended.append(_Question(frozenset(), told))
            self._follow()
        told.add_done_callback(partial(self._forget, asker))
        _answer([(question, []) for question in ended if question is not None])
        return told

    def note_missing(self, missing: Collection[str]) -> None:
        """Note what requests need next that is not in memory: when a question has come, and while one waits at each change."""
        with self._changed:
            self._missing = frozenset(missing)
            self._follow()

    def stop(self) -> None:
        """End all questions and the thread. Idempotent."""
        with self._changed:
            self._has_stopped = True
            ended, self._questions = list(self._questions.values()), {}
            self._follow()
            lookout, self._lookout = self._lookout, None
        _answer([(question, []) for question in ended])
        if lookout is not None:
            lookout.stop()

    def _forget(self, asker: str, told: Future[list[str]]) -> None:
        """Forget a question that has ended."""
        with self._changed:
            question = self._questions.get(asker)
            if question is not None and question.told is told:
                del self._questions[asker]
                self._follow()

    def _follow(self) -> None:
        """Have the thread look for what is missing and asked about. Called with the lock."""
        asked = frozenset[str]().union(*(question.published for question in self._questions.values()))
        watched, before = self._missing & asked, self._watched
        self._watched = watched
        if watched and self._lookout is None:
            self._lookout = Lookout(self._look, name="chiasm-losses", min_seconds=_LOOK_SECONDS)
        if self._lookout is not None:
            for name in before - watched:
                self._lookout.remove(name)
            for name in watched - before:
                self._lookout.add(name)

    def _look(self, names: Sequence[str]) -> bool:
        """Answer the questions about those of these embeddings that are not coming; return whether there are any."""
        gone = self._not_coming(names)
        with self._changed:
            lost = self._missing.intersection(gone)
            askers = [asker for asker, question in self._questions.items() if question.published & lost]
            told = [(question, sorted(question.published & lost)) for question in map(self._questions.pop, askers)]
            self._follow()
        _answer(told)
        return bool(told)


def _answer(told: Iterable[tuple[_Question, list[str]]]) -> None:
    """Answer questions that were taken out: without the lock, since callbacks run."""
    for question, names in told:
        if question.told.set_running_or_notify_cancel():
            question.told.set_result(names)
