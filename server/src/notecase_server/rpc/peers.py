"""Decides which machines may call a server whose proxy terminates TLS."""

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import unquote


class Peers:
    """The other ends of connections that are served: this machine always, and where networks are named, no others
    than those."""

    def __init__(self, networks: Sequence[IPv4Network | IPv6Network] = ()) -> None:
        """Without `networks` everybody is served."""
        self._networks = networks

    def serves(self, peer: str) -> bool:
        """Whether calls of that peer are served, by grpc's name for it, such as `ipv4:10.0.0.7:50412`."""
        if not self._networks:
            return True
        host = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]").partition("%")[0]
        try:
            address = ip_address(host)
        except ValueError:
            return False
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return address.is_loopback or any(address in network for network in self._networks)
