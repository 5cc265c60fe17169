"""Binds the addresses on which a server listens."""

import errno
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from notecase_server.config import Settings

if TYPE_CHECKING:
    from notecase_server.auth.files import Watched
    from notecase_server.auth.tls import Identity


class ListenError(RuntimeError):
    """An address cannot be listened on; the text is for the operator, and names the option."""


def listen(server: Any, settings: Settings, identity: "Watched[Identity] | None") -> tuple[int, int]:
    """Takes the ports for a server of gRPC, and returns them: that for all, and that for client certificates or 0.
    Raises ListenError when an address is taken."""
    if identity is None:
        return _add("--listen", settings.listen, lambda: server.add_insecure_port(settings.listen)), 0
    from notecase_server.auth.tls import credentials  # noqa: PLC0415  # cryptography is imported where there is TLS

    tls = credentials(identity)
    port = _add("--listen", settings.listen, lambda: server.add_secure_port(settings.listen, tls))
    if not (other := settings.listen_mtls):
        return port, 0
    mutual = credentials(identity, require_client=True)
    return port, _add("--listen-mtls", other, lambda: server.add_secure_port(other, mutual))


def _add(option: str, address: str, add: Callable[[], int]) -> int:
    # gRPC would write its own lines to standard error about it.
    problem = _problem(address)
    if not problem:
        try:
            return add()
        except RuntimeError as error:
            problem = f" ({error})"
    raise ListenError(f"{option}: cannot listen on {address}{problem}.")


def _problem(address: str) -> str:
    """Returns why none of the sockets of an address can be bound. Empty if one can, and for an address
    that only gRPC understands."""
    host, _, port = address.rpartition(":")
    problem = ""
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        return f" ({error.strerror or error})"
    except ValueError:
        return ""
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
                tried.bind(place)
        except OSError as error:
            problem = f" ({error.strerror or error})"
            if error.errno == errno.EADDRINUSE:
                problem += "; another server may use it"
            elif error.errno == errno.EADDRNOTAVAIL:
                problem += ": this machine does not have that address"
        else:
            return ""
    return problem
