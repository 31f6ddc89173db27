"""The prompts at one language instance: what must be computed before a new one, what streams, what its prefix cache holds.

State only: no clock and no I/O. Instants are seconds on the caller's clock.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from chiasm.wire import LEASE_SECONDS

_MAX_PREFIXES = 4096


class ItemWork(NamedTuple):
    """One image."""

    identifier: str
    pixels: int
    is_stored: bool = False
    """Whether the shared cache has its embedding."""


class Prefix(NamedTuple):
    """The beginning of a prompt up to and including one of its images."""

    key: int
    """Equal for equal beginnings, and practically for no others."""
    text_bytes: int
    """Bytes of text in it."""


class Work(NamedTuple):
    """What a request asks for."""

    arrival: float
    text_bytes: int
    """Bytes of text of the whole prompt."""
    items: Sequence[ItemWork] = ()
    """In the order of the prompt."""
    prefixes: Sequence[Prefix] = ()
    """One for each item, or none if they aren't known."""
    streams: bool = True
    """Whether its answer comes token by token, so that its first token can be seen."""


class Ahead(NamedTuple):
    """What a new prompt has to wait for."""

    seconds: float
    """Until it could be computed."""
    prompts: int
    """Those that are computed before it. They stream by then."""
    later: int
    """Those that are due later, although they are being computed now."""
    later_seconds: float
    """Their computing."""


class Prompt:
    """A request that was given to a language instance. Compared by identity."""

    def __init__(self, work: Work, due: float, seconds: float, expected_at: float, *, is_seen: bool = True) -> None:
        self.work = work
        self.due = due
        self.expected_at = expected_at
        """When its first token was expected when it was placed."""
        self.is_seen = is_seen
        """Whether its first token can be seen; otherwise it counts as there when it was expected."""
        self.seconds = seconds
        """Computing until its first token: prefill, and in an aggregated instance encoding."""
        self.waits = False
        """Whether it waits for embeddings, so that it doesn't compute."""
        self.ready_at = 0.0
        """When the last of them was expected when it was placed."""
        self.last_seconds = seconds
        """The part of its computing that is left when it has all embeddings but the last."""
        self.streams = False
        """Whether it has its first token."""


class Prompts:
    """All prompts of one instance."""

    def __init__(self) -> None:
        self._computing: dict[Prompt, None] = {}
        """Those without a first token, in order of arrival."""
        self._progressed_at = 0.0
        """When the last of them got its first token, or the first one came."""
        self.streams = 0
        self._others_until = 0.0
        """When the instance will have done what others than this proxy had given it when it last told its load."""
        self._told_at = -math.inf
        self._prefixes: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        """The number of those that have not ended, whether they have a first token or not."""
        return len(self._computing) + self.streams

    def add(self, prompt: Prompt, now: float) -> None:
        """Take a prompt. Its prefixes count as cached from now on, since those that come later are computed later."""
        if not self._computing:
            self._progressed_at = now
        self._computing[prompt] = None
        for prefix in prompt.work.prefixes:
            self._prefixes[prefix.key] = None
            self._prefixes.move_to_end(prefix.key)
        while len(self._prefixes) > _MAX_PREFIXES:
            self._prefixes.popitem(last=False)

    def begin_stream(self, prompt: Prompt, now: float) -> None:
        """Note that a prompt has its first token."""
        if prompt in self._computing:
            del self._computing[prompt]
            self._progressed_at = now
            self.streams += 1
            prompt.streams = True

    def remove(self, prompt: Prompt, now: float) -> None:
        """Forget a prompt that has ended."""
        if prompt.streams:
            self.streams -= 1
            prompt.streams = False
        elif prompt in self._computing:
            del self._computing[prompt]
            self._progressed_at = now

    def note_load(self, outstanding_seconds: float, now: float) -> None:
        """Take what the instance says that it has to do, whoever gave it the work.

        What is more than this proxy's own prompts is the work of others. It is done as time passes.
        """
        seconds = sum(prompt.seconds for prompt in self._computing)
        own = max(0.0, seconds - max(0.0, now - self._progressed_at)) if seconds else 0.0
        self._others_until = now + max(0.0, outstanding_seconds - own)
        self._told_at = now

    def others_seconds(self, now: float) -> float:
        """Return what is left of the work of others; nothing if the instance has told its load too long ago."""
        return max(0.0, self._others_until - now) if now - self._told_at <= LEASE_SECONDS else 0.0

    def ahead(self, due: float, now: float, ready_at: float) -> Ahead:
        """Return what a new prompt has to wait for.

        Prompts that are due before it go first, but only if they have their embeddings when the new one has its own, which is
        expected at ``ready_at``.
        """
        if not self._computing:
            return Ahead(0.0, 0, 0, 0.0)
        self._presume(now)
        before = [prompt for prompt in self._computing if prompt.due <= due]
        later = [prompt.seconds for prompt in self._computing if prompt.due > due and not prompt.waits]
        running = min((one for one in before if not one.waits), key=lambda one: one.due, default=None)
        free_at = now
        if running is not None:
            free_at -= min(max(0.0, now - self._progressed_at), running.seconds)
        prompts = 0
        for prompt in sorted(before, key=lambda one: one.ready_at if one.waits else 0.0):
            begins_at = max(free_at, prompt.ready_at) if prompt.waits else free_at
            if begins_at > max(free_at, ready_at):
                break
            free_at = begins_at + (prompt.last_seconds if prompt.waits else prompt.seconds)
            prompts += 1
        return Ahead(free_at - now, prompts, len(later), sum(later))

    def seconds_computing(self, now: float) -> float:
        """Return the computing that is left of prompts that wait for nothing."""
        seconds = sum(prompt.seconds for prompt in self._computing if not prompt.waits)
        return max(0.0, seconds - max(0.0, now - self._progressed_at)) if seconds else 0.0

    def _presume(self, now: float) -> None:
        """Let prompts whose first token can't be seen stream when it was expected."""
        for prompt in [one for one in self._computing if not one.is_seen and one.expected_at <= now]:
            self.begin_stream(prompt, prompt.expected_at)

    def cached_items(self, prefixes: Sequence[Prefix]) -> int:
        """Return how many items, from the first, are in a beginning that the prefix cache holds."""
        for count in range(len(prefixes), 0, -1):
            if prefixes[count - 1].key in self._prefixes:
                return count
        return 0

    def forget_prefixes(self, prefixes: Sequence[Prefix]) -> None:
        """Note that the cache doesn't hold these."""
        for prefix in prefixes:
            self._prefixes.pop(prefix.key, None)
