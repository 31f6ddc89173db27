"""Takes connections whose first words are a handshake of TLS, which count and make way like all others from the beginning.

asyncio's own server tells nobody of a connection before its handshake is over, so silent ones would be bounded by nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Hashable

from chiasm.http.connections import Connections, peer_of
from chiasm.http.limits import Limit

_logger = logging.getLogger(__name__)
_PAUSE_SECONDS = 1.0
"""After the system gave no descriptor for a connection."""


class Handshake:
    """A connection whose handshake is under way: the place that its :class:`chiasm.http.connection.Connection` will have."""

    is_sending = False

    def __init__(self, connection: socket.socket, peer: Hashable) -> None:
        self._socket = connection
        self.peer = peer

    def close(self) -> None:
        """End the connection; the handshake fails then."""
        with contextlib.suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def refuse(self, limit: Limit) -> None:
        """Do the same: nothing can be said before the handshake is over."""
        self.close()


class TlsListener:
    """A listening socket whose clients speak TLS; for uvicorn it is a server of asyncio's. Made on the server's event loop."""

    def __init__(
        self,
        listener: socket.socket,
        connections: Connections,
        context: ssl.SSLContext,
        make: Callable[[Handshake], asyncio.Protocol],
    ) -> None:
        """``make`` returns the protocol of a connection, which takes over the place of the handshake when it is made."""
        listener.setblocking(False)
        self.sockets = (listener,)
        self._connections = connections
        self._context = context
        self._make = make
        self._handshakes: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept(listener))

    def close(self) -> None:
        """Take no more connections, and end handshakes."""
        self._accepting.cancel()
        for task in self._handshakes:
            task.cancel()

    async def wait_closed(self) -> None:
        """Return when nothing is under way any more."""
        await asyncio.gather(self._accepting, *self._handshakes, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        try:
            while True:
                try:
                    connection, address = await asyncio.get_running_loop().sock_accept(listener)
                except ConnectionError:  # it was gone before it was taken
                    continue
                except OSError as error:
                    _logger.warning("No connection can be taken: %s.", error.strerror)
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                self._begin(connection, peer_of(address[0]))
        finally:
            listener.close()

    def _begin(self, connection: socket.socket, peer: Hashable) -> None:
        handshake = Handshake(connection, peer)
        if (limit := self._connections.admit(handshake)) is not None:
            self._connections.refusals.note(limit)
            connection.close()
            return
        task = asyncio.create_task(self._shake_hands(connection, handshake))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _shake_hands(self, connection: socket.socket, handshake: Handshake) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self._make(handshake),
                connection,
                ssl=self._context,
                ssl_handshake_timeout=self._connections.config.header_timeout_seconds,
            )
        except (OSError, ssl.SSLError):  # a TimeoutError is an OSError
            connection.close()
        finally:
            self._connections.leave(handshake)
