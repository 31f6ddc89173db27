"""Long ``data:`` URLs, and long members named ``data``, lifted out of a JSON body before it is decoded.

Both are where images stand, the latter in the API of messages. Nearly all of a large body are images in base64. A decoder would
walk over each several times, and hold the interpreter meanwhile. So they are cut out first, in small steps, and the body that
is decoded has a short stand-in for each.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from chiasm.http.json_size import check_text_size

_T = TypeVar("_T")
_LONG_BYTES = 4096
_MAX_STRINGS = 1 << 14
"""So many of these strings are looked at, long or not."""
_STEP_BYTES = 1 << 20
"""What is searched at once: under a millisecond, after which other threads may run."""
_ESCAPES_STEP_BYTES = 1 << 18
"""The same where escapes are read or written, which may be all of it."""
_BEGIN = b'"data'
_STRING = re.compile(rb'"(?:(?=data:)|data"[ \t\r\n]{0,16}:[ \t\r\n]{0,16}")')
"""Up to the first character of the string."""
_QUOTE = b'"'
_STAND_IN = re.compile(rb"data:lifted-[0-9a-f]{16}-[0-9]+\.")
"""What a stand-in looks like; which ones are, only the body that was lifted knows."""
_CONTROLS = (b"\n", b"\r", b"\t", b"\f")
"""What base64 may have between its characters, but JSON may not."""
_ESCAPES = (
    *((b"\n", b"\\n"), (b"\r", b"\\r")),
    *((b"/", b"\\/"), (b"/", b"\\u002f"), (b"/", b"\\u002F")),
    *((b"+", b"\\u002b"), (b"+", b"\\u002B"), (b"=", b"\\u003d"), (b"=", b"\\u003D")),
)
"""How libraries for JSON write the ends of lines, which many encoders put after 76 characters, and unless they are told
otherwise characters of base64, each of them always in one way: PHP's slashes, the signs of .NET, of Java's Gson."""
_LONGEST_ESCAPE = 6


class Lifted(NamedTuple):
    """A body, and what was lifted out of it."""

    body: bytes
    """The body with stand-ins, or all of it if it has no long URL."""
    urls: Mapping[bytes, bytes] = MappingProxyType({})
    """What was lifted out, URLs or base64, by the stand-ins; both without quotes and escapes."""
    escapes: Mapping[bytes, Sequence[tuple[bytes, bytes]]] = MappingProxyType({})
    """Characters that the body had escaped throughout, with their escapes, by the stand-ins."""

    def restored(self, text: bytes, stand_ins: Collection[bytes] | None = None) -> bytes:
        """Return a body with URLs in place of these stand-ins (None: of all). Copying lets other threads run."""
        wanted = self.urls if stand_ins is None else stand_ins
        if not wanted:
            return text
        pieces: list[bytes] = []
        at = 0
        for found in _STAND_IN.finditer(text):
            if found[0] in wanted:
                pieces += (text[at : found.start()], *self._written(found[0]))
                at = found.end()
        return b"".join([*pieces, text[at:]])

    def only(self, stand_ins: Collection[bytes]) -> Lifted:
        """Return the body with these stand-ins, and with the other URLs back in it."""
        kept = {name: url for name, url in self.urls.items() if name in stand_ins}
        body = self.restored(self.body, self.urls.keys() - kept.keys())
        return Lifted(body, kept, {name: found for name, found in self.escapes.items() if name in kept})

    def _written(self, stand_in: bytes) -> Iterator[bytes]:
        """Yield what was lifted out, in pieces, as the body had it."""
        url, escapes = self.urls[stand_in], self.escapes.get(stand_in)
        if not escapes:
            yield url
            return
        for at in range(0, len(url), _ESCAPES_STEP_BYTES):
            step = url[at : at + _ESCAPES_STEP_BYTES]
            for character, escape in escapes:
                step = step.replace(character, escape)
            yield step


NOTHING_LIFTED = Lifted(b"")


def lift(body: bytes) -> Lifted:
    """Lift all strings out of a body that are long, begin with ``data:`` or are a member of this name, and have no escapes, or
    only usual ones of base64.

    A stand-in is a string as well, which no client can guess, so that the body is as valid JSON with it as with the URL, also
    where ``"data:`` doesn't begin a string.
    """
    if len(body) < _LONG_BYTES:
        return Lifted(body)
    secret = secrets.token_hex(8).encode()
    urls: dict[bytes, bytes] = {}
    escapes: dict[bytes, Sequence[tuple[bytes, bytes]]] = {}
    pieces: list[bytes] = []
    kept_from = 0
    for start, end in _long_strings(body):
        found = _read(body, start, end)
        if found is None:
            continue
        stand_in = b"data:lifted-%b-%d." % (secret, len(urls))
        urls[stand_in] = found.text
        if found.escapes:
            escapes[stand_in] = found.escapes
        pieces += (body[kept_from:start], stand_in)
        kept_from = end
    if not urls:
        return Lifted(body)
    return Lifted(b"".join([*pieces, body[kept_from:]]), urls, escapes)


class _Found(NamedTuple):
    text: bytes
    escapes: Sequence[tuple[bytes, bytes]]
    """Characters that were escaped throughout, with their escapes."""


def _read(body: bytes, start: int, end: int) -> _Found | None:
    """Return what a string says, without its quotes; None if it has other escapes, or a character not always in one way."""
    steps: list[bytes] = []
    counts: Counter[tuple[bytes, bytes]] = Counter()
    while start < end:
        stop = min(start + _ESCAPES_STEP_BYTES, end)
        if stop < end:  # an escape is not cut in two
            escape = body.rfind(b"\\", stop - _LONGEST_ESCAPE + 1, stop)
            stop = escape if escape > start else stop
        step = body[start:stop]
        if not step.isascii() or any(sign in step for sign in _CONTROLS):
            return None
        for one in _ESCAPES:
            if b"\\" not in step:
                break
            counts[one] += step.count(one[1])
            step = step.replace(one[1], one[0])
        if b"\\" in step:
            return None
        steps.append(step)
        start = stop
    escapes = [one for one, count in counts.items() if count]
    if any(sum(step.count(character) for step in steps) != counts[character, escape] for character, escape in escapes):
        return None
    return _Found(b"".join(steps), escapes)


def read_lifted(
    body: bytes, max_text_bytes: int, read: Callable[[bytes], _T], images_of: Callable[[_T], Iterable[bytes]]
) -> tuple[_T, Lifted]:
    """Return what ``read`` makes of a body without the long URLs of its images, which ``images_of`` lists.

    What was lifted from elsewhere, such as a text that begins with ``data:``, goes back into the body. Raises
    PayloadTooLargeError if what is left is more than ``max_text_bytes``, and what ``read`` raises.
    """
    lifted = lift(body)
    check_text_size(lifted.body, max_text_bytes)
    result = read(lifted.body)
    if lifted.urls:
        of_images = lifted.urls.keys() & set(images_of(result))
        if len(of_images) < len(lifted.urls):
            lifted = lifted.only(of_images)
            check_text_size(lifted.body, max_text_bytes)
            result = read(lifted.body)
    return result, lifted


def _long_strings(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield where long strings begin and end that may be images, without their quotes."""
    at = 0
    for _ in range(_MAX_STRINGS):
        quote = _find(body, _BEGIN, at)
        if quote < 0:
            return
        opened = _STRING.match(body, quote)
        start = opened.end() if opened else quote + 1
        end = _find(body, _QUOTE, start)
        if end < 0:
            return
        if opened and end - start >= _LONG_BYTES:
            yield start, end
        at = end + 1 if opened else start


def _find(body: bytes, what: bytes, start: int) -> int:
    """Do what ``bytes.find`` does, in steps."""
    while start < len(body):
        found = body.find(what, start, start + _STEP_BYTES + len(what) - 1)
        if found >= 0:
            return found
        start += _STEP_BYTES
    return -1
