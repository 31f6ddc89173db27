"""What a request carries on its way through the proxy, and how its response goes back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from chiasm.http import Exchange
from chiasm.http.events import CONTENT_TYPE, EventSplitter, comment
from chiasm.http.timing import TimingEntry, write_timing
from chiasm.proxy.instance import Instance
from chiasm.proxy.media import Item, embeds_part
from chiasm.proxy.prompts import Work
from chiasm.proxy.records.trail import Trail
from chiasm.proxy.relay import EventRelay
from chiasm.proxy.request import Request
from chiasm.proxy.upstream import Call, InstanceLostError, UpstreamResponse
from chiasm.wire import CLIENT_HEADER, TIMING_COMMENT, ECPlace

_TO_CLIENT = ("retry-after", "x-should-retry", "www-authenticate", "metadata")
"""The last one is of vLLM's /pooling, for embeddings in bytes."""
_BEFORE_DEADLINE_SECONDS = 0.1
_T = TypeVar("_T")


@dataclass
class Timing:
    """Where the time of one request went, in seconds; None while unknown. The fields' names are those in ``Server-Timing``."""

    fetch: float | None = None
    """Fetching images over the network."""
    encode: float | None = None
    """What the slowest encoder reports of its own work."""
    encode_call: float | None = None
    """Time until the last encoder answered."""
    prefill_call: float | None = None
    """Time until prefill answered."""
    handover: float | None = None
    """Time from the last byte of prefill to the head of decode, which in a stream comes with its first token."""
    proxy: float | None = None
    """The proxy's own work before it called an instance, without ``fetch``."""
    estimate: float | None = None
    """Time to the first token, as estimated when the language instance was chosen."""
    placement: str = ""
    """That instance: its role and number."""

    def header(self, upstream: str = "") -> tuple[str, str]:
        """Return the header: the proxy's entries, then those of the instance, whose header is ``upstream``."""
        own = write_timing(self._entries())
        return "server-timing", f"{own}, {upstream}" if own and upstream else own or upstream

    def comment(self) -> bytes:
        """Return the proxy's entries as a comment in a stream."""
        return comment(TIMING_COMMENT, write_timing(self._entries()))

    def durations(self) -> dict[str, float]:
        """Return what is known, in seconds by name."""
        return {name: seconds for name, seconds in vars(self).items() if seconds is not None and name != "placement"}

    def _entries(self) -> list[TimingEntry]:
        entries = [TimingEntry(name, seconds) for name, seconds in self.durations().items()]
        return [*entries, TimingEntry("placement", description=self.placement)] if self.placement else entries


class Original(NamedTuple):
    """A request as the client sent it, and its images."""

    request: Request
    items: Sequence[Item]
    missing: Sequence[Item | None]
    """The images to put into the body for an instance that encodes itself, as ``data:`` URLs, so that it doesn't fetch.

    None for one that the body has.
    """

    async def whole_body(self) -> bytes:
        """Return the body for an instance that encodes itself."""
        if not any(self.missing):
            return await self.request.whole_body()
        return await self.request.with_parts_replaced([one.image_url_part() if one else None for one in self.missing])


class Job:
    """One request on its way through the proxy. Compared by identity."""

    def __init__(self, exchange: Exchange, path: str, request: Request, timing: Timing, trail: Trail) -> None:
        self.exchange = exchange
        self.path = path
        self.request = request
        self.timing = timing
        self.trail = trail
        self.client = ""
        """Names the client's API key, so that instances let keys take turns; empty if the proxy checks none."""
        self.work = Work(exchange.arrival, len(request.body), streams=request.stream)
        """What the request asks for, as placement sees it."""
        self.due = exchange.arrival
        """When its images are due, on the clock of ``time.monotonic``."""
        self._instance: Instance | None = None
        self.published_at: Mapping[str, float] = {}
        """When each embedding was there, by identifier; until all are, only of those that the shared cache had. On the clock of
        ``time.monotonic``."""
        self.places: dict[str, ECPlace | None] = {}
        """Where each embedding is or will be, by identifier, if it must be told to the instance; None for the shared cache."""
        self.encoding: asyncio.Future[None] | None = None
        """Has its images encoded, and again if embeddings are lost before the instance has read them. None if it has no images,
        or has them encoded where the text goes."""
        self.embeddings_are_read = False
        """Whether the answer has begun: the instance has all embeddings."""
        self.fails_with_encoding = True
        """Whether an image that can't be encoded ends it. An embedding that is awaited and lost for good does in any case."""
        self.original: Original | None = None
        """Kept until the answer begins if an instance could still have to give it that gets another body: one that encodes
        itself, or one that doesn't."""
        self.identifiers: Sequence[str] = ()
        """Identifiers of the images that ``encoding`` is about, in the order in which they occur."""
        self._details = exchange.visit.details
        self._trace_headers = {} if trail.trace is None else trail.trace.headers()
        self._encoder_calls = 0
        self._giving_up: asyncio.Future[InstanceLostError] | None = None
        """Done when the call of the language instance that is under way is to end with this error."""

    @cached_property
    def metadata(self) -> asyncio.Future[dict[str, bytes]]:
        """The encoders' metadata (JSON) by identifier, when all embeddings have been published."""
        return asyncio.get_running_loop().create_future()

    @cached_property
    def news_of_embeddings(self) -> asyncio.Event:
        """Set when they are read, when the instance has said that it lacks some, and when another one takes its place."""
        return asyncio.Event()

    @cached_property
    def _relay(self) -> EventRelay:
        return EventRelay(self.timing.comment if self.exchange.timing_comments else lambda: b"")

    @property
    def instance(self) -> Instance | None:
        """The language instance that needs its embeddings; None if it isn't chosen before they are encoded."""
        return self._instance

    @instance.setter
    def instance(self, instance: Instance) -> None:
        if self._instance is not None and instance is not self._instance:
            self.news_of_embeddings.set()  # the other one may lack them
        self._instance = instance

    @property
    def seconds_to_wait(self) -> float:
        """How long it may wait for room: until shortly before its deadline, to say then what it has waited for."""
        return max(0.0, self.exchange.seconds_left - _BEFORE_DEADLINE_SECONDS)

    def note_instance(self, instance: Instance) -> None:
        """Note for the log that an instance has worked for it: by its address."""
        called: list[str] = self._details.setdefault("instances", [])  # type: ignore[assignment]
        if instance.address not in called:
            called.append(instance.address)

    def note_model(self, model: str) -> None:
        """Note for the log which model is asked, which is known to be served, and how many images the request has."""
        self._details["model"] = model
        if self.request.media:
            self._details["images"] = len(self.request.media)

    @property
    def sharers(self) -> str:
        """Tells with whose requests it may wait for the same encoding: everybody's if the proxy has checked its key.

        Otherwise those of the same ``Authorization``, which may be wrong where encoders check it.
        """
        return "" if self.client else self.exchange.headers.get("authorization", "")

    # ---- to instances --------------------------------------------------------------------------------------------------

    async def body_for(self, instance: Instance) -> bytes:
        """Return the body for a language instance; for one that can't size images itself, once the encoders have answered."""
        if self.encoding is None or instance.health is None or instance.health.takes_image_size:
            return self.request.body
        metadata = await asyncio.shield(self.metadata)
        return await self.request.with_parts_replaced([embeds_part(name, metadata[name]) for name in self.identifiers])

    def headers(self) -> dict[str, str]:
        """Return the headers of one call; each call has its own, since the time left shrinks."""
        authorization = self.exchange.headers.get("authorization")
        return {
            **({} if authorization is None else {"authorization": authorization}),
            **self._trace_headers,
            **({CLIENT_HEADER: self.client} if self.client else {}),
            "X-Request-Id": self.exchange.request_id,
            "X-Timing-Comments": "on" if self.exchange.timing_comments else "off",
            "X-Request-Deadline-Ms": str(int(self.exchange.seconds_left * 1000)),
        }

    def headers_for_encoder(self, seconds: float) -> dict[str, str]:
        """The same with a request id for each call, since an encoder may get several at a time.

        A call has ``seconds`` until its own deadline: requests whose deadlines are later may wait for its images too.
        """
        self._encoder_calls += 1
        return {
            **self.headers(),
            "X-Request-Id": f"{self.exchange.request_id}-e{self._encoder_calls}",
            "X-Request-Deadline-Ms": str(int(seconds * 1000)),
        }

    # ---- encoding ------------------------------------------------------------------------------------------------------

    @property
    def is_encoded(self) -> bool:
        """Whether all embeddings have been published, or nothing has to be encoded."""
        return self.encoding is None or self.metadata.done()

    def note_embeddings_read(self, *, keep_bytes: int = 0) -> None:
        """Note that the answer has begun, and free what was kept in case embeddings would be lost before.

        ``keep_bytes`` are still held afterwards.
        """
        self.embeddings_are_read = True
        self.news_of_embeddings.set()
        self.original = None
        if self.encoding is None or self.is_encoded:
            self.exchange.release(keep_bytes=keep_bytes)
        else:  # encoders publish again what the instance had, and until then their calls need the images
            self.encoding.add_done_callback(lambda done: self.exchange.release(keep_bytes=keep_bytes))

    async def unless_encoding_fails(self, work: Awaitable[_T]) -> _T:
        """Return what ``work`` gives; if encoding fails first, cancel it and raise the encoders' error.

        Once the answer has begun, nothing needs the encoders any more, so their errors end nothing.
        """
        encoding = self.encoding
        if encoding is None or self.embeddings_are_read or (encoding.done() and encoding.exception() is None):
            return await work
        task = asyncio.ensure_future(work)
        giving_up = self._giving_up = asyncio.get_running_loop().create_future()
        try:
            while not task.done():
                if encoding.done():
                    if self.fails_with_encoding or self.is_encoded:
                        encoding.result()
                    return await task
                if giving_up.done():
                    raise giving_up.result()
                await asyncio.wait((task, encoding, giving_up), return_when=asyncio.FIRST_COMPLETED)
            return task.result()
        finally:
            self._giving_up = None
            await _end(task)

    def give_up_instance(self, error: InstanceLostError) -> bool:
        """End what waits for the language instance as if it was lost; return False if nothing does."""
        if self._giving_up is None or self._giving_up.done():
            return False
        self._giving_up.set_result(error)
        return True

    def chunks_unless_encoding_fails(self, call: Call) -> Callable[[], Awaitable[bytes]]:
        """Return what gives the next chunk of a stream; it raises the encoders' error if encoding fails first."""
        if self.encoding is None:
            return call.chunk

        async def chunk() -> bytes:
            return await self.unless_encoding_fails(call.chunk())

        return chunk

    async def open_unless_encoding_fails(self, opening: Coroutine[Any, Any, Call]) -> Call:
        """Like :meth:`unless_encoding_fails` for a call, which is closed if it comes too late."""
        if self.encoding is None:
            return await opening
        task = asyncio.ensure_future(opening)
        try:
            return await self.unless_encoding_fails(task)
        except BaseException:
            if call := await _end(task):
                call.close()
            raise

    def is_error_of_encoders(self, error: Exception) -> bool:
        """Whether encoding failed with this error."""
        return self.encoding is not None and self.encoding.done() and self.encoding.exception() is error

    async def end_encoding(self) -> None:
        """Cancel what encoders still do for the request, and let go of it: what was cancelled holds its images and the job."""
        encoding, self.encoding = self.encoding, None
        if encoding is not None:
            await _end(encoding)

    async def return_to_original(self, *, keep: bool = False) -> None:
        """Make it a request that needs no encoder, if it has images; ``keep`` the original, for one that does."""
        if self.original is not None:
            self.request.body = await self.original.whole_body()
        if not keep:
            self.original = None
        self.encoding = None
        self.identifiers = ()

    # ---- to the client -------------------------------------------------------------------------------------------------

    async def send_response(self, response: UpstreamResponse) -> None:
        """Send an instance's whole response as it is."""
        if response.status == 200:
            self.note_embeddings_read()
        given = response.headers
        headers = [(name, given[name]) for name in _TO_CLIENT if name in given]
        if response.status == 503 and "retry-after" not in given:
            headers.append(("retry-after", "1"))
        await self.exchange.reply(
            response.body,
            status=response.status,
            content_type=given.get("content-type", "application/json"),
            headers=[*headers, self.timing.header(given.get("server-timing", ""))],
        )

    async def send_stream_as_it_is(self, call: Call, first: bytes, next_chunk: Callable[[], Awaitable[bytes]]) -> None:
        """Pass on a stream that begins with ``first``, in whole events, and add nothing to it."""
        splitter = EventSplitter()
        await self._start_events(call)
        chunk = first
        while chunk:
            await self.exchange.write(splitter.take(chunk))
            chunk = await next_chunk()
        await self.exchange.end_events(splitter.rest())

    async def send_events(self, chunk: bytes, call: Call) -> None:
        """Pass on a chunk of a stream; if the stream hasn't begun, begin it with the instance's headers."""
        if not self.exchange.has_begun:
            await self._start_events(call)
        await self.exchange.write(self._relay.pass_on(chunk))

    async def _start_events(self, call: Call) -> None:
        given = call.headers
        timing = self.timing.header(given.get("server-timing", ""))
        await self.exchange.start_events([timing], content_type=given.get("content-type", CONTENT_TYPE))

    async def end_events(self) -> None:
        """End the stream, whose instance has ended it properly."""
        await self.exchange.end_events(self._relay.finish())

    async def send_stream(self, call: Call, first: bytes, next_chunk: Callable[[], Awaitable[bytes]]) -> None:
        """Pass on a whole stream that begins with ``first``."""
        await self.send_events(first, call)
        write, pass_on = self.exchange.write, self._relay.pass_on
        while chunk := await next_chunk():
            await write(pass_on(chunk))
        await self.end_events()


async def _end(task: asyncio.Future[_T]) -> _T | None:
    """Cancel a task unless it is done; return its result, or None if there is none. Never raises its exception."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    return None if task.cancelled() or task.exception() else task.result()
