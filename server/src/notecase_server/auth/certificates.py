"""Authenticates callers by client certificates: a table of the operator maps their names to principals."""

from collections.abc import Callable, Mapping

from notecase_server import errors
from notecase_server.auth.files import Watched
from notecase_server.auth.principal import AuthContext, Metadata, Principal
from notecase_server.auth.settings import san

KINDS = ("uri", "dns", "email")
"""The kinds of names that a caller is known by. An address is not one: it says where a caller is."""

MOST_NAMES = 10
MOST_LOGGED = 1000
"""How many names of a refused certificate the log has, and how many characters of them."""


class Certificates:
    """Judges the certificate of a connection. When the connection was made, the transport has judged that its CA is
    known, that it is valid, and that the caller has its key."""

    def __init__(self, principals: Watched[Mapping[str, Principal]], clock: Callable[[], int]) -> None:
        """`principals` are by name, as `read_client_principals` returns them; `clock` returns microseconds since
        1970."""
        from notecase_server.auth.tls import expires  # noqa: PLC0415  # cryptography is imported where there is TLS

        self._principals = principals
        self._clock = clock
        self._expires = expires

    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal | None:
        """Returns the principal of the one name in the table; None on a connection without a certificate. Raises
        NotecaseError UNAUTHENTICATED when the certificate has expired, and when the table has none of its names, or
        more than one."""
        context = transport()
        if "x509_pem_cert" not in context:
            return None
        try:
            expired = self._expires(context["x509_pem_cert"][0]) <= self._clock()
        except ValueError:
            raise errors.unauthenticated("The certificate cannot be read.") from None
        if expired:
            raise errors.unauthenticated("The certificate has expired.")
        known = self._principals.value
        held = {san(kind, name.decode(errors="replace")) for kind in KINDS for name in context.get(f"peer_{kind}", ())}
        found = [known[name] for name in held if name in known]
        if len(found) != 1:
            names = ", ".join(sorted(held)[:MOST_NAMES]) or "none"
            raise errors.unauthenticated(
                f"The table has {len(found)} of the certificate's names: {names[:MOST_LOGGED]}"
            )
        return found[0]
