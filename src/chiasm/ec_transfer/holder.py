"""The holder's side: keeps embeddings in memory, and tells readers of them on a thread of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import msgspec

from chiasm.ec_transfer.base import ECConnectorStats
from chiasm.ec_transfer.entry_file import HEADER_BYTES, EntryHeader, data_bytes, header_of
from chiasm.ec_transfer.entry_memory import clear_entry, write_entry
from chiasm.ec_transfer.extra_config import PeerConfig
from chiasm.ec_transfer.offers import NoRoom, OfferTable, TooManyWanted
from chiasm.ec_transfer.peer_messages import Bad, Done, Forget, Here, ReaderMessage, Take, Want, Welcome
from chiasm.errors import StorageError
from chiasm.transfer.arena import Arena, Piece
from chiasm.transfer.channel import Channel, ChannelClosed, ControlThread
from chiasm.transfer.greeting import Terms
from chiasm.transfer.listener import Listener
from chiasm.transfer.memory import OfferedMemory, Range
from chiasm.transfer.memory_file import FileDescription, find_lock
from chiasm.wire import ECPlace

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger(__name__)

GREETING_SECONDS = 5.0
FETCH_SECONDS = 3.0
"""So long after an embedding was made, or asked for again, a reader is expected to want it, if any does: readers are told of
their items at the moment at which the encoder gets them."""
MAX_READING_SECONDS = 60.0
"""How long a reader may keep what it was granted without saying anything."""
_DECODER: msgspec.msgpack.Decoder[ReaderMessage] = msgspec.msgpack.Decoder(ReaderMessage)


class Holder:
    """The embeddings that a producer offers. Listens from the start; raises ConfigurationError if it can't.

    ``publish``, ``has`` and ``remove`` may be called from any thread, as may the three parts of ``publish``, by which another
    process writes to the arena (``publishing.py``).
    """

    def __init__(
        self,
        address: PeerConfig,
        fingerprint: str,
        engine_id: str,
        terms: Terms,
        arena: Arena,
        memory: OfferedMemory,
        stats: ECConnectorStats,
        *,
        has_checksums: bool,
    ) -> None:
        """``memory`` is the arena's, as the data plane offers it."""
        self._fingerprint = fingerprint
        self._arena = arena
        self._memory = memory
        self._stats = stats
        self.has_checksums = has_checksums
        """Whether the headers of entries have checksums."""
        self._written = threading.Condition()  # guards the table and the stats
        self._table: OfferTable[Piece] = OfferTable(
            arena.num_bytes,
            arena.allocate,
            lambda piece: (piece.offset, piece.offset + piece.size_bytes),
            self._free,
            self._is_used,
        )
        self._channels: dict[int, Channel[ReaderMessage]] = {}
        self._patience: dict[int, asyncio.Timeout] = {}
        """What ends the connection of a reader that says nothing, if it was granted something."""
        self._claims: dict[tuple[int, str], int] = {}
        """The number of each grant."""
        self._claim_numbers = itertools.count(1)
        self._unfetched: OrderedDict[str, float] = OrderedDict()
        """Until when somebody is expected to want embeddings that nobody has fetched yet, the earliest first."""
        self._reading = asyncio.Event()
        """Set while somebody may be reading."""
        self._listener = Listener(
            address.host,
            address.port,
            engine_id,
            terms,
            memory,
            _DECODER,
            greeting_seconds=GREETING_SECONDS,
            option="--ec",
        )
        self.place = ECPlace(host=address.host, port=self._listener.port, engine_id=engine_id)
        self._control = ControlThread("ec-holder", self._run)

    @property
    def memory(self) -> FileDescription:
        """Where other processes of this host find the arena."""
        return self._arena.file.description

    @property
    def max_entry_bytes(self) -> int:
        """The largest embedding that fits."""
        return self._arena.num_bytes - HEADER_BYTES

    @property
    def free_bytes(self) -> int:
        """The room before any embedding has to go."""
        return self._arena.num_bytes - self._arena.used_bytes

    def num_unfetched(self) -> int:
        """Return how many embeddings readers have yet to fetch."""
        with self._written:
            self._expect_no_longer()
            return len(self._unfetched.keys() | self._table.claimed())

    def has(self, identifier: str) -> bool:
        """Return whether it is here; who asks has a reader that comes for it."""
        with self._written:
            is_here = self._table.has(identifier)
            if is_here:
                self._expect_fetch(identifier)
            return is_here

    def _expect_fetch(self, identifier: str) -> None:
        self._expect_no_longer()
        self._unfetched.pop(identifier, None)
        self._unfetched[identifier] = time.monotonic() + FETCH_SECONDS

    def _expect_no_longer(self) -> None:
        """Forget what nobody has come for in time: often nobody does, as when a language model has the embedding already."""
        now = time.monotonic()
        while self._unfetched and next(iter(self._unfetched.values())) < now:
            self._unfetched.popitem(last=False)

    def publish(self, identifier: str, tensor: torch.Tensor) -> None:
        """Copy an embedding into the arena, unless it is there, and tell the readers that want it.

        Raises StorageError if it can't be stored.
        """
        header = header_of(identifier, self._fingerprint, tensor)
        piece = self.reserve(header)
        if piece is None:
            return
        try:
            address = self._arena.file.address + piece.offset
            header = write_entry(address, header, tensor, with_checksum=self.has_checksums)
        except BaseException:
            self.abandon(header)
            raise
        self.complete(piece, header)

    def reserve(self, header: EntryHeader) -> Piece | None:
        """Return room for an entry with this header, which ``complete`` or ``abandon`` ends; None if the entry is there.

        Waits as long as another thread writes it. Raises StorageError if there is no room.
        """
        with self._written:
            while (reserved := self._reserve(header.identifier, HEADER_BYTES + header.data_bytes)) is None:
                if self._table.has(header.identifier):
                    return None
                self._written.wait()
            return reserved

    def abandon(self, header: EntryHeader) -> None:
        """An entry for which there is room is not written after all."""
        with self._written:
            self._table.abandon(header.identifier)
            self._written.notify_all()

    def complete(self, piece: Piece, header: EntryHeader) -> None:
        """An entry is written to its room, with this header. Tell the readers that want it."""
        piece.publish()
        with self._written:
            self._table.publish(header.identifier, header)
            self._expect_fetch(header.identifier)
            self._written.notify_all()
            self._stats.saves += 1
            self._stats.saved_bytes += header.data_bytes
            has_notices = self._table.has_notices
        if has_notices:
            self._control.call(self._tell)

    def remove(self, identifier: str) -> None:
        """Offer an embedding no more."""
        with self._written:
            self._table.remove(identifier)
            self._unfetched.pop(identifier, None)
        self._control.call(self._tell)

    def close(self) -> None:
        """Stop listening and end all connections. Called once."""
        self._arena.file.offer_no_more()  # before readers hear of the end
        self._control.close()
        self._memory.close()
        self._arena.close()

    def _reserve(self, identifier: str, size_bytes: int) -> Piece | None:
        try:
            if size_bytes > self._arena.num_bytes:  # and nothing is evicted for it
                raise NoRoom
            reserved = self._table.reserve(identifier, size_bytes)
        except NoRoom:
            raise StorageError(
                f"An embedding of {size_bytes} bytes finds no room among the {self._arena.num_bytes} bytes for embeddings, "
                "because the rest is too small or is being read; raise --ec-max-bytes."
            ) from None
        if reserved is None:
            return None
        self._stats.evictions += reserved.evictions
        self._stats.evicted_bytes += reserved.evicted_bytes
        return reserved.piece

    def _free(self, piece: Piece) -> None:
        clear_entry(self._arena.file.address + piece.offset)  # before anybody may use it again: see sources.py
        piece.release()

    def _is_used(self, piece: Piece) -> bool:
        """Return whether a reader uses the piece where it is."""
        return find_lock(self._arena.file.descriptor, piece.offset, piece.size_bytes) is not None

    # ---- the control thread -------------------------------------------------------------------------------------------

    async def _run(self, closing: asyncio.Event) -> None:
        await self._listener.run(closing, self._serve, self._leave, is_read=self._reading)

    async def _serve(self, reader: int, channel: Channel[ReaderMessage]) -> None:
        channel.send(Welcome(self._memory.describe(reader), self._arena.num_bytes))
        self._channels[reader] = channel
        while True:
            with self._written:
                is_reading = self._table.is_granted(reader)
            try:
                async with asyncio.timeout(MAX_READING_SECONDS if is_reading else None) as patience:
                    self._patience[reader] = patience
                    message = await channel.receive()
            except TimeoutError:
                raise ChannelClosed("it was granted an embedding, and said nothing for a minute") from None
            finally:
                self._patience.pop(reader, None)
            self._answer(reader, message)
            await asyncio.sleep(0)  # take turns: a message that is here already is received without waiting

    def _answer(self, reader: int, message: ReaderMessage) -> None:
        with self._written:
            if isinstance(message, Want):
                try:
                    self._table.want(reader, message.identifier, message.room_bytes)
                except TooManyWanted:
                    raise ChannelClosed("it wants more embeddings at once than it may") from None
            elif isinstance(message, Take):
                self._table.grant(reader, message.identifier)
            else:
                self._withdraw(reader, message.identifier)
                if isinstance(message, Done):
                    self._unfetched.pop(message.identifier, None)
                if isinstance(message, Bad):
                    _logger.warning("The embedding of item %s was rejected by a reader.", message.identifier)
                    self._stats.corrupt_entries += 1
                    self._table.disown(reader, message.identifier)
                else:
                    assert isinstance(message, Done | Forget)
                    self._table.forget(reader, message.identifier)
        self._tell()

    def _leave(self, reader: int) -> None:
        self._channels.pop(reader, None)
        self._claims = {key: claim for key, claim in self._claims.items() if key[0] != reader}
        with self._written:
            self._table.leave(reader)
        self._tell()

    def _tell(self) -> None:
        """Send what readers are to be told."""
        with self._written:
            notices = self._table.take_notices()
        for reader, message in notices:
            channel = self._channels.get(reader)
            if channel is None:
                continue
            if isinstance(message, Here) and message.granted:
                self._grant(reader, message)
            try:
                channel.send(message)
            except ChannelClosed:
                channel.close()  # its task ends, and it leaves
        if self._claims:
            self._reading.set()
        else:
            self._reading.clear()

    def _grant(self, reader: int, here: Here) -> None:
        if (reader, here.identifier) not in self._claims:
            claim = self._claims[reader, here.identifier] = next(self._claim_numbers)
            size = HEADER_BYTES + data_bytes(here.dtype, here.shape)
            self._memory.grant(reader, claim, [Range(here.offset, size)])
            patience = self._patience.get(reader)
            if patience is not None and patience.when() is None:  # it waits for what was just published
                patience.reschedule(asyncio.get_running_loop().time() + MAX_READING_SECONDS)

    def _withdraw(self, reader: int, identifier: str) -> None:
        claim = self._claims.pop((reader, identifier), None)
        if claim is not None:
            self._memory.withdraw(reader, claim)
