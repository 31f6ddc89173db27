"""HTTP as every server of chiasm speaks it: the proxy, the instances, the vLLM middleware, the launcher.

A request passes the files in this order: ``listen`` (the port), ``serve`` (the process and its signals) with ``config``,
``descriptors`` and ``shutdown`` (its end), ``connections`` (all of them), ``connection`` (one) and ``http1`` (its bytes),
``front`` (what holds for all paths, with ``visit``, ``fields``, ``paths``, ``origins``, ``keys``, ``log``, ``log_format`` and
``flood``), ``endpoint`` (the life of one request), ``admission`` (bounds on all requests together), ``exchange`` (its body in,
its answer out), ``body`` and ``encoding`` (reading the body), ``untrusted`` with ``json_size`` and ``lifted`` (limits of what
clients send), ``events`` (a stream), ``errors`` and ``timing`` (what an answer carries besides its content). ``limits`` names
what may be refused on the way.

``key_rules`` says what a key must be like, ``key_file`` what a file of API keys holds, ``key_ring`` whose keys they are,
``admin`` who is the operator, ``neighbours`` who is of this machine, and ``fleet_calls`` who is of the fleet. ``tls`` has the
certificate and ``tls_listener`` the handshakes, ``watch`` notices files that were replaced, ``liveness`` answers supervisors.
For calls of other servers, ``client`` keeps connections, ``client_connection`` is one of them, ``lookup`` finds addresses of
names, ``trust`` says whose certificates are believed, ``answer`` reads what they answer, and ``vanished`` breaks connections to
hosts that are gone.

Nothing here knows engines or instances: what an answer contains comes from a handler.
"""

from typing import TYPE_CHECKING

from chiasm.lazy import names_from

if TYPE_CHECKING:
    from chiasm.http.admission import Admission
    from chiasm.http.body import ClientLeftError, json_response, read_body
    from chiasm.http.endpoint import Endpoint
    from chiasm.http.exchange import Exchange

__all__ = ["Admission", "ClientLeftError", "Endpoint", "Exchange", "json_response", "read_body"]
__getattr__ = names_from(
    __name__,
    {
        "Admission": "admission",
        "ClientLeftError": "body",
        "Endpoint": "endpoint",
        "Exchange": "exchange",
        "json_response": "body",
        "read_body": "body",
    },
)
