"""Which certificates of other servers are believed."""

from __future__ import annotations

import ssl
import time

_KEPT_SECONDS = 10.0
"""Authorities that were read so lately aren't read again; that takes tens of milliseconds."""


class Trust:
    """The authorities of the system, or those of the file in ``SSL_CERT_FILE``, which may be replaced while they are used."""

    def __init__(self) -> None:
        self._context: ssl.SSLContext | None = None
        self._read_at = 0.0

    @property
    def context(self) -> ssl.SSLContext:
        """What checks certificates in new connections."""
        if self._context is None:
            self._context = ssl.create_default_context()
            self._context.set_alpn_protocols(["http/1.1"])
            self._read_at = time.monotonic()
        return self._context

    def note(self, error: BaseException) -> None:
        """Take why a connection failed: if no authority had signed the certificate, they are read again for the next one."""
        if isinstance(error, ssl.SSLCertVerificationError) and time.monotonic() - self._read_at > _KEPT_SECONDS:
            self._context = None
