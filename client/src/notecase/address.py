"""Checks an address before anything is sent to it: gRPC would silently use port 443, or another number."""

import ipaddress
import re

DEFAULT_PORT = 7420
DEFAULT_ADDRESS = f"127.0.0.1:{DEFAULT_PORT}"

_TARGETS = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "vsock:", "xds:", "passthrough:")
"""gRPC's own schemes of naming a server, which it judges itself."""


def with_port(address: str) -> str:
    """Returns an address as HOST:PORT, with port 7420 where it names none; a target of gRPC's, such as unix:PATH, as it
    is. Raises ValueError, which quotes it, for anything else."""
    if address.startswith(_TARGETS):
        return address
    if not address.strip():
        raise ValueError(f"the address is empty; leave it out for {DEFAULT_ADDRESS}")
    scheme, separator, rest = address.partition("://")
    if separator:
        place = re.split(r"[/?#]", rest, maxsplit=1)[0] or DEFAULT_ADDRESS
        raise ValueError(f"{address!r} is a URL; an address has no {scheme!r} and no path, for example {place!r}")
    if _is_ipv6(address):
        return f"[{address}]:{DEFAULT_PORT}"
    host, port = _split(address)
    if not port:
        return f"{host}:{DEFAULT_PORT}"
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{address!r} has port {port!r}; a port is a number from 1 to 65535")
    return address


def _split(address: str) -> tuple[str, str]:
    """Returns host and port; the port is empty where there is none."""
    found = re.fullmatch(r"(\[[^\]\s]+\]|[^:/?#@,\s\[\]]+)(?::(.*))?", address)
    bracketed = found is not None and found[1].startswith("[")
    if found is None or found[2] == "" or (bracketed and not _is_ipv6(found[1][1:-1])):
        raise ValueError(f"{address!r} is not an address; write HOST:PORT, for example {DEFAULT_ADDRESS!r}")
    return found[1], found[2] or ""


def is_loopback(address: str) -> bool:
    """Whether data sent to that address stays on this machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_ipv6(host: str) -> bool:
    try:
        return bool(ipaddress.IPv6Address(host))
    except ValueError:
        return False
