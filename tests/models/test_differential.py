"""The same call made by the openai SDK and by us, against one server that keeps what it is sent: both send the same and
take the answer the same, but for the differences that are listed here, each with its reason."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

import anyio
import httpx2
import openai
import pytest
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import ModelRequest, Tool
from notecase_server.models.openai import OpenAIProvider

KEY = "test-Secret.0123/456+789=="
HOST = "models.test"
"""Resolves to the loopback interface here, and so do the names below it."""

WHOLE = b'data: {"choices":[{"delta":{"content":"Hi"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


class Sent(NamedTuple):
    """A request as it came over the socket."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def by_name(self) -> dict[str, str]:
        """The headers by their names in lower case, none of which may come twice."""
        named = {name.lower(): value for name, value in self.headers}
        assert len(named) == len(self.headers), self.headers
        return named


def answer(status: int = 200, body: bytes = WHOLE, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Recorder:
    """A server of bytes on a free port. It answers each request as `answers` says, in turn, and then as a model does;
    for None it closes the connection."""

    def __init__(self) -> None:
        self.received: list[Sent] = []
        self.answers: list[bytes | None] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def __aenter__(self) -> "Recorder":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = [(name, value) for name, _, value in (line.partition(": ") for line in head[1:] if line)]
                size = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
                self.received.append(Sent(head[0], headers, await reader.readexactly(size)))
                said = self.answers.pop(0) if self.answers else answer()
                if said is None:
                    return
                writer.write(said)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def took(self) -> list[Sent]:
        """What came since this was last asked."""
        taken, self.received = self.received, []
        return taken


@pytest.fixture
async def server() -> AsyncIterator[Recorder]:
    async with Recorder() as started:
        yield started


@pytest.fixture
async def proxy() -> AsyncIterator[Recorder]:
    async with Recorder() as started:
        yield started


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that says nothing, and names that resolve without a network."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("API_KEY", "BASE_URL", "ORG_ID", "PROJECT_ID", "CUSTOM_HEADERS", "ADMIN_KEY"):
        monkeypatch.delenv(f"OPENAI_{name}", raising=False)
    resolve: Callable[..., Any] = socket.getaddrinfo

    def resolved(host: str, *arguments: Any, **settings: Any) -> Any:
        return resolve("127.0.0.1" if host.endswith(HOST) else host, *arguments, **settings)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)


ASKED: Mapping[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "Hello"}],
    "stream": True,
    "stream_options": {"include_usage": True},
}
REQUEST = ModelRequest("m", "", [v1.Message(parts=[v1.Part(text="Hello")])], v1.Generation())


async def by_sdk(
    url: str,
    asked: Mapping[str, Any] = ASKED,
    *,
    retries: int = 0,
    query: Mapping[str, object] | None = None,
    **timeouts: float,
) -> openai.OpenAIError | None:
    """Makes the call with the SDK's own client; returns what it raises. `timeouts` are those of httpx2."""
    http = openai.DefaultAioHttpClient()
    settings: dict[str, Any] = {"timeout": httpx2.Timeout(30.0, **timeouts)} if timeouts else {}
    client = openai.AsyncOpenAI(
        api_key=KEY, base_url=url, max_retries=retries, default_query=query, http_client=http, **settings
    )
    async with client:
        try:
            async for _ in await client.chat.completions.create(**asked):
                pass
        except openai.OpenAIError as error:
            return error
    return None


async def by_us(url: str, request: ModelRequest = REQUEST, **settings: Any) -> NotecaseError | None:
    """Makes the call as the server does; returns what it raises."""
    provider = OpenAIProvider(KEY, url, "", **settings)
    try:
        async for _ in provider.stream(request):
            pass
    except NotecaseError as error:
        return error
    finally:
        await provider.close()
    return None


async def both(url: str, server: Recorder) -> tuple[Sent, Sent]:
    """The one request of each: the SDK's and ours."""
    assert None is await by_sdk(url)
    (theirs,) = server.took()
    assert None is await by_us(url)
    (ours,) = server.took()
    return theirs, ours


HEADERS = {
    "accept": "application/json",
    "accept-encoding": "gzip, deflate",
    "authorization": re.escape(f"Bearer {KEY}"),
    "connection": "keep-alive",
    "content-length": r"\d+",
    "content-type": "application/json",
    "host": r"127\.0\.0\.1:\d+",
    "user-agent": re.escape(f"AsyncOpenAI/Python {openai.__version__}"),
    "x-stainless-arch": r"\w+",
    "x-stainless-async": "async:asyncio",
    "x-stainless-lang": "python",
    "x-stainless-os": r"\w+",
    "x-stainless-package-version": re.escape(openai.__version__),
    "x-stainless-read-timeout": "600",
    "x-stainless-retry-count": "0",
    "x-stainless-runtime": "CPython",
    "x-stainless-runtime-version": r"[\d.]+",
}
"""Every header of the SDK's request, with the pattern of its value."""

NOT_OURS = {
    "connection": "HTTP/1.1 keeps a connection unless told otherwise.",
    "x-stainless-read-timeout": "Our time-outs are other ones: until the first piece, between two pieces, and in all.",
    "x-stainless-retry-count": "The engine repeats calls, and a repeat is a call like any other.",
}
"""Headers of the SDK's that are not sent, and why."""

THEIR_OWN = {"accept-encoding": "The SDK takes what its HTTP client can unpack; here that is bounded for these two."}
"""Headers whose values may differ, and why."""


class TestRequest:
    async def test_every_header_of_the_sdk_is_known_and_sent_or_listed(self, server: Recorder) -> None:
        theirs, ours = await both(server.url, server)
        unlike = {
            name: value for name, value in theirs.by_name.items() if not re.fullmatch(HEADERS.get(name, ""), value)
        }
        assert {} == {name: value for name, value in unlike.items() if name not in THEIR_OWN}
        assert HEADERS.keys() == theirs.by_name.keys()
        expected = {name: value for name, value in theirs.by_name.items() if name not in NOT_OURS}
        told = {name: HEADERS[name] for name in THEIR_OWN}
        assert expected | told == ours.by_name

    @pytest.mark.parametrize(
        "base",
        ["/v1", "/v1/", "", "/", "/a%20b/%C3%A9/v1", "/openai/deployments/m-1", "/v1//a", "/a;b=c/v1"],
    )
    async def test_the_address_is_made_of_a_base_url_as_the_sdk_makes_it(self, server: Recorder, base: str) -> None:
        theirs, ours = await both(f"http://127.0.0.1:{server.port}{base}", server)
        assert theirs.line == ours.line

    async def test_slashes_at_the_end_of_a_base_url_are_one(self, server: Recorder) -> None:
        """The SDK keeps them, and servers know no such path."""
        theirs, ours = await both(f"{server.url}//", server)
        assert "POST /v1//chat/completions HTTP/1.1" == theirs.line
        assert "POST /v1/chat/completions HTTP/1.1" == ours.line

    async def test_a_query_of_the_base_url_is_the_sdks_default_query(self, server: Recorder) -> None:
        assert None is await by_sdk(server.url, query={"api-version": "2026-01-01", "tier": "a b"})
        assert None is await by_us(f"{server.url}?api-version=2026-01-01&tier=a+b")
        theirs, ours = server.took()
        assert theirs.line == ours.line

    @pytest.mark.parametrize(
        ("request_", "asked"),
        [
            (REQUEST, ASKED),
            (
                REQUEST._replace(
                    instruction='Say "é😀\u2028"\n',
                    generation=v1.Generation(temperature=0.1, top_p=1.0, seed=2**53 + 1, max_output_tokens=7),
                    tools=[Tool("look", "Looks.", '{"type":"object","properties":{"at":{"type":"number"}}}')],
                ),
                {
                    "model": "m",
                    "messages": [{"role": "system", "content": 'Say "é😀\u2028"\n'}, *ASKED["messages"]],
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "tools": [
                        {
                            "type": "function",
                            "function": {
                                "name": "look",
                                "description": "Looks.",
                                "parameters": {"type": "object", "properties": {"at": {"type": "number"}}},
                            },
                        }
                    ],
                    "temperature": 0.1,
                    "top_p": 1.0,
                    "seed": 2**53 + 1,
                    "max_tokens": 7,
                },
            ),
        ],
        ids=["the smallest", "more"],
    )
    async def test_the_body_says_what_the_sdk_says(
        self, server: Recorder, request_: ModelRequest, asked: Mapping[str, Any]
    ) -> None:
        assert None is await by_sdk(server.url, asked)
        assert None is await by_us(server.url, request_)
        theirs, ours = server.took()
        assert json.loads(theirs.body) == json.loads(ours.body)


class TestEnvironment:
    async def test_headers_that_an_operator_adds(self, server: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Team: night\nuser-agent: mine\nX-Stainless-OS: none")
        theirs, ours = await both(server.url, server)
        assert ("night", "mine", "none") == tuple(
            ours.by_name[name] for name in ("x-team", "user-agent", "x-stainless-os")
        )
        unlike = {name for name, value in theirs.by_name.items() if ours.by_name.get(name) != value}
        assert unlike <= NOT_OURS.keys() | THEIR_OWN.keys()

    @pytest.mark.parametrize(
        ("url", "sent"),
        [("http://api.openai.com/v1", True), ("http://eu.api.openai.com/v1", True), (f"http://{HOST}/v1", False)],
    )
    async def test_organization_and_project_go_to_openai_alone(
        self, proxy: Recorder, monkeypatch: pytest.MonkeyPatch, url: str, sent: bool
    ) -> None:
        """The SDK sends them to every provider; here only OpenAI gets them."""
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
        monkeypatch.setenv("OPENAI_PROJECT_ID", "project-1")
        theirs, ours = await both(url, proxy)
        told = {"openai-organization": "org-1", "openai-project": "project-1"}
        assert told.items() <= theirs.by_name.items()
        assert (told if sent else {}) == {name: ours.by_name[name] for name in told if name in ours.by_name}
        assert (theirs.line, theirs.by_name["host"]) == (ours.line, ours.by_name["host"])

    @pytest.mark.parametrize(
        ("host", "environment", "proxied"),
        [
            (HOST, {}, False),
            (HOST, {"HTTP_PROXY": "PROXY"}, True),
            (HOST, {"http_proxy": "PROXY"}, True),
            (HOST, {"HTTP_PROXY": "http://PROXY"}, True),
            (HOST, {"ALL_PROXY": "PROXY"}, True),
            (HOST, {"HTTPS_PROXY": "PROXY"}, False),
            (HOST, {"HTTP_PROXY": "PROXY", "NO_PROXY": "*"}, False),
            (HOST, {"HTTP_PROXY": "PROXY", "NO_PROXY": HOST}, False),
            (HOST, {"HTTP_PROXY": "PROXY", "NO_PROXY": "Models.Test"}, False),
            (HOST, {"HTTP_PROXY": "PROXY", "NO_PROXY": "a.test, models.test"}, False),
            (HOST, {"HTTP_PROXY": "PROXY", "NO_PROXY": "test"}, False),
            (HOST, {"HTTP_PROXY": "PROXY", "NO_PROXY": "dels.test"}, True),
            (HOST, {"HTTP_PROXY": "PROXY", "NO_PROXY": ".models.test"}, True),
            (f"a.{HOST}", {"HTTP_PROXY": "PROXY", "NO_PROXY": HOST}, False),
            (f"a.{HOST}", {"HTTP_PROXY": "PROXY", "NO_PROXY": f".{HOST}"}, False),
            (f"a.{HOST}", {"HTTP_PROXY": "PROXY", "NO_PROXY": f"*.{HOST}"}, False),
            (HOST, {"HTTP_PROXY": "PROXY", "NO_PROXY": f"{HOST}:PORT"}, False),
            (HOST, {"HTTP_PROXY": "PROXY", "NO_PROXY": f"{HOST}:1"}, True),
            (HOST, {"HTTP_PROXY": "PROXY", "NO_PROXY": f"http://{HOST}"}, False),
            (HOST, {"HTTP_PROXY": "PROXY", "NO_PROXY": f"https://{HOST}"}, True),
            ("127.0.0.1", {"HTTP_PROXY": "PROXY"}, True),
            ("127.0.0.1", {"HTTP_PROXY": "PROXY", "NO_PROXY": "127.0.0.1"}, False),
            ("127.0.0.1", {"HTTP_PROXY": "PROXY", "NO_PROXY": "127.0.0.2"}, True),
            ("127.0.0.1", {"HTTP_PROXY": "PROXY", "NO_PROXY": "127.0.0.0/8"}, False),
            ("127.0.0.1", {"HTTP_PROXY": "PROXY", "NO_PROXY": "10.0.0.0/8"}, True),
            ("127.0.0.1", {"HTTP_PROXY": "PROXY", "NO_PROXY": "::1,fe80::/10"}, True),
            ("localhost", {"HTTP_PROXY": "PROXY", "NO_PROXY": "localhost"}, False),
            ("localhost", {"HTTP_PROXY": "PROXY", "NO_PROXY": "127.0.0.1"}, True),
        ],
    )
    async def test_the_proxy_that_the_environment_names_is_the_one_of_the_sdk(
        self,
        server: Recorder,
        proxy: Recorder,
        monkeypatch: pytest.MonkeyPatch,
        host: str,
        environment: dict[str, str],
        proxied: bool,
    ) -> None:
        for name, value in environment.items():
            told = value.replace("PROXY", f"127.0.0.1:{proxy.port}").replace("PORT", str(server.port))
            monkeypatch.setenv(name, told)
        url = f"http://{host}:{server.port}/v1"
        theirs, ours = await both(url, proxy if proxied else server)
        assert theirs.line == ours.line
        assert (f"POST {url if proxied else '/v1'}/chat/completions HTTP/1.1") == ours.line

    @pytest.mark.filterwarnings(
        "ignore:.*proxy_auth.* is deprecated", "ignore:BasicAuth is deprecated"
    )  # the SDK's way
    async def test_the_password_of_a_proxy_is_sent_to_it_and_not_to_the_provider(
        self, server: Recorder, proxy: Recorder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", f"http://me:p%40ss@127.0.0.1:{proxy.port}")
        theirs, ours = await both(server.url, proxy)
        assert "Basic bWU6cEBzcw==" == theirs.by_name["proxy-authorization"] == ours.by_name["proxy-authorization"]
        assert f"Bearer {KEY}" == ours.by_name["authorization"]

    @pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "socks5h://127.0.0.1:1", "ftp://127.0.0.1"])
    def test_a_proxy_that_does_not_speak_http_is_refused_at_once(
        self, monkeypatch: pytest.MonkeyPatch, proxy: str
    ) -> None:
        """The SDK's aiohttp client would speak HTTP to a SOCKS proxy."""
        monkeypatch.setenv("ALL_PROXY", proxy)
        with pytest.raises(ValueError, match="the proxy in the environment"):
            OpenAIProvider(KEY, f"http://{HOST}/v1", "m")

    async def test_https_goes_through_a_tunnel_that_sees_no_key(
        self, proxy: Recorder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        proxy.answers = [answer(502, b""), answer(502, b"")]
        assert isinstance(await by_sdk(f"https://{HOST}/v1"), openai.APIConnectionError)
        refused = await by_us(f"https://{HOST}/v1")
        assert refused is not None
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == refused.reason
        theirs, ours = proxy.took()
        assert f"CONNECT {HOST}:443 HTTP/1.1" == theirs.line == ours.line
        assert "authorization" not in ours.by_name


class Waits(list[float]):
    """How long the SDK waited before each repeat. It does not wait here."""

    async def sleep(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    noted = Waits()
    monkeypatch.setattr(anyio, "sleep", noted.sleep)
    return noted


def is_repeated(error: NotecaseError) -> bool:
    """Whether the engine asks again after that failure."""
    passing = error.reason == v1.ERROR_REASON_MODEL_UNAVAILABLE
    return passing if error.repeats is None else error.repeats > 0


REFUSAL = b'{"error": {"message": "No.", "type": "stub"}}'


class Status(NamedTuple):
    """How an answer without further words is taken: what the SDK raises, and who asks again."""

    status: int
    raises: type[openai.APIStatusError]
    by_sdk: bool
    by_us: bool
    because: str = ""
    """Why the two differ."""


STATUSES = (
    Status(300, openai.APIStatusError, False, False),
    Status(302, openai.APIStatusError, False, False),
    Status(304, openai.APIStatusError, False, False),
    Status(400, openai.BadRequestError, False, False),
    Status(401, openai.AuthenticationError, False, False),
    Status(402, openai.APIStatusError, False, False),
    Status(403, openai.PermissionDeniedError, False, False),
    Status(404, openai.NotFoundError, False, False),
    Status(405, openai.APIStatusError, False, False),
    Status(406, openai.APIStatusError, False, False),
    Status(408, openai.APIStatusError, True, True),
    Status(409, openai.ConflictError, True, True),
    Status(410, openai.APIStatusError, False, False),
    Status(413, openai.APIStatusError, False, False),
    Status(415, openai.APIStatusError, False, False),
    Status(421, openai.APIStatusError, False, False),
    Status(422, openai.UnprocessableEntityError, False, False),
    Status(424, openai.APIStatusError, False, True, "TGI and Bedrock: the generation failed"),
    Status(425, openai.APIStatusError, False, True, "HTTP: too early, which passes"),
    Status(428, openai.APIStatusError, False, False),
    Status(429, openai.RateLimitError, True, True),
    Status(451, openai.APIStatusError, False, False),
    Status(498, openai.APIStatusError, False, True, "Groq: flex capacity is used up"),
    Status(499, openai.APIStatusError, False, True, "nginx before a model: the client went away"),
    Status(500, openai.InternalServerError, True, True),
    Status(501, openai.InternalServerError, True, False, "HTTP: it will not be there the next time either"),
    Status(502, openai.InternalServerError, True, True),
    Status(503, openai.InternalServerError, True, True),
    Status(504, openai.InternalServerError, True, True),
    Status(505, openai.InternalServerError, True, False, "HTTP: it will not be there the next time either"),
    Status(520, openai.InternalServerError, True, True),
    Status(529, openai.InternalServerError, True, True),
)

BACKOFF, NEVER = "a wait of its own", "not repeated"


class Wait(NamedTuple):
    """How long is waited after a 429 with these headers: by the SDK, and as we tell the engine."""

    headers: dict[str, str]
    by_sdk: float | str
    by_us: float | None
    because: str = ""


_NOW = "a wait of 0 is heeded; the engine adds its own"
_FAR = "whether so long a wait is worth it is the engine's decision"
WAITS = (
    Wait({}, BACKOFF, None),
    Wait({"retry-after": "7"}, 7.0, 7.0),
    Wait({"retry-after": "1.5"}, 1.5, 1.5),
    Wait({"retry-after": " 3 "}, 3.0, 3.0),
    Wait({"retry-after-ms": "250"}, 0.25, 0.25),
    Wait({"retry-after-ms": "250", "retry-after": "7"}, 0.25, 0.25),
    Wait({"retry-after-ms": "soon", "retry-after": "7"}, 7.0, 7.0),
    Wait({"retry-after": "soon"}, BACKOFF, None),
    Wait({"retry-after": "nan"}, BACKOFF, None),
    Wait({"retry-after": "inf"}, BACKOFF, None),
    Wait({"retry-after": "0"}, BACKOFF, 0.0, _NOW),
    Wait({"retry-after": "-1"}, BACKOFF, 0.0, _NOW),
    Wait({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, BACKOFF, 0.0, _NOW),
    Wait(
        {"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT", "date": "Fri, 31 Dec 1999 23:59:29 GMT"},
        BACKOFF,
        30.0,
        "a date counts from the answer's own, since clocks differ",
    ),
    Wait({"retry-after": "120"}, 120.0, 120.0),
    Wait({"retry-after": "121"}, NEVER, 121.0, _FAR),
    Wait({"retry-after": "1e300"}, NEVER, 86400.0, _FAR),
)


class Advice(NamedTuple):
    """An answer that says itself whether to ask again."""

    status: int
    should_retry: str
    by_sdk: bool
    by_us: bool
    because: str = ""


ADVICE = (
    Advice(500, "false", False, False),
    Advice(429, "false", False, False),
    Advice(400, "false", False, False),
    Advice(500, "true", True, True),
    Advice(500, "maybe", True, True),
    Advice(400, "true", True, False, "a request that is refused is refused again"),
)


class TestAnswers:
    """The engine retries, and not the provider, so the test compares whether a retry would follow, and when."""

    @pytest.mark.parametrize("row", STATUSES, ids=lambda row: str(row.status))
    async def test_a_status(self, server: Recorder, waits: Waits, row: Status) -> None:
        assert bool(row.because) == (row.by_sdk != row.by_us)
        server.answers = [answer(row.status, REFUSAL if row.status != 304 else b"")] * 2
        theirs = await by_sdk(server.url, retries=1)
        assert row.raises is type(theirs)
        assert (len(server.took()), len(waits)) == ((2, 1) if row.by_sdk else (1, 0))
        server.answers = [answer(row.status, REFUSAL if row.status != 304 else b"")]
        ours = await by_us(server.url)
        assert ours is not None
        assert (1, row.by_us) == (len(server.took()), is_repeated(ours))

    @pytest.mark.parametrize("status", [200, 201, 202, 203, 206])
    async def test_a_status_of_success(self, server: Recorder, status: int) -> None:
        server.answers = [answer(status), answer(status)]
        await both(server.url, server)

    @pytest.mark.parametrize("row", WAITS, ids=lambda row: str(row.headers))
    async def test_a_requested_wait(self, server: Recorder, waits: Waits, row: Wait) -> None:
        server.answers = [answer(429, REFUSAL, **row.headers)]
        theirs = await by_sdk(server.url, retries=1)
        told = waits[0] if waits else NEVER
        if row.by_sdk == BACKOFF:
            assert 0.0 < waits[0] <= 0.5
            told = BACKOFF
        assert (row.by_sdk, row.by_sdk == NEVER) == (told, theirs is not None)
        same = row.by_sdk == row.by_us or (row.by_sdk == BACKOFF and row.by_us is None)
        assert bool(row.because) != same
        server.answers = [answer(429, REFUSAL, **row.headers)]
        ours = await by_us(server.url, clock=lambda: 2_000_000_000_000_000)
        assert ours is not None
        assert row.by_us == ours.retry_after

    @pytest.mark.parametrize("row", ADVICE, ids=lambda row: f"{row.status} {row.should_retry}")
    async def test_advice(self, server: Recorder, waits: Waits, row: Advice) -> None:
        assert bool(row.because) == (row.by_sdk != row.by_us)
        server.answers = [answer(row.status, REFUSAL, x_should_retry=row.should_retry)]
        await by_sdk(server.url, retries=1)
        assert row.by_sdk == bool(waits)
        server.received.clear()
        server.answers = [answer(row.status, REFUSAL, x_should_retry=row.should_retry)]
        ours = await by_us(server.url)
        assert ours is not None
        assert row.by_us == is_repeated(ours)


class Redirect(NamedTuple):
    """Where a redirect to /v2 of the same origin leads: the methods that /v2 is asked by, if it is."""

    status: int
    by_sdk: str
    by_us: str
    because: str = ""


REDIRECTS = (
    Redirect(301, "GET", "POST", "the same request, since a model answers no other"),
    Redirect(302, "GET", "POST", "the same request, since a model answers no other"),
    Redirect(303, "GET", "", "it names the result of a request, which a stream has not"),
    Redirect(307, "POST", "POST"),
    Redirect(308, "POST", "POST"),
)


class TestRedirects:
    @pytest.mark.parametrize("row", REDIRECTS, ids=lambda row: str(row.status))
    async def test_within_the_origin(self, server: Recorder, row: Redirect) -> None:
        assert bool(row.because) == (row.by_sdk != row.by_us)
        for make, method in ((by_sdk, row.by_sdk), (by_us, row.by_us)):
            server.answers = [answer(row.status, b"", Location="/v2")]
            await make(server.url)
            first, *rest = server.took()
            assert [f"{method} /v2 HTTP/1.1"] * bool(method) == [sent.line for sent in rest]
            for sent in rest:
                assert first.by_name["authorization"] == sent.by_name["authorization"]
                assert (first.body if method == "POST" else b"") == sent.body

    async def test_to_another_origin_the_sdk_takes_the_conversation_and_we_take_nothing(
        self, server: Recorder, proxy: Recorder
    ) -> None:
        server.answers = [answer(307, b"", Location=proxy.url)] * 2
        assert None is await by_sdk(server.url)
        (theirs,) = proxy.took()
        assert "authorization" not in theirs.by_name
        assert ASKED == json.loads(theirs.body)
        ours = await by_us(server.url)
        assert ours is not None
        assert (v1.ERROR_REASON_MODEL_ERROR, []) == (ours.reason, proxy.took())

    async def test_the_sdk_follows_twenty_and_we_three(self, server: Recorder) -> None:
        for make, followed, fails in ((by_sdk, 20, False), (by_sdk, 21, True), (by_us, 3, False), (by_us, 4, True)):
            server.answers = [answer(307, b"", Location=f"/{number}") for number in range(followed)]
            assert fails == (await make(server.url) is not None)
            server.answers.clear()


class TestConnections:
    async def test_a_cut_before_the_answer(self, server: Recorder, waits: Waits) -> None:
        server.answers = [None, None, None]
        assert isinstance(await by_sdk(server.url, retries=1), openai.APIConnectionError)
        assert 2 == len(server.took())
        ours = await by_us(server.url)
        assert ours is not None
        assert (1, True) == (len(server.took()), is_repeated(ours))

    async def test_nobody_listens(self, waits: Waits) -> None:
        async with Recorder() as gone:
            pass
        assert isinstance(await by_sdk(gone.url, retries=1), openai.APIConnectionError)
        assert 1 == len(waits)
        ours = await by_us(gone.url)
        assert ours is not None
        assert is_repeated(ours)

    async def test_a_connection_that_is_not_taken_in_time(self, waits: Waits) -> None:
        """The queue of those who wait to be taken is full."""
        with socket.socket() as full, socket.socket() as first, socket.socket() as second:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            for waiting in (first, second):
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
            assert isinstance(await by_sdk(url, retries=1, connect=0.2), openai.APIConnectionError)
            assert 1 == len(waits)
            ours = await by_us(url, connect_timeout=0.2)
        assert ours is not None
        assert ("The model provider cannot be reached.", True) == (ours.message, is_repeated(ours))

    async def test_silence_before_the_answer(self, server: Recorder, waits: Waits) -> None:
        """The SDK asks again; we do not, since the server may be at work."""
        server.answers = [b""] * 3
        assert isinstance(await by_sdk(server.url, retries=1, read=1.0), openai.APITimeoutError)
        assert 2 == len(server.took())
        ours = await by_us(server.url, first_timeout=1.0)
        assert ours is not None
        assert (1, False) == (len(server.took()), is_repeated(ours))

    async def test_silence_within_the_reply(self, server: Recorder, waits: Waits) -> None:
        """The SDK gives up; the engine asks again, and tells the watchers to forget what came."""
        begun = answer(200, WHOLE).replace(b"data: [DONE]", b"").replace(b'"finish_reason":"stop"', b'"index":0')
        server.answers = [begun] * 2
        assert isinstance(await by_sdk(server.url, retries=1, read=1.0), openai.APITimeoutError)
        assert 1 == len(server.took())
        ours = await by_us(server.url, idle_timeout=1.0)
        assert ours is not None
        assert (1, True) == (len(server.took()), is_repeated(ours))
