"""Where a server may be reached, and what it takes: all that is wrong is told at once, each by its option."""

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from notecase import Client, v1
from notecase import NotecaseError as CallError
from notecase_server.auth.settings import read_networks
from notecase_server.config import Settings
from notecase_server.errors import NotecaseError
from notecase_server.rpc.gate import Gate
from notecase_server.rpc.peers import Peers
from notecase_server.serve import settings_mistakes

from tests.cli.command import notecase
from tests.support.authority import Authority
from tests.support.issuer import KeyServer, SigningKey
from tests.support.server import Spawned, running

BEYOND = "0.0.0.0:7420"
CHOSEN = "a-key-that-an-operator-chose-0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a server with TLS, client certificates and tokens is given."""
    authority, path = Authority(), tmp_path_factory.mktemp("tls")
    authority.issue().write(path)
    (path / "ca.pem").write_bytes(authority.cert)
    authority.issue([x509.UniformResourceIdentifier("spiffe://acme.example/ci")]).write(path, "client")
    (path / "principals.toml").write_text('["uri:spiffe://acme.example/ci"]\ntenant = "acme"\nrole = "user"\n')
    (path / "issuers.toml").write_text(
        '[[issuer]]\nissuer = "https://login.example"\naudience = "notecase"\nalgorithms = ["RS256"]\n'
        'jwks_url = "https://login.example/keys"\ntenant = "acme"\nrole = "user"\n'
    )
    return path


def options(settings: Settings) -> Iterator[str]:
    return (mistake.setting for mistake in settings_mistakes(settings))


def test_what_a_server_needs_where_it_listens(folder: Path) -> None:
    here, there = Settings(listen="127.0.0.1:0"), Settings(listen=BEYOND)
    tls: dict[str, Any] = {"tls_cert": folder / "server.pem", "tls_key": folder / "server.key"}
    issuers: dict[str, Any] = {"issuers": folder / "issuers.toml"}
    mtls: dict[str, Any] = {
        "listen_mtls": BEYOND,
        "tls_client_ca": folder / "ca.pem",
        "client_principals": folder / "principals.toml",
    }
    proxy: dict[str, Any] = {"behind_tls_proxy": "10.0.0.0/8"}
    for right in (
        here,
        replace(here, **tls),
        replace(here, **issuers),
        replace(there, insecure=True),
        replace(there, insecure=True, **tls),
        replace(there, **tls, **issuers),
        replace(there, **tls, **mtls),
        replace(there, **proxy, **issuers),
    ):
        assert [] == [*options(right)]
    for wrong, expected in (
        (there, ["--listen", "--listen"]),
        (replace(there, **tls), ["--listen"]),
        (replace(there, **issuers), ["--listen"]),
        (replace(there, **proxy), ["--listen"]),
        (replace(there, **issuers, insecure=True), ["--insecure"]),
        (replace(there, **proxy, insecure=True), ["--insecure"]),
        (replace(there, **proxy, **tls, **issuers), ["--behind-tls-proxy"]),
        (replace(here, tls_cert=folder / "server.pem"), ["--tls-key"]),
        (replace(here, tls_key=folder / "server.key"), ["--tls-cert"]),
        (replace(here, listen_mtls=BEYOND), ["--tls-cert", "--tls-client-ca", "--client-principals"]),
        (replace(here, **tls, **{**mtls, "listen_mtls": ""}), ["--tls-client-ca", "--client-principals"]),
        (replace(here, **tls, **{**mtls, "tls_client_ca": folder / "none.pem"}), ["--tls-client-ca"]),
        (replace(here, behind_tls_proxy="10.0.0.0/8,here"), ["--behind-tls-proxy"]),
    ):
        assert expected == [*options(wrong)]


async def test_all_mistakes_are_told_at_once_by_their_options(folder: Path) -> None:
    done = await notecase(
        *("serve", "--store", "memory:", "--listen", BEYOND),
        *("--tls-cert", str(folder / "client.pem"), "--tls-key", str(folder / "server.key")),
        *("--client-principals", str(folder / "issuers.toml")),
        env={"NOTECASE_BEHIND_TLS_PROXY": "10.0.0.1/8", "NOTECASE_ISSUERS": "none.toml"},
    )
    assert (1, "") == (done.code, done.out)
    lines = done.err.splitlines()
    assert [
        "--client-principals",
        "--behind-tls-proxy",
        "--tls-key",
        "--client-principals issuer",
        "--issuers",
        "--behind-tls-proxy",
    ] == [line.removeprefix("Error: ").partition(": ")[0] for line in lines]
    assert f"is not the key of the first certificate in {folder / 'client.pem'}." in done.err


async def test_a_server_has_a_port_with_tls_and_one_for_client_certificates(folder: Path, tmp_path: Path) -> None:
    """And each start without credentials beyond this machine is told in the log."""
    served = await Spawned.start(
        "memory:",
        tmp_path / "log",
        *("--tls-cert", str(folder / "server.pem"), "--tls-key", str(folder / "server.key")),
        *("--listen-mtls", "127.0.0.1:0", "--tls-client-ca", str(folder / "ca.pem")),
        *("--client-principals", str(folder / "principals.toml")),
    )
    assert served.process.stdout is not None
    line = (await served.process.stdout.readline()).decode()
    assert line.startswith("listening for client certificates on port ")
    ca, cert, key = ((folder / name).read_bytes() for name in ("ca.pem", "client.pem", "client.key"))
    request = v1.GetServerInfoRequest()
    async with grpc.aio.secure_channel(served.address, grpc.ssl_channel_credentials(ca)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await v1.ServerServiceStub(channel).GetServerInfo(request)
    assert grpc.StatusCode.UNAUTHENTICATED is refused.value.code()
    with_certificate = grpc.ssl_channel_credentials(ca, key, cert)
    async with grpc.aio.secure_channel(f"127.0.0.1:{line.split()[-1]}", with_certificate) as channel:
        assert "memory" == (await v1.ServerServiceStub(channel).GetServerInfo(request)).store
    assert 0 == await served.stop()
    assert "server_insecure" not in served.log.read_text()


async def test_a_connection_that_fails_its_handshake_is_not_in_the_log(folder: Path, tmp_path: Path) -> None:
    """Strangers would write the log, and not as JSON."""
    files = ("--tls-cert", str(folder / "server.pem"), "--tls-key", str(folder / "server.key"))
    served = await Spawned.start("memory:", tmp_path / "log", *files, "--log-format", "json")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(served.address.rpartition(":")[2]))
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    assert b"" == await reader.read()
    writer.close()
    assert 0 == await served.stop()
    events = [json.loads(line)["event"] for line in served.log.read_text().splitlines()]
    assert ["server_started", "server_draining", "runs_drained", "server_stopped"] == events


async def test_a_server_takes_the_tokens_of_its_issuers(folder: Path, tmp_path: Path) -> None:
    """As an operator sets it up: by TLS, with the keys over HTTP, and by the wall clock."""
    key = SigningKey("first")
    claims = {"iss": "https://login.example", "aud": "notecase", "sub": "ada", "exp": round(time.time()) + 600}
    async with KeyServer(key) as issuer:
        issuers = tmp_path / "issuers.toml"
        issuers.write_text(
            '[[issuer]]\nissuer = "https://login.example"\naudience = "notecase"\nalgorithms = ["ES256"]\n'
            f'jwks_url = "{issuer.url}"\ntenant = "acme"\nrole_claim = "role"\n'
        )
        served = await Spawned.start(
            "memory:",
            tmp_path / "log",
            *("--tls-cert", str(folder / "server.pem"), "--tls-key", str(folder / "server.key")),
            *("--issuers", str(issuers)),
        )
        token = key.sign({**claims, "role": "user"})
        async with Client(served.address, token=token, ca=folder / "ca.pem") as client:
            session = await client.create_session(session_id="s")
            assert "sessions/s" == session.name
            with pytest.raises(CallError) as refused:
                await client.agents.CreateAgent(v1.CreateAgentRequest(agent_id="a"))
            assert "ROLE_MISSING" == refused.value.reason
        env = {"NOTECASE_ADDRESS": served.address, "NOTECASE_CA": str(folder / "ca.pem")}
        done = await notecase("sessions", "list", env={**env, "NOTECASE_TOKEN": key.sign({**claims, "role": "viewer"})})
        assert (0, "") == (done.code, done.err)
        done = await notecase("sessions", "list", env={**env, "NOTECASE_TOKEN": SigningKey("first").sign(claims)})
        assert (1, "Error: The credential of this call is invalid") == (done.code, done.err.partition(",")[0])
        assert 0 == await served.stop()
        assert token not in served.log.read_text()


async def test_a_server_for_everybody_warns_at_each_start(tmp_path: Path) -> None:
    for _ in range(2):
        served = await Spawned.start("memory:", tmp_path / "log", "--insecure")
        assert 0 == await served.stop()
    assert 2 == served.log.read_text().count("server_insecure")


class Context:
    """A call of some peer, as far as the gate asks."""

    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    def add_done_callback(self, _: object) -> None:
        pass


PROXIES = "10.0.0.0/8, 192.0.2.7, 2001:db8::/32"


@pytest.mark.parametrize(
    ("peer", "is_served"),
    [
        ("ipv4:10.1.2.3:50000", True),
        ("ipv4:192.0.2.7:50000", True),
        ("ipv4:192.0.2.8:50000", False),
        ("ipv4:11.0.0.1:50000", False),
        ("ipv6:%5B2001:db8::1%5D:50000", True),
        ("ipv6:%5B2001:db9::1%5D:50000", False),
        ("ipv6:%5B::ffff:10.1.2.3%5D:50000", True),
        ("ipv6:%5B::ffff:11.1.2.3%5D:50000", False),
        ("ipv6:%5Bfe80::1%25eth0%5D:50000", False),
        ("ipv4:127.0.0.1:50000", True),
        ("ipv6:%5B::1%5D:50000", True),
        ("unix:", False),
        ("unknown", False),
        ("", False),
    ],
)
def test_behind_a_proxy_only_the_proxies_and_this_machine_are_served(peer: str, is_served: bool) -> None:
    gate = Gate(10, 1 << 20, 1 << 20, Peers(read_networks(PROXIES)))
    if is_served:
        gate.enter(Context(peer), probe=False)
        assert 1 == gate.calls
        return
    for probe in (False, True):
        with pytest.raises(NotecaseError) as refused:
            gate.enter(Context(peer), probe=probe)
        assert v1.ERROR_REASON_UNAUTHENTICATED == refused.value.reason
    assert 0 == gate.calls


def own_address() -> str | None:
    """An address of this machine that is not a loopback one: a connection to it comes from it."""
    found = (each for addresses in psutil.net_if_addrs().values() for each in addresses)
    of_others = (each.address for each in found if each.family is socket.AF_INET)
    return next((address for address in of_others if not ip_address(address).is_loopback), None)


@pytest.mark.skipif(own_address() is None, reason="needs a network interface besides loopback")
@pytest.mark.parametrize("is_named", [False, True])
async def test_a_stranger_to_the_proxy_is_refused_over_a_real_connection(is_named: bool) -> None:
    """Whatever its credential; this machine is served by the same port."""
    own = own_address()
    metadata = (("authorization", f"Bearer {CHOSEN}"),)
    async with running(
        authenticators=(), listen="0.0.0.0:0", admin_key=CHOSEN, behind_tls_proxy=own if is_named else "192.0.2.254"
    ) as served:
        await served.info.GetServerInfo(v1.GetServerInfoRequest(), metadata=metadata)
        async with grpc.aio.insecure_channel(f"{own}:{served.server.port}") as channel:
            info = v1.ServerServiceStub(channel)
            health: Any = health_pb2_grpc.HealthStub(channel)
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: info.GetServerInfo(v1.GetServerInfoRequest(), metadata=metadata),
                lambda: health.Check(health_pb2.HealthCheckRequest()),
            ]
            for call in calls:
                if is_named:
                    await call()
                    continue
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call()
                assert grpc.StatusCode.UNAUTHENTICATED is refused.value.code()


def test_without_a_proxy_everybody_is_served() -> None:
    assert Peers(read_networks("")).serves("ipv4:192.0.2.8:50000")
