"""Ends with exit code 0 if the server of this container answers a path with 200, over HTTP or over HTTPS.

Call it as ``python3 healthcheck.py /livez [PORT]``.
"""

import http.client
import ssl
import sys

SECONDS = 4.0
"""For each of the two."""


def status_of(connection: http.client.HTTPConnection, path: str) -> int:
    """Return the status of the answer. Raises OSError and HTTPException if there is none."""
    connection.request("GET", path)
    return connection.getresponse().status


def main(path: str, port: int = 8000) -> int:
    """Return the exit code."""
    try:
        status = status_of(http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS), path)
    except (OSError, http.client.HTTPException):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is for the names that clients use
        try:
            status = status_of(http.client.HTTPSConnection("127.0.0.1", port, timeout=SECONDS, context=context), path)
        except (OSError, http.client.HTTPException) as error:
            print(f"No answer from port {port}: {error}")
            return 1
    print(f"{path}: status {status}")
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
