"""How a client reaches its server: plain text on this machine, TLS beyond it, and a token with each call."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from notecase import Client, NotecaseError, Retry, connection, v1
from notecase_server.auth.principal import AuthContext, Metadata, Principal, Role
from notecase_server.auth.settings import IssuerSettings
from notecase_server.auth.tokens import Tokens
from notecase_server.supervisor import Tasks

from tests.client.conftest import QUICK
from tests.support.authority import Authority
from tests.support.issuer import KeyServer, SigningKey
from tests.support.server import Running, running

INFO = v1.GetServerInfoRequest()
KEEP_OPEN = v1.WatchOptions(keep_open=True)
TLS_HANDSHAKE = b"\x16"
HTTP_2 = b"P"
"""The first byte that a client sends."""


class Recording:
    """Takes every caller, and keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[str | bytes | None] = []

    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal:
        self.shown.append(metadata.get("authorization"))
        return Principal("default", "", Role.ADMIN)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTECASE_ADDRESS", "NOTECASE_TOKEN", "NOTECASE_CA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
async def recording() -> AsyncIterator[tuple[Running, Recording]]:
    judge = Recording()
    async with running(authenticators=[judge]) as served:
        yield served, judge


async def test_a_client_made_outside_of_a_loop_belongs_to_that_of_its_first_call() -> None:
    """In another loop it says so, and after `close` it opens no connection."""
    async with running() as served:
        client = await asyncio.to_thread(Client, served.address)
        await client.server.GetServerInfo(INFO)

        def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="one client for each"):
                asyncio.run(client.put_agent("greeter"))

        await asyncio.to_thread(elsewhere)
        await client.close()
        unused = Client(served.address)
        await unused.close()
        for closed in (client, unused):
            with pytest.raises(RuntimeError, match="the client is closed"):
                await closed.server.GetServerInfo(INFO)


async def test_a_string_is_sent_with_every_call(recording: tuple[Running, Recording]) -> None:
    served, judge = recording
    async with Client(served.address, token="secret-1\n") as client:
        await client.server.GetServerInfo(INFO)
        await client.server.GetServerInfo(INFO, metadata=(("x-request-id", "r1"),))
        assert [] == [run async for run in client.waiting()]
    assert ["Bearer secret-1"] * 3 == judge.shown


@pytest.mark.parametrize("is_async", [False, True], ids=["a function", "an asynchronous one"])
async def test_a_function_is_asked_for_each_call(recording: tuple[Running, Recording], is_async: bool) -> None:
    served, judge = recording
    tokens = iter(f"secret-{number}" for number in range(9))

    async def later() -> str:
        await asyncio.sleep(0)
        return next(tokens)

    async with Client(served.address, token=later if is_async else lambda: next(tokens)) as client:
        await client.server.GetServerInfo(INFO)
        await client.server.GetServerInfo(INFO, timeout=60)
        uploaded = await client.upload(b"content", "text/plain")
        assert [b"content"] == [piece async for piece in client.download(uploaded)]
    assert [f"Bearer secret-{number}" for number in range(4)] == judge.shown


async def test_a_credential_that_a_call_brings_is_the_only_one(recording: tuple[Running, Recording]) -> None:
    served, judge = recording
    async with Client(served.address, token="mine") as client:
        await client.server.GetServerInfo(INFO, metadata=(("authorization", "Bearer other"),))
    assert ["Bearer other"] == judge.shown


async def test_what_a_function_raises_is_raised_to_the_caller(served: Running) -> None:
    async def broken() -> str:
        raise LookupError("no token")

    async with Client(served.address, token=broken) as client:
        with pytest.raises(LookupError, match="no token"):
            await client.server.GetServerInfo(INFO)
        with pytest.raises(LookupError, match="no token"):
            async with client.attach("sessions/s"):
                pass


async def test_a_token_that_does_not_come_holds_a_call_no_longer_than_it_may_take(served: Running) -> None:
    async def never() -> str:
        await asyncio.Event().wait()
        raise AssertionError

    async with Client(served.address, token=never) as client:
        with pytest.raises(NotecaseError) as late:
            await client.server.GetServerInfo(INFO, timeout=0.01)
        assert grpc.StatusCode.DEADLINE_EXCEEDED is late.value.code
        call = client.server.GetServerInfo(INFO)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        waiting = asyncio.ensure_future(anext(aiter(client.runs.Run(iter([v1.RunRequest()])))))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


@pytest.mark.parametrize("token", ["", " ", "two words", "ä", "a\tb", "a\nb"])
async def test_an_invalid_token_is_refused_without_quoting_it(token: str) -> None:
    if token:
        with pytest.raises(ValueError, match="the token is empty or contains") as refused:
            Client("127.0.0.1:1", token=token)
        assert not token.strip() or token not in str(refused.value)
    async with Client("127.0.0.1:1", token=lambda: token) as client:
        with pytest.raises(ValueError, match="the token is empty or contains"):
            await client.server.GetServerInfo(INFO)


@asynccontextmanager
async def first_byte() -> AsyncIterator[tuple[str, Callable[[], Awaitable[bytes]]]]:
    """A port, by a name that a client does not take for this machine, and what is sent there first."""
    came: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.put_nowait(await reader.read(1))
        writer.transport.abort()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        yield f"ipv4:127.0.0.1:{server.sockets[0].getsockname()[1]}", came.get


async def test_connections_to_other_machines_use_tls_unless_plaintext_is_set() -> None:
    for arguments, expected in (
        ({}, TLS_HANDSHAKE),
        ({"token": "secret-1"}, TLS_HANDSHAKE),
        ({"plaintext": True}, HTTP_2),
        ({"plaintext": True, "token": "secret-1"}, HTTP_2),
    ):
        async with first_byte() as (address, came), Client(address, retry=Retry(tries=0), **arguments) as client:
            with pytest.raises(NotecaseError):
                await client.server.GetServerInfo(INFO)
            assert expected == await came()


def test_a_token_of_the_environment_is_not_sent_in_plain_text_beyond_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NOTECASE_TOKEN", "secret-1")
    with pytest.raises(ValueError, match=r"NOTECASE_TOKEN would be sent to 192\.0\.2\.1:7420 in plain text") as refused:
        Client("192.0.2.1:7420", plaintext=True)
    assert "secret-1" not in str(refused.value)
    with pytest.raises(ValueError, match="plaintext cannot be combined with ca"):
        Client("192.0.2.1:7420", plaintext=True, ca=b"PEM")


async def test_a_server_is_known_by_its_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, judge = Authority(), Recording()
    cert, key = authority.issue().write(tmp_path)
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.cert)
    async with running(
        authenticators=[judge], credentials=grpc.ssl_channel_credentials(authority.cert), tls_cert=cert, tls_key=key
    ) as served:
        for given in (str(ca), ca, ca.read_bytes()):
            async with Client(served.address, ca=given, token="secret-1") as client:
                await client.server.GetServerInfo(INFO)
        async with Client(served.address, ca=Authority().cert, retry=Retry(tries=0), token="secret-2") as client:
            with pytest.raises(NotecaseError) as refused:
                await client.server.GetServerInfo(INFO)
        assert grpc.StatusCode.UNAVAILABLE is refused.value.code
        monkeypatch.setenv("NOTECASE_ADDRESS", served.address.replace("127.0.0.1", "localhost"))
        monkeypatch.setenv("NOTECASE_TOKEN", "secret-3")
        monkeypatch.setenv("NOTECASE_CA", str(ca))
        async with Client() as client:
            await client.server.GetServerInfo(INFO)
    assert ["Bearer secret-1"] * 3 + ["Bearer secret-3"] == judge.shown
    with pytest.raises(FileNotFoundError):
        Client("127.0.0.1:1", ca=tmp_path / "none.pem")


async def test_a_proxy_of_the_environments_is_not_asked_on_this_machine(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with Client(served.address, options=(("grpc.use_local_subchannel_pool", 1),)) as client:
        assert "memory" == (await client.server.GetServerInfo(INFO)).store


class Issuer:
    """An issuer of tokens that end after five minutes, by a clock that a test moves; and a server that takes them."""

    def __init__(self, url: str, tasks: Tasks) -> None:
        self.now = 1_800_000_000
        self.key = SigningKey("first")
        self.asked = 0
        """Tokens so far."""
        settings = IssuerSettings(
            issuer="https://login.example",
            audiences=("notecase",),
            algorithms=("ES256",),
            jwks_url=url,
            tenant="acme",
            role=Role.DEVELOPER,
        )
        self.tokens = Tokens([settings], tasks, lambda: self.now * 1_000_000, lambda: 0.0)

    async def token(self) -> str:
        self.asked += 1
        claims = {"iss": "https://login.example", "aud": "notecase", "sub": "ci", "exp": self.now + 300}
        return self.key.sign(claims)


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    tasks = Tasks("test")
    async with KeyServer() as server:
        issuer = Issuer(server.url, tasks)
        server.keys = [issuer.key.jwk()]
        yield issuer
        await tasks.close()


async def test_a_stream_goes_on_with_the_next_token_when_its_own_has_expired(issuer: Issuer) -> None:
    judges = [issuer.tokens]
    async with running(authenticators=judges) as served, Client(served.address, token=issuer.token) as client:
        session = (await client.create_session(session_id="s")).name
        await client.put_state(session, "case", 6)
        async with client.attach(session, 0, options=KEEP_OPEN) as stream:
            assert 1 == (await anext(stream)).sequence
            issuer.now += 400
            await served.server._doorway.judge()
            await client.put_state(session, "case", 7)
            assert 2 == (await anext(stream)).sequence
        assert 5 == issuer.asked


async def test_a_stream_whose_token_stays_the_same_ends_with_it(issuer: Issuer) -> None:
    token = await issuer.token()
    async with running(authenticators=[issuer.tokens]) as served:
        async with Client(served.address, token=token, retry=QUICK) as client:
            session = (await client.create_session(session_id="s")).name
            await client.put_state(session, "case", 6)
            async with client.attach(session, 0, options=KEEP_OPEN) as stream:
                assert 1 == (await anext(stream)).sequence
                issuer.now += 400
                await served.server._doorway.judge()
                with pytest.raises(NotecaseError) as ended:
                    await anext(stream)
        assert "UNAUTHENTICATED" == ended.value.reason


async def test_a_refused_token_is_fetched_once_more_and_not_again(issuer: Issuer) -> None:
    asked = []

    def forged() -> str:
        asked.append(1)
        return SigningKey("first").sign({"iss": "https://login.example", "aud": "notecase", "exp": issuer.now + 300})

    async with running(authenticators=[issuer.tokens]) as served, Client(served.address, token=forged) as client:
        with pytest.raises(NotecaseError) as refused:
            async with client.attach("sessions/s"):
                pass
        assert "UNAUTHENTICATED" == refused.value.reason
        assert 2 == len(asked)
        with pytest.raises(NotecaseError):
            await client.create_session()
        assert 3 == len(asked)


@pytest.mark.parametrize("token", ["x", None, lambda: asyncio.sleep(0, "x")], ids=["token", "none", "late"])
async def test_the_status_of_a_call_is_raised_that_ends_while_it_is_written_to(
    monkeypatch: pytest.MonkeyPatch, token: str | Callable[[], Awaitable[str]] | None
) -> None:
    """grpc's write fails, and what it raises then says nothing of the reason."""
    monkeypatch.setattr(connection, "STATUS_SECONDS", 60)

    async def refuse(chunks: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        async for _ in chunks:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not an export")
        raise AssertionError

    async def endless() -> AsyncIterator[v1.ImportSessionRequest]:
        while True:
            yield v1.ImportSessionRequest(chunk=bytes(1 << 20))

    server = grpc.aio.server(options=(("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64 << 10)))
    handlers: Any = {"ImportSession": grpc.stream_unary_rpc_method_handler(refuse)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("notecase.v1.SessionService", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with Client(f"127.0.0.1:{port}", token=token) as client:
        for _ in range(20):
            with pytest.raises(NotecaseError, match="not an export"):
                await client.sessions.ImportSession(endless())
    await server.stop(None)
