"""Client certificates on real sockets: which callers they identify, and that a connection needs one."""

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
from cryptography import x509
from notecase_server.auth.certificates import Certificates
from notecase_server.auth.files import Watched
from notecase_server.auth.principal import Principal, Role
from notecase_server.auth.settings import read_client_principals
from notecase_server.auth.tables import SettingsError
from notecase_server.auth.tls import credentials, read_identity
from notecase_server.errors import NotecaseError
from notecase_server.serve import now

from tests.support.authority import Authority, Pair

TABLE = """
["uri:spiffe://acme.example/ci"]
tenant = "acme"
role = "developer"

["dns:Worker.acme.example"]
tenant = "acme"
role = "user"
user = "users/worker"

["email:ops@example.org"]
role = "operator"
"""

CI = Principal("acme", "uri:spiffe://acme.example/ci", Role.DEVELOPER)
WORKER = Principal("acme", "dns:worker.acme.example", Role.USER, "worker")
OPS = Principal("", "email:ops@example.org", Role.OPERATOR)

URI, DNS, EMAIL = x509.UniformResourceIdentifier, x509.DNSName, x509.RFC822Name


async def asked(channel: grpc.aio.Channel) -> str:
    ask: Any = channel.unary_unary("/test.Who/Ask")
    answer: bytes = await ask(b"")
    return answer.decode()


class Port:
    """A port that requires certificates; each call is answered with what the authenticator makes of it."""

    def __init__(self, authority: Authority, folder: Path) -> None:
        self._authority = authority
        cert, key = authority.issue().write(folder)
        ca = folder / "ca.pem"
        ca.write_bytes(authority.cert)
        identity = Watched([cert, key, ca], lambda: read_identity(cert, key, ca, now))
        self.table = folder / "principals.toml"
        self.table.write_text(TABLE)
        self.principals = Watched([self.table], lambda: read_client_principals(self.table))
        self.ahead = timedelta()
        self._certificates = Certificates(self.principals, lambda: now() + self.ahead // timedelta(microseconds=1))
        self._server = grpc.aio.server()
        handler: Any = grpc.unary_unary_rpc_method_handler(self._handle)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Who", {"Ask": handler}),))
        self._port = self._server.add_secure_port("127.0.0.1:0", credentials(identity, require_client=True))
        self._plain = self._server.add_insecure_port("127.0.0.1:0")

    async def _handle(self, _: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            transport: Any = context.auth_context()
            principal = await self._certificates.principal({}, lambda: transport)
        except NotecaseError as error:
            return f"refused {error.code}".encode()
        return repr(principal).encode()

    async def ask(self, pair: Pair | None) -> str:
        """Returns the answer to a call with that certificate."""
        cert, key = (pair.cert, pair.key) if pair else (None, None)
        channel = grpc.ssl_channel_credentials(self._authority.cert, key, cert)
        own = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.secure_channel(f"127.0.0.1:{self._port}", channel, own) as opened:
            return await asked(opened)

    async def ask_in_plain_text(self) -> str:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self._plain}") as opened:
            return await asked(opened)

    async def __aenter__(self) -> Self:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)


@pytest.mark.parametrize(
    ("names", "principal"),
    [
        ([URI("spiffe://acme.example/ci")], CI),
        ([DNS("worker.ACME.example")], WORKER),
        ([EMAIL("ops@example.org")], OPS),
        ([DNS("other.example"), URI("spiffe://acme.example/ci"), URI("spiffe://acme.example/ci")], CI),
    ],
    ids=["uri", "dns", "email", "one of several"],
)
async def test_a_certificate_makes_the_principal_of_its_name(
    tmp_path: Path, names: Sequence[x509.GeneralName], principal: Principal
) -> None:
    authority = Authority()
    async with Port(authority, tmp_path) as port:
        assert repr(principal) == await port.ask(authority.issue(names))


@pytest.mark.parametrize(
    "names",
    [
        [],
        [URI("spiffe://acme.example/other")],
        [URI("spiffe://acme.example/CI")],
        [DNS("spiffe://acme.example/ci")],
        [DNS("ops@example.org")],
        [URI("spiffe://acme.example/ci"), DNS("worker.acme.example")],
    ],
    ids=["none", "an unknown one", "other capitals", "a host called so", "a host called like an email", "two known"],
)
async def test_a_certificate_without_one_known_name_is_refused(
    tmp_path: Path, names: Sequence[x509.GeneralName]
) -> None:
    """A name of another kind is another name: an authority may be strict with one and not with the other."""
    authority = Authority()
    async with Port(authority, tmp_path) as port:
        assert "refused 16" == await port.ask(authority.issue(names))


async def test_clients_without_a_certificate_of_the_ca_cannot_connect(tmp_path: Path) -> None:
    authority = Authority()
    async with Port(authority, tmp_path) as port:
        for pair in (None, Authority().issue([URI("spiffe://acme.example/ci")])):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await port.ask(pair)
            assert grpc.StatusCode.UNAVAILABLE is refused.value.code()
        assert "None" == await port.ask_in_plain_text()


async def test_a_certificate_that_expires_after_the_handshake_is_refused(tmp_path: Path) -> None:
    authority = Authority()
    async with Port(authority, tmp_path) as port:
        pair = authority.issue([URI("spiffe://acme.example/ci")], lasts=timedelta(hours=1))
        assert repr(CI) == await port.ask(pair)
        port.ahead = timedelta(minutes=59)
        assert repr(CI) == await port.ask(pair)
        port.ahead = timedelta(hours=1)
        assert "refused 16" == await port.ask(pair)


async def test_a_name_that_is_taken_out_of_the_file_is_refused_without_a_restart(tmp_path: Path) -> None:
    authority = Authority()
    async with Port(authority, tmp_path) as port:
        pair = authority.issue([URI("spiffe://acme.example/ci")])
        assert repr(CI) == await port.ask(pair)
        port.table.write_text(TABLE.replace("example/ci", "example/cd"))
        port.principals.look()
        assert "refused 16" == await port.ask(pair)


def test_all_mistakes_in_the_file_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "principals.json"
    tables = {
        "spiffe://acme.example/ci": {"tenant": "acme", "role": "user"},
        "uri:a": {"tenant": "Acme", "role": "owner", "users": "ada"},
        "dns:b": {"tenant": "acme", "role": "user", "user": "ada"},
        "DNS:b": {"tenant": "acme", "role": "user"},
        "email:c": {"tenant": "acme", "role": "operator"},
        "email:d": {},
        "email:e": "acme",
        "dns:B": {"tenant": "acme", "role": "user"},
    }
    path.write_text(json.dumps(tables))
    with pytest.raises(SettingsError) as found:
        read_client_principals(path)
    option = "--client-principals"
    assert [
        (f"{option} spiffe://acme.example/ci", "A name must begin with uri:, dns: or email:."),
        (f"{option} uri:a.role", "A role must be one of viewer, user, developer, admin, operator."),
        (f"{option} uri:a.tenant", "A tenant must be 1 to 63 lower-case letters, digits and inner '.', '_' or '-'."),
        (f"{option} uri:a.users", "There is no such key; the nearest is user."),
        (f"{option} dns:b.user", "A user must be users/ and an id."),
        (f"{option} DNS:b", "A name must begin with uri:, dns: or email:."),
        (f"{option} email:c.role", "An operator has no tenant and no user."),
        (f"{option} email:d.role", "This is missing."),
        (f"{option} email:d.tenant", "This is missing."),
        (f"{option} email:e", "This must be a table."),
        (f"{option} dns:B", "This name is in the file twice."),
    ] == list(found.value.mistakes)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.toml", "", "The file is empty."),
        ("a.toml", "[", "is not TOML"),
        ("a.json", "[]", "does not contain a table."),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.json", "{", "is not JSON"),
        ("a.toml", b"\xff", "is not TOML"),
        ("a.toml", None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_not_a_table_is_reported(
    tmp_path: Path, name: str, content: str | bytes | None, told: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SettingsError) as found:
        read_client_principals(path)
    assert 1 == len(found.value.mistakes)
    assert told in str(found.value)
