"""Sends HTTP requests to the endpoint of a model: each call is one POST over pooled connections, and its answer is read
in bounded pieces.

The request goes out with aiohttp itself. URLs, certificates and the size of the pool are httpx2's, so that they are
interpreted as by the openai SDK.
"""

import asyncio
import contextlib
import math
import ssl
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import httpx2

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.limit import Limit
from notecase_server.models.pieces import Pieces

BROKEN = (aiohttp.ClientError,)
"""What a connection that cannot be made or breaks raises."""

DRAIN_SECONDS = 0.1
"""How long to wait for the end of a body whose reply is whole, to keep its connection: less than opening another costs
far away, and no more than the SDK's own iterator waits."""

_FAIR_BYTES = 32 << 10
"""Bytes of an answer after which other tasks get their turn: ten thousand lines of them take 10 ms, and packed answers
come without a pause."""

_MAX_HEADER_BYTES = 64 << 10
_MOST_HEADERS = 400
"""Of the head of an answer: proxies add policies and cookies of more than the 8 KB that aiohttp takes by itself. The
SDK's client takes 100 KB in all."""

_MOST_REDIRECTS = 3

_REDIRECTS = frozenset({301, 302, 307, 308})
"""Statuses that name another address for the same request. It is sent there as it was, within the same origin."""


class Wire:
    """The connections to one address. One object serves all calls at once."""

    def __init__(
        self,
        url: httpx2.URL,
        headers: Callable[[], Mapping[str, str]],
        certificates: ssl.SSLContext,
        limits: httpx2.Limits,
        proxy: str | None,
        *,
        connect_timeout: float,
        head_timeout: float,
    ) -> None:
        """`headers` is called once, within the running loop, and gives the headers of every request. Seconds:
        `connect_timeout` to connect, `head_timeout` until the head of an answer. `proxy` is the URL of the
        proxy to go through, if any."""
        self._url = str(url)
        self._headers = headers
        self._certificates = certificates
        self._limits = limits
        self._timeout = aiohttp.ClientTimeout(sock_connect=connect_timeout)
        self._head_timeout = head_timeout
        self._proxy = proxy
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self._open: set[Answer] = set()

    async def post(self, body: Pieces, limit: Limit) -> "Answer":
        """Sends a request, once more to each address that it is redirected to, and returns the answer, which the caller
        leaves. `limit` ends it when the head of an answer takes too long. Raises one of BROKEN; MODEL_ERROR for an
        address of another origin, where neither the conversation nor the key goes, and for a circle; MODEL_UNAVAILABLE
        once this is closed."""
        now = asyncio.get_running_loop().time
        length = None if body.whole else {"Content-Length": f"{body.size}"}
        sent_to = [self._url]
        while True:
            session = self._session or self._opened()
            limit.due = now() + self._head_timeout
            response = await session.post(sent_to[-1], data=body.whole or body, headers=length, allow_redirects=False)
            limit.due = math.inf
            if response.status not in _REDIRECTS or not (target := response.headers.get("Location")):
                return Answer(response, self._open)
            response.close()
            sent_to.append(_followed(sent_to, target, response.status))

    async def close(self) -> None:
        """Closes the connections. What is being read or sent fails with one of BROKEN. Idempotent."""
        self._closed = True
        # Closing the session alone would leave the readers of its connections waiting forever.
        for answer in tuple(self._open):
            answer.close()
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._closed:
            raise errors.model_unavailable("The connections to the model provider are closed.")
        connector = aiohttp.TCPConnector(
            limit=self._limits.max_connections or 0,
            keepalive_timeout=self._limits.keepalive_expiry,
            ssl=self._certificates,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=self._headers(),
            timeout=self._timeout,
            proxy=self._proxy,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=_FAIR_BYTES,
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
            max_headers=_MOST_HEADERS,
        )
        return self._session


class Answer:
    """One answer to a request, its body unread. Packed bodies are unpacked as they are read."""

    __slots__ = ("_content", "_open", "_response", "_since", "status")

    def __init__(self, response: aiohttp.ClientResponse, open_answers: "set[Answer]") -> None:
        """Is one of `open_answers` until it is closed."""
        self.status = response.status
        self._response = response
        self._content = response.content
        self._since = 0
        """Bytes that were read since other tasks had their turn."""
        self._open = open_answers
        open_answers.add(self)

    @property
    def headers(self) -> Mapping[str, str]:
        return self._response.headers

    async def read(self) -> bytes:
        """Returns what has come of the body, at most _FAIR_BYTES, or waits for more; empty at its end. Other tasks have
        their turn behind as much. Raises one of BROKEN."""
        if self._since >= _FAIR_BYTES:
            self._since = 0
            await asyncio.sleep(0)
        chunk = await self._content.read(_FAIR_BYTES)
        self._since += len(chunk)
        return chunk

    async def leave(self, *, whole: bool) -> None:
        """Closes the answer. Behind a `whole` reply the end of the body is read, if that comes soon, which lets its
        connection serve the next call; any other connection is dropped."""
        try:
            if whole and not self._content.is_eof():
                # Nothing of it is needed any more, so that whatever goes wrong here only costs the connection.
                with contextlib.suppress(TimeoutError, *BROKEN):
                    async with asyncio.timeout(DRAIN_SECONDS):
                        while await self.read():
                            pass
        finally:
            self.close()

    def close(self) -> None:
        """Drops the connection, unless the body was read to its end. A reader fails with one of BROKEN. Idempotent."""
        self._open.discard(self)
        if self._response.connection is not None:
            self._response.close()


def _followed(sent_to: list[str], target: str, status: int) -> str:
    """The address of a redirect. Raises MODEL_ERROR where nothing is sent to it."""
    before = httpx2.URL(sent_to[-1])
    try:
        url = before.join(target)
    except (httpx2.InvalidURL, UnicodeError, ValueError):
        raise _redirected(status, "to an invalid address") from None
    if _origin(url) != _origin(before):
        raise _redirected(status, "to another origin, which is not followed")
    if str(url) in sent_to or len(sent_to) > _MOST_REDIRECTS:
        raise _redirected(status, "in a circle")
    return str(url)


def _redirected(status: int, where: str) -> NotecaseError:
    return errors.model_error(
        f"The model provider redirects the call {where} (status {status}); its base URL may be wrong.", status=status
    )


def _origin(url: httpx2.URL) -> tuple[Any, ...]:
    return url.scheme, url.host, url.port
