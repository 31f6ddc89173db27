"""The certificate of a server that speaks HTTPS, which may be renewed while it runs."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

from chiasm.errors import ConfigurationError
from chiasm.http.config import HttpConfig
from chiasm.http.watch import FileWatch

_logger = logging.getLogger(__name__)


class Certificate:
    """A certificate with its key, as TLS uses it for new connections."""

    def __init__(self, certificate: Path, key: Path | None) -> None:
        """Raises ConfigurationError if the files cannot be read, or don't belong together."""
        self._files = (certificate, key)
        self._watch = FileWatch([path for path in self._files if path is not None])
        self.context = self._read()

    async def follow(self) -> None:
        """Read the files again whenever they were replaced, until cancelled."""
        async for _ in self._watch.changes():
            await self.read_again()

    async def read_again(self) -> None:
        """Take what is in the files now. If they don't belong together, as in the middle of a renewal, nothing changes."""
        try:
            await asyncio.to_thread(self._read)
            self.context.load_cert_chain(*self._files, password=_no_password)
        except (ConfigurationError, OSError) as error:
            _logger.warning("the certificate stays as it is: %s", error)
        else:
            _logger.info("the certificate was read again")

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        certificate, key = self._files
        named = f"--ssl-certfile {certificate}" + (f", --ssl-keyfile {key}" if key is not None else "")
        try:
            context.load_cert_chain(certificate, key, password=_no_password)
        except ssl.SSLError as error:
            reason = (error.reason or str(error)).replace("_", " ").lower()
            raise ConfigurationError(
                f"{named}: this is no certificate in PEM with its key ({reason}); the key may be in either file."
            ) from None
        except OSError as error:
            raise ConfigurationError(f"{named} cannot be read: {error.strerror}.") from None
        return context


def certificate_of(config: HttpConfig) -> Certificate | None:
    """Return the certificate of a server; None if it speaks plain HTTP. Raises ConfigurationError."""
    return None if config.ssl_certfile is None else Certificate(config.ssl_certfile, config.ssl_keyfile)


def _no_password() -> str:
    raise ConfigurationError("--ssl-keyfile: the key is encrypted; give one that needs no password.")
