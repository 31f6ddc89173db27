"""A stream of server-sent events, from an instance to the client, as raw bytes.

Only whole events go out, so that when the instance breaks off, the error event stands by itself and what came before
stays readable. Nothing is parsed; the one event that is looked for is the last. P and D also tell the proxy what it needs
to have another instance go on, in comments that are taken out.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import msgspec
from msgspec import Raw

from chiasm.errors import ChiasmError
from chiasm.proxy.timing import Timing
from chiasm.proxy.upstream import ToldError, UpstreamError

_END = b"\n\n"
_END_CRLF = b"\r\n\r\n"
_DONE = (b"data: [DONE]\n\n", b"data: [DONE]\r\n\r\n")
_MAX_HELD_BYTES = 16 << 20

_BLOCK = re.compile(rb".*?(?:\r\n\r\n|\n\n)|.+", re.DOTALL)
_HANDLE = re.compile(rb": kv_transfer_params (\{.*)\r?\n")
_TOKENS = re.compile(rb": tokens((?: [0-9]{1,10})*) ?\r?\n")
_ERROR = re.compile(rb"data: ?(\{\s*\"error\".*)", re.DOTALL)
_FINISH = re.compile(rb"\"finish_reason\":\s*\"")


class EventRelay:
    """What of the received bytes may be sent now."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._whole = _WholeEvents()
        self._announced = False

    def pass_on(self, chunk: bytes) -> bytes:
        """The whole events that are there with ``chunk``; before the last one comes a comment with the proxy's figures."""
        events = self._whole.take(chunk)
        for done in _DONE:
            if events.endswith(done) and not self._announced:
                self._announced = True
                return events[: -len(done)] + self._timing.comment() + done
        return events

    def finish(self) -> bytes:
        """What is left when the instance has ended the stream as it should."""
        rest = self._whole.rest()
        if self._announced:
            return rest
        self._announced = True
        return rest + (_END if rest else b"") + self._timing.comment()

    def fail(self, error: ChiasmError) -> bytes:
        """The error event that ends a stream; an event that was cut off before it is dropped."""
        self._whole.rest()
        return b"data: " + error_body(error) + _END


async def begin(next_chunk: Callable[[], Awaitable[bytes]]) -> bytes:
    """The beginning of a stream, held back until it is known that it isn't an error: that can still come with a status.

    Raises ToldError if what the instance says first is that something went wrong.
    """
    data = b""
    while _end_of_events(data) <= 0 and len(data) <= _MAX_HELD_BYTES and (chunk := await next_chunk()):
        data += chunk
    block = _BLOCK.match(data)
    if told := _ERROR.match(block[0]) if block else None:
        raise ToldError(told[1], "the instance gave the answer up")
    return data


class PartRelay:
    """The same for the answer of a P or a D, which is a part of the client's: what it says to the proxy is taken out."""

    def __init__(self) -> None:
        self._whole = _WholeEvents()
        self.handle: dict[str, Raw] | None = None
        """What P says for D: the answer goes on there."""
        self._token_ids: list[int] = []
        self.has_finished = False
        """Whether a choice's end was passed on."""
        self.failure: ToldError | None = None
        """An error by which the instance gives the answer up, so that another may go on with it; it is held back."""

    def pass_on(self, chunk: bytes) -> bytes:
        """The whole events that are there with ``chunk``, without what is for the proxy. Raises UpstreamError."""
        return b"".join([self._pass_on(block) for block in _BLOCK.findall(self._whole.take(chunk))])

    def take_token_ids(self) -> list[int]:
        """Those announced since the last call: the text of the events passed on meanwhile is of these tokens."""
        taken, self._token_ids = self._token_ids, []
        return taken

    def finish(self) -> bytes:
        """What is left when the instance has ended the stream as it should."""
        return self._whole.rest()

    def _pass_on(self, block: bytes) -> bytes:
        if self.failure is not None:
            return b""
        if (error := _ERROR.match(block)) and (failure := _giving_up(error[1])):
            self.failure = failure
            return b""
        if not self.has_finished and _FINISH.search(block):
            self.has_finished = True
        if b": tokens" not in block and b": kv_transfer_params " not in block:
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


class _WholeEvents:
    """Holds an event back until all of it is there."""

    def __init__(self) -> None:
        self._held = b""

    def take(self, chunk: bytes) -> bytes:
        data = self._held + chunk if self._held else chunk
        cut = _end_of_events(data)
        if not cut and len(data) > _MAX_HELD_BYTES:
            cut = len(data)  # whatever this is, it isn't held any longer
        self._held = data[cut:]
        return data[:cut]

    def rest(self) -> bytes:
        rest, self._held = self._held, b""
        return rest


def read_handle(value: bytes | Raw) -> dict[str, Raw]:
    """The members of ``kv_transfer_params``, as they came. Raises UpstreamError if it isn't an object."""
    try:
        return _handle.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UpstreamError(f"the prefill instance's kv_transfer_params aren't understood: {error}") from None


_handle = msgspec.json.Decoder(dict[str, Raw])


def _giving_up(told: bytes) -> ToldError | None:
    error = ToldError(told, "the instance gave the answer up")
    return error if error.is_kv_unavailable or error.is_preempted or error.is_leaving else None


def _end_of_events(data: bytes) -> int:
    """The length of the part of ``data`` that is whole events."""
    plain = data.rfind(_END)
    with_returns = data.rfind(_END_CRLF)
    return max(plain + len(_END) if plain >= 0 else 0, with_returns + len(_END_CRLF) if with_returns >= 0 else 0)


def error_body(error: ChiasmError) -> bytes:
    """An error as the OpenAI API shows it."""
    shown = {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": shown})
