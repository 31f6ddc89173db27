"""Which addresses media may be fetched from: public ones, and those that the operator allows."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_IPV4_COMPATIBLE = ipaddress.IPv6Network("::/96")
_NEVER_PUBLIC = (
    ipaddress.IPv4Network("168.63.129.16/32"),  # a cloud's own services behind an address of the public range
    ipaddress.IPv4Network("192.0.0.0/24"),
    ipaddress.IPv4Network("192.88.99.0/24"),
    ipaddress.IPv6Network("fec0::/10"),
)


class RefusedAddressError(OSError):
    """A connection to an address that media may not come from; an OSError, as sockets raise."""

    def __init__(self) -> None:
        super().__init__("the address is not public")


class AddressGuard:
    """Says of an address whether it may be contacted, and makes sockets for such addresses only."""

    def __init__(self, allowed_networks: Iterable[str] = ()) -> None:
        self._allowed: list[Network] = [ipaddress.ip_network(network) for network in allowed_networks]

    def permits(self, address: str) -> bool:
        """Whether this numeric address is public or in a network that the operator allows; False for anything else."""
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        # An IPv6 address that stands for an IPv4 one leads there, so both must pass.
        return all(self._permits(one) for one in (parsed, *_embedded(parsed)))

    def _permits(self, address: Address) -> bool:
        if any(address.version == network.version and address in network for network in self._allowed):
            return True
        if any(address.version == network.version and address in network for network in _NEVER_PUBLIC):
            return False
        if isinstance(address, ipaddress.IPv6Address) and (address.ipv4_mapped or address in _NAT64):
            return True  # judged by what it embeds
        return address.is_global and not address.is_multicast and not address.is_reserved

    def open_socket(self, address_info: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
        """A socket for one entry of ``getaddrinfo``: the last thing that happens before a connect, on every path to it.

        Raises RefusedAddressError.
        """
        family, kind, protocol, _, address = address_info
        if not self.permits(str(address[0])):
            raise RefusedAddressError
        return socket.socket(family=family, type=kind, proto=protocol)


def _embedded(address: Address) -> list[ipaddress.IPv4Address]:
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
