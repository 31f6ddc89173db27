"""The addresses that media may be fetched from: public ones, and those that the operator allows."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_IPV4_COMPATIBLE = ipaddress.IPv6Network("::/96")
_NEVER_PUBLIC = (
    ipaddress.IPv4Network("168.63.129.16/32"),  # services of a cloud provider, at an address in the public range
    ipaddress.IPv4Network("192.0.0.0/24"),
    ipaddress.IPv4Network("192.88.99.0/24"),
    ipaddress.IPv6Network("fec0::/10"),
)


class RefusedAddressError(OSError):
    """Raised for an address that media must not be fetched from. It is an OSError, like other errors of sockets."""

    def __init__(self) -> None:
        super().__init__("The address is not public.")


class AddressGuard:
    """Decides which addresses may be contacted, and opens sockets only for those.

    ``allowed_networks`` are allowed although they are not public.
    """

    def __init__(self, allowed_networks: Iterable[str] = ()) -> None:
        self._allowed: list[Network] = [ipaddress.ip_network(network) for network in allowed_networks]

    def permits(self, address: str) -> bool:
        """Whether ``address`` is a numeric address that is public or in an allowed network."""
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        # Some IPv6 addresses lead to an IPv4 address that they embed, so both must be allowed.
        return all(self._permits(one) for one in (parsed, *_embedded(parsed)))

    def _permits(self, address: Address) -> bool:
        if any(address.version == network.version and address in network for network in self._allowed):
            return True
        if any(address.version == network.version and address in network for network in _NEVER_PUBLIC):
            return False
        if isinstance(address, ipaddress.IPv6Address) and (address.ipv4_mapped or address in _NAT64):
            return True  # the embedded address decides
        return address.is_global and not address.is_multicast and not address.is_reserved

    def open_socket(self, address_info: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
        """Open a socket for one entry of ``getaddrinfo``. Raises RefusedAddressError.

        Every connection is made through this method, right before it connects.
        """
        family, kind, protocol, _, address = address_info
        if not self.permits(str(address[0])):
            raise RefusedAddressError
        return socket.socket(family=family, type=kind, proto=protocol)


def _embedded(address: Address) -> list[ipaddress.IPv4Address]:
    """Return the IPv4 addresses that an IPv6 address leads to."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address.sixtofour is not None:
        return [address.sixtofour]
    if address.teredo is not None:
        return list(address.teredo)
    if address in _NAT64 or address in _IPV4_COMPATIBLE:
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    return []
