"""The certificate of a server that speaks HTTPS, which may be renewed while it runs."""

from __future__ import annotations

import ssl
from pathlib import Path

from chiasm.errors import ConfigurationError, UnreadableError
from chiasm.http.config import HttpConfig
from chiasm.http.watch import Replaceable


class Certificate(Replaceable[ssl.SSLContext]):
    """A certificate with its key, as TLS uses it for new connections. In the middle of a renewal its files don't fit."""

    kept = "the certificate stays as it is"

    def __init__(self, certificate: Path, key: Path | None) -> None:
        """Raises ConfigurationError if the files cannot be read, or don't belong together."""
        super().__init__([path for path in (certificate, key) if path is not None])
        self._files = (certificate, key)
        self.context = self._read()

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
            raise UnreadableError(f"{named} cannot be read: {error.strerror}.") from None
        return context

    def _take(self, read: ssl.SSLContext) -> str:
        """Change the context that the server has; ``read`` showed that it can be."""
        self.context.load_cert_chain(*self._files, password=_no_password)
        return "the certificate was read again"


def certificate_of(config: HttpConfig) -> Certificate | None:
    """Return the certificate of a server; None if it speaks plain HTTP. Raises ConfigurationError."""
    return None if config.ssl_certfile is None else Certificate(config.ssl_certfile, config.ssl_keyfile)


def _no_password() -> str:
    raise ConfigurationError("--ssl-keyfile: the key is encrypted; give one that needs no password.")
