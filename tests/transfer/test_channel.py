"""Frames, whatever comes: messages arrive whole and in order, and anything else ends its connection and no other."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.transfer.channel import (
    MAX_FRAME_BYTES,
    MAX_UNSENT_BYTES,
    Channel,
    ChannelClosed,
    ControlThread,
    NotUnderstood,
)

from .holder import ECHO, PATIENCE_SECONDS, Echo


def frame(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return struct.pack(">I", len(body)) + body


def with_channel(test: Callable[[Channel[Echo], asyncio.StreamWriter], Awaitable[None]]) -> None:
    """Run ``test`` with a channel and the other end of its connection."""

    async def run() -> None:
        accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        server = await asyncio.start_server(lambda *streams: accepted.put_nowait(streams), "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            channel = Channel(reader, writer, ECHO)
            _, other = await accepted.get()
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await test(channel, other)
            finally:
                channel.close()
                other.transport.abort()

    asyncio.run(run())


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text(max_size=300), min_size=1, max_size=5), data=st.data())
def test_messages_arrive_however_their_bytes_are_torn(texts: list[str], data: st.DataObject) -> None:
    stream = b"".join(frame(Echo(text)) for text in texts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=6)))

    async def test(channel: Channel[Echo], other: asyncio.StreamWriter) -> None:
        for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            other.write(stream[begin:end])
            await other.drain()
            await asyncio.sleep(0)
        for text in texts:
            assert await channel.receive() == Echo(text)

    with_channel(test)


@settings(max_examples=60, deadline=None)
@given(body=st.binary(max_size=200) | st.binary(max_size=40).map(lambda body: b"\x82\xa4type\xa4echo\xa4text" + body))
def test_what_is_no_message_is_not_understood(body: bytes) -> None:
    try:
        expected = ECHO.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        expected = None

    async def test(channel: Channel[Echo], other: asyncio.StreamWriter) -> None:
        other.write(struct.pack(">I", len(body)) + body)
        if expected is not None:
            assert await channel.receive() == expected
            return
        with pytest.raises(NotUnderstood, match="does not speak the control protocol"):
            await channel.receive()

    with_channel(test)


@settings(max_examples=20, deadline=None)
@given(length=st.integers(MAX_FRAME_BYTES + 1, (1 << 32) - 1))
def test_a_frame_that_claims_too_much_is_refused_before_it_comes(length: int) -> None:
    async def test(channel: Channel[Echo], other: asyncio.StreamWriter) -> None:
        other.write(struct.pack(">I", length))
        with pytest.raises(NotUnderstood, match=f"a message of {length} bytes"):
            await channel.receive()

    with_channel(test)


@pytest.mark.parametrize("value", [1 << 63, (1 << 64) - 1, -1])
def test_a_number_where_a_text_belongs_is_not_understood(value: int) -> None:
    body = msgspec.msgpack.encode({"type": "echo", "text": value})

    async def test(channel: Channel[Echo], other: asyncio.StreamWriter) -> None:
        other.write(struct.pack(">I", len(body)) + body)
        with pytest.raises(NotUnderstood):
            await channel.receive()

    with_channel(test)


@settings(max_examples=20, deadline=None)
@given(text=st.text(min_size=1, max_size=100), data=st.data())
def test_a_torn_frame_at_the_end_is_the_end_of_the_connection(text: str, data: st.DataObject) -> None:
    stream = frame(Echo(text))
    end = data.draw(st.integers(0, len(stream) - 1))

    async def test(channel: Channel[Echo], other: asyncio.StreamWriter) -> None:
        other.write(stream[:end])
        other.write_eof()
        with pytest.raises(ChannelClosed, match="the connection was closed"):
            await channel.receive()

    with_channel(test)


def test_a_message_that_is_too_long_is_not_sent() -> None:
    async def test(channel: Channel[Echo], other: asyncio.StreamWriter) -> None:
        with pytest.raises(ValueError, match="longer than the 1048576 that are allowed"):
            channel.send(Echo("x" * MAX_FRAME_BYTES))

    with_channel(test)


def test_what_waits_for_a_side_that_does_not_read_is_bounded() -> None:
    async def test(channel: Channel[Echo], other: asyncio.StreamWriter) -> None:
        other.transport.pause_reading()  # type: ignore[attr-defined]
        sent = 0

        def flood() -> None:
            nonlocal sent
            while True:
                channel.send(Echo("x" * 100_000))
                sent += 100_000

        with pytest.raises(ChannelClosed, match="does not read what it is sent"):
            flood()
        assert sent >= MAX_UNSENT_BYTES

    with_channel(test)


def test_nothing_is_sent_after_the_end() -> None:
    async def test(channel: Channel[Echo], other: asyncio.StreamWriter) -> None:
        channel.close()
        with pytest.raises(ChannelClosed, match="was closed"):
            channel.send(Echo())

    with_channel(test)


def test_a_control_thread_runs_calls_in_order_and_ends_when_it_is_closed() -> None:
    called: list[int] = []

    async def main(closing: asyncio.Event) -> None:
        await closing.wait()

    control = ControlThread("test-control", main)
    for number in range(100):
        control.call(called.append, number)
    control.close()
    control.close()
    control.call(called.append, 100)
    assert called == list(range(100))
