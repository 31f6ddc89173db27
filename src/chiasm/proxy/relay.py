"""Streams from instances to the client, as raw bytes.

Only whole events are passed on, so that an error event stands by itself when an instance is lost, and what came before it
stays readable. Events aren't parsed; only the last one is recognized. Prefill and decode also tell the proxy in comments what
it needs to resume an answer elsewhere; these are taken out.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import msgspec
from msgspec import Raw

from chiasm.http.events import ENDS, MAX_EVENT_BYTES, EventSplitter
from chiasm.proxy.upstream import InstanceError, UpstreamError
from chiasm.wire import KV_COMMENT, TOKENS_COMMENT, UNREADABLE

_ABORTED = "An instance aborted its answer."

_KV_PREFIX, _TOKENS_PREFIX = f": {KV_COMMENT} ".encode(), f": {TOKENS_COMMENT}".encode()
_BLOCK = re.compile(rb".*?(?:\r\n\r\n|\n\n)|.+", re.DOTALL)
_HANDLE = re.compile(_KV_PREFIX + rb"(\{.*)\r?\n")
_TOKENS = re.compile(_TOKENS_PREFIX + rb"((?: [0-9]{1,10})*) ?\r?\n")
_ERROR_KEY = b'"error"'
_ERROR = re.compile(rb"data: ?(\{\s*\"error\".*)", re.DOTALL)
_ERROR_EVENT = re.compile(rb"(?:\A|(?<=\n\n)|(?<=\r\n\r\n))data: ?\{\s*\"error\".*?(?:\r\n\r\n|\n\n)", re.DOTALL)
_BEFORE_ANSWER = re.compile(rb"(?:event: ?response\.(?:created|in_progress)\r?\n.*?(?:\r\n\r\n|\n\n))*", re.DOTALL)
"""Events that the API of responses sends before the prompt is computed."""
_FINISH = re.compile(rb"\"finish_reason\":\s*\"")
_members = msgspec.json.Decoder(dict[str, Raw])


class EventRelay:
    """Passes on a stream in whole events, with the proxy's own comment before the last one.

    An event with an error is the last: vLLM sends ``[DONE]`` after it too, by which clients would take the answer for whole.
    """

    def __init__(self, last_comment: Callable[[], bytes]) -> None:
        self._last_comment = last_comment
        self._splitter = EventSplitter()
        self._commented = False
        self._has_failed = False

    def pass_on(self, chunk: bytes) -> bytes:
        """Return the whole events that have arrived with ``chunk``."""
        events = b"" if self._has_failed else self._splitter.take(chunk)
        if _ERROR_KEY in events and (failed := _ERROR_EVENT.search(events)):
            self._has_failed = True
            return events[: failed.end()]
        if events.endswith(ENDS) and not self._commented:
            self._commented = True
            done = events[events.rindex(b"data:") :]
            return events[: -len(done)] + self._last_comment() + done
        return events

    def finish(self) -> bytes:
        """Return what is left when the instance has ended the stream properly."""
        rest = self._splitter.rest()
        if self._has_failed:
            return b""
        if self._commented:
            return rest
        self._commented = True
        return rest + (b"\n\n" if rest else b"") + self._last_comment()


class PartRelay:
    """Passes on what prefill or decode sends of a stream, without what is meant for the proxy."""

    def __init__(self) -> None:
        self._splitter = EventSplitter()
        self.handle: dict[str, Raw] | None = None
        """The members of the handle with which prefill ends its part."""
        self._token_ids: list[int] = []
        self.has_finished = False
        """Whether the event that ends a choice was passed on."""
        self.failure: InstanceError | None = None
        """An error with which the instance leaves the answer to another one; it isn't passed on, nor is anything after it."""

    def pass_on(self, chunk: bytes) -> bytes:
        """Return the whole events that have arrived with ``chunk``. Raises UpstreamError for a malformed handle."""
        return b"".join([self._pass_on(block) for block in _BLOCK.findall(self._splitter.take(chunk))])

    def take_token_ids(self) -> list[int]:
        """Return the tokens announced since the last call, whose text is in the events passed on since then."""
        taken, self._token_ids = self._token_ids, []
        return taken

    def finish(self) -> bytes:
        """Return what is left when the instance has ended the stream properly."""
        return self._splitter.rest()

    def _pass_on(self, block: bytes) -> bytes:
        if self.failure is not None:
            return b""
        if error := _ERROR.match(block):
            reported = InstanceError(error[1], _ABORTED)
            if reported.is_kv_unavailable or reported.is_preempted or reported.is_leaving:
                self.failure = reported
                return b""
        if not self.has_finished and _FINISH.search(block):
            self.has_finished = True
        if _TOKENS_PREFIX not in block and _KV_PREFIX not in block:
            return block
        lines = block.splitlines(keepends=True)
        kept = [line for line in lines if not self._is_for_proxy(line)]
        if len(kept) == len(lines):
            return block
        return b"".join(kept) if any(line.strip() for line in kept) else b""

    def _is_for_proxy(self, line: bytes) -> bool:
        if tokens := _TOKENS.fullmatch(line):
            self._token_ids += map(int, tokens[1].split())
            return True
        if handle := _HANDLE.fullmatch(line):
            self.handle = read_handle(handle[1])
            return True
        return False


async def begin(next_chunk: Callable[[], Awaitable[bytes]]) -> bytes:
    """Return the beginning of a stream, at least its first event, before the client gets any of it.

    Raises InstanceError if that event is an error, so that the client gets it with a status.
    """
    splitter = EventSplitter()
    whole = b""
    while not whole and (chunk := await next_chunk()):
        whole = splitter.take(chunk)
    data = whole + splitter.rest()
    block = _BLOCK.match(data)
    if error := _ERROR.match(block[0]) if block else None:
        raise InstanceError(error[1], _ABORTED)
    return data


async def begin_answer(next_chunk: Callable[[], Awaitable[bytes]]) -> bytes:
    """Return the beginning of a stream of responses or messages, at least the first event that needed the whole prompt."""
    splitter = EventSplitter()
    whole = b""
    while len(whole) <= MAX_EVENT_BYTES and (chunk := await next_chunk()):
        if part := splitter.take(chunk):
            whole += part
            before = _BEFORE_ANSWER.match(whole)
            if len(whole) > (before.end() if before else 0):
                break
    return whole + splitter.rest()


def read_handle(value: bytes) -> dict[str, Raw]:
    """Return the members of a handle as they came. Raises UpstreamError if it isn't an object."""
    try:
        return _members.decode(value)
    except UNREADABLE as error:
        raise UpstreamError(f"The kv_transfer_params of the prefill instance are malformed: {error}") from None
