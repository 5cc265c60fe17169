"""Models behind any OpenAI-compatible Chat Completions endpoint: each call ends as a whole reply or as one typed
failure, and neither the key nor a header is ever told.

The openai SDK makes the headers and brings its aiohttp transport. The rest goes past it: the request's JSON is made by
`request`, the answer's bytes are read by `chat_stream`, refusals by `answers`, all bounded. Nothing is repeated here,
which is the engine's business.
"""

import asyncio
import contextlib
import hashlib
import itertools
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import aiohttp
import httpx2
import openai
import structlog
from notecase import v1

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.limit import Limit
from notecase_server.models.answers import media, provider_errors, too_long
from notecase_server.models.answers.media import Encoded
from notecase_server.models.answers.redaction import Redactor
from notecase_server.models.chat_stream import ChatReply
from notecase_server.models.contract import Delta, Media, ModelRequest, Returned
from notecase_server.models.pieces import encoded
from notecase_server.models.profiles import ROWS, Profiles, Row
from notecase_server.models.request import body, is_large, loaded, returns_data

log = structlog.get_logger(__name__)

T = TypeVar("T")

Json = dict[str, Any]

OPENAI_URL = "https://api.openai.com/v1"

_BROKEN = (openai.APIConnectionError, httpx2.RequestError, aiohttp.ClientError)
"""What a connection that cannot be made or breaks raises: the transport translates most of aiohttp's errors, not
all."""

_DRAIN_SECONDS = 0.1
"""How long to wait for the end of a body whose reply is whole, to keep its connection: less than opening another costs
far away, and no more than the SDK's own iterator waits."""

_MAX_REFUSAL_BYTES = 64 << 10
"""What is read of a refusal, unpacked: a sentence and its frame."""

_FAIR_BYTES = 32 << 10
"""Bytes of an answer after which other tasks get their turn: ten thousand lines of them take 10 ms, and packed answers
come without a pause."""

_MOST_REDIRECTS = 3

_REDIRECTS = frozenset({301, 302, 307, 308})
"""Statuses that name another address for the same request. It is sent there as it was, within the same origin."""


class OpenAIProvider:
    """The provider `openai`. One object, with one pool of connections, serves all runs at once."""

    def __init__(
        self,
        api_key: str,
        base_url: str | None,
        default_model: str,
        *,
        connect_timeout: float = 10.0,
        first_timeout: float = 600.0,
        idle_timeout: float = 300.0,
        whole_timeout: float = 3600.0,
        profile: Mapping[str, Any] = MappingProxyType({}),
        rows: Sequence[Row] = ROWS,
        clock: Callable[[], int] = lambda: 0,
    ) -> None:
        """An empty `api_key` is for servers that want none. `base_url` None is OpenAI's own; a query in it goes with
        each request. `profile` is an operator's choice as `profiles.read` gives it.

        Seconds: `connect_timeout` to connect; `first_timeout` until the first piece of a reply, `idle_timeout` between
        two, whatever else the server sends meanwhile; `whole_timeout` for a whole answer. A server that was silent for
        `first_timeout` is not asked again: it may be at work. `clock` gives microseconds since 1970, which count where
        a provider asks to wait until a date and names no Date of its own.

        The SDK would read some settings from the environment by itself. Key and base URL are always given to it, so
        that OPENAI_API_KEY, OPENAI_BASE_URL and an Authorization in OPENAI_CUSTOM_HEADERS have no say; OPENAI_ORG_ID
        and OPENAI_PROJECT_ID count for OpenAI's own endpoint only, being nobody else's business. HTTPS_PROXY and its
        relatives are honoured.

        Raises ValueError, without the key in it, when the key or the URL cannot work."""
        key = api_key or "none"
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError("the API key holds a space, a line break or a character outside ASCII")
        self._clock = clock
        self._default_model = default_model
        self._first_timeout = first_timeout
        self._idle_timeout = idle_timeout
        self._whole_timeout = whole_timeout
        url = _checked_url(base_url or OPENAI_URL)
        self._base_url = url.copy_with(query=None)
        secrets = [value for name, value in url.params.multi_items() if name != "api-version"]
        self._redactor = Redactor(api_key, *secrets)
        host = self._base_url.host
        self._profiles = Profiles(host, profile, rows)
        self._tag = f"openai-{hashlib.sha256(str(self._base_url).encode()).hexdigest()[:16]}"
        """Stands for the endpoint, whose address is nobody's business, in the data that it gets back."""
        auth: dict[str, Any] = {"Authorization": f"Bearer {key}"}
        if self._profiles.of("").auth == "api-key":
            auth = {"api-key": key, "Authorization": openai.Omit()}
        # How long a server may be silent is looked at here, since it is another time before the reply and within it.
        timeout = httpx2.Timeout(None, connect=connect_timeout)
        self._http = openai.DefaultAioHttpClient(timeout=timeout, follow_redirects=False)
        self._client = openai.AsyncOpenAI(
            api_key=key, base_url=self._base_url, default_headers=auth, http_client=self._http
        )
        path = f"{self._base_url.path.rstrip('/')}/chat/completions"
        self._url = url.copy_with(path=path)
        self._open: set[httpx2.Response] = set()
        if not host.endswith(".openai.com"):
            self._client.organization = self._client.project = None

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        """See Provider.stream. Closing it before its end drops the connection, which is how the provider learns of it.
        Once the reply is whole it ends, or is closed, within _DRAIN_SECONDS: its connection may then be used again."""
        model = request.model or self._default_model
        profile = self._profiles.of(model)
        given, request = request, await loaded(request, profile)
        shape = partial(body, request, model, profile, self._tag)
        large = request is not given or is_large(request)
        sent = await _made(shape, large)
        if returns_data(request, model, self._tag):
            plainer = partial(body, request, model, profile, "", with_data=False)
            answer = self._answer(sent, large, plainer)
        else:
            answer = self._answer(sent, large)
        model = str(sent["model"])
        reply = ChatReply(
            model,
            self._redactor,
            behind_calls=_is_behind_calls(request.messages),
            think_tags=self._profiles.of(model).think_tags,
            audio_format=_audio_format(sent),
        )
        made = itertools.count(1)
        cut: NotecaseError | None = None
        async with answer as response, _pieces(response, lambda: reply.done) as chunks:
            clock = _Clock(self._first_timeout, self._idle_timeout, self._whole_timeout)
            try:
                async with Limit() as limit:
                    while not reply.done:
                        limit.due = clock.due
                        chunk = await anext(chunks, None)
                        limit.due = math.inf  # what is done with the pieces takes its own time
                        if chunk is None:
                            break
                        pieces = reply.feed(chunk)
                        clock.heard(reply.heard)
                        for piece in pieces:
                            yield await _decoded(piece, next(made)) if isinstance(piece, Encoded) else piece
                        if not reply.done and (used := reply.used()) is not None:
                            yield used
            except _BROKEN as error:
                cut = self._broken(error, "The connection to the model provider broke within the reply.")
            except TimeoutError:
                cut = clock.complaint
            for piece in reply.end(cut):
                if isinstance(piece, Encoded):
                    yield await _decoded(piece, next(made))
                else:
                    yield _tagged(piece, self._tag, model)

    async def close(self) -> None:
        """See Provider.close. A reply under way fails as MODEL_UNAVAILABLE, and so does one asked for later."""
        # Closing the client alone would leave the readers of its connections waiting for ever.
        for response in tuple(self._open):
            await response.aclose()
        await self._client.close()

    @contextlib.asynccontextmanager
    async def _answer(
        self, sent: Json, large: bool, plainer: Callable[[], Json] | None = None
    ) -> AsyncIterator[httpx2.Response]:
        """The provider's answer, its body unread; closed with the block. Where the provider refuses the request,
        `plainer` makes the one that is tried once instead. A `large` request is written in a thread. Raises what a
        refusal or a failure to reach it comes to."""
        model = str(sent["model"])
        try:
            response = await self._sent(sent, large)
            if plainer is not None and response.status_code in {400, 422}:
                told = await self._words(response)
                await response.aclose()
                if too_long.is_too_long(told.codes, told.words):
                    raise provider_errors.failure(response.status_code, told, model, self._redactor)
                log.info("provider_data_refused", status=response.status_code)
                response = await self._sent(await _made(plainer, large), large)
        except _BROKEN as error:
            raise self._broken(error, "The model provider cannot be reached.") from error
        except TimeoutError:
            raise _silent(self._first_timeout, again=False) from None
        except RuntimeError:
            if not self._http.is_closed:
                raise
            raise errors.model_unavailable("The connections to the model provider are closed.") from None
        self._open.add(response)
        try:
            if not response.is_success:
                told = await self._words(response)
                wait = provider_errors.retry_after(response.headers, self._clock)
                refused = provider_errors.failure(response.status_code, told, model, self._redactor, wait)
                if response.headers.get("x-should-retry") == "false":
                    refused.repeats = 0
                raise refused
            yield response
        finally:
            self._open.discard(response)
            await response.aclose()

    async def _sent(self, body: Json, large: bool) -> httpx2.Response:
        """Sends the request, once more to each address that it is redirected to. Raises MODEL_ERROR for an address of
        another origin, where neither the conversation nor the key goes, and for a circle; TimeoutError when the head
        of the answer takes too long."""
        content = await _made(partial(encoded, body), large)
        url, seen = self._url, {self._url}
        headers = {name: value for name, value in self._client.default_headers.items() if isinstance(value, str)}
        headers |= {"Content-Type": "application/json", "Accept-Encoding": "gzip, deflate"}
        headers["Content-Length"] = f"{content.size}"
        while True:
            request = self._http.build_request("POST", url, content=content.whole or content, headers=headers)
            async with asyncio.timeout(self._first_timeout):
                response = await self._http.send(request, stream=True)
            target = response.headers.get("location")
            if response.status_code not in _REDIRECTS or not target:
                return response
            await response.aclose()
            try:
                url = url.join(target)
            except (httpx2.InvalidURL, UnicodeError, ValueError):
                raise _redirected(response.status_code, "to what is no address") from None
            if _origin(url) != _origin(request.url):
                raise _redirected(response.status_code, "to another origin, where nothing is sent")
            if url in seen or len(seen) > _MOST_REDIRECTS:
                raise _redirected(response.status_code, "in a circle")
            seen.add(url)

    async def _words(self, response: httpx2.Response) -> provider_errors.Told:
        """What a refusal says, of as much of its body as a refusal takes."""
        body = bytearray()
        with contextlib.suppress(TimeoutError, *_BROKEN):
            async with asyncio.timeout(self._idle_timeout):
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > _MAX_REFUSAL_BYTES:
                        break
        return provider_errors.told_by_body(bytes(body[:_MAX_REFUSAL_BYTES]))

    def _broken(self, error: BaseException, message: str) -> NotecaseError:
        """The client is told that, the log why."""
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        log.warning("model_unreachable", cause=self._redactor.told(f"{type(root).__name__}: {root}"))
        return errors.model_unavailable(message)


class _Clock:
    """How long an answer may go on: until its first piece, between two pieces, and in all. What is no piece of the
    reply, such as a comment that keeps the connection, counts as silence."""

    def __init__(self, first: float, idle: float, whole: float) -> None:
        self._now = asyncio.get_running_loop().time
        self._idle = idle
        self._limit = first
        self._begun = False
        self._whole = whole
        now = self._now()
        self._end = now + whole
        self.due = min(now + first, self._end)
        """The loop's time at which it has been too long."""

    def heard(self, piece: bool) -> None:
        """Bytes have come, with a piece of the reply in them or not."""
        if piece:
            self._begun = True
            self._limit = self._idle
            self.due = min(self._now() + self._idle, self._end)

    @property
    def complaint(self) -> NotecaseError:
        if self.due == self._end:
            return errors.model_unavailable(f"The model provider's answer had no end within {self._whole:g} seconds.")
        return _silent(self._limit, again=self._begun)


def _silent(seconds: float, *, again: bool) -> NotecaseError:
    """A server that has not begun may be at work, which asking again would only double."""
    failure = errors.model_unavailable(f"The model provider sent nothing for {seconds:g} seconds.")
    failure.repeats = None if again else 0
    return failure


def _redirected(status: int, where: str) -> NotecaseError:
    return errors.model_error(
        f"The model provider redirects the call {where} (status {status}); its base URL may be wrong.", status=status
    )


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


async def _made(make: Callable[[], T], large: bool) -> T:
    """What is large is made in a thread."""
    return await asyncio.to_thread(make) if large else make()


def _is_behind_calls(messages: Sequence[v1.Message]) -> bool:
    """Whether a request ends with the outcomes of calls, behind which a model may have nothing more to say."""
    return bool(messages) and any(part.HasField("tool_call") for part in messages[-1].parts)


async def _decoded(found: Encoded, number: int) -> Media:
    """The content, decoded off the loop: it may have megabytes."""
    return await asyncio.to_thread(media.decoded, found, number)


def _audio_format(sent: Json) -> str:
    """The format that `generation.extra` asks for."""
    audio = sent.get("audio")
    asked = audio.get("format") if isinstance(audio, dict) else None
    return asked if isinstance(asked, str) else ""


def _tagged(piece: Delta, provider: str, model: str) -> Delta:
    if isinstance(piece, Returned):
        piece.data.provider, piece.data.model = provider, model
    return piece


def _checked_url(base_url: str) -> httpx2.URL:
    """Raises ValueError for what cannot be a base URL, or would put a secret where URLs are logged."""
    try:
        url = httpx2.URL(base_url)
        url.host.encode("idna")
    except (httpx2.InvalidURL, UnicodeError):
        raise ValueError("the base URL is no URL") from None
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError("the base URL must begin with http:// or https:// and name a host")
    if url.userinfo or url.fragment:
        raise ValueError("the base URL must hold neither credentials nor a fragment")
    return url


async def _fairly(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yields an answer in pieces of at most _FAIR_BYTES, and lets other tasks have their turn behind as much."""
    size = 0
    async for chunk in chunks:
        for start in range(0, len(chunk), _FAIR_BYTES):
            if size >= _FAIR_BYTES:
                size = 0
                await asyncio.sleep(0)
            piece = chunk[start : start + _FAIR_BYTES]
            size += len(piece)
            yield piece


@contextlib.asynccontextmanager
async def _pieces(
    response: httpx2.Response, is_whole: Callable[[], bool]
) -> AsyncIterator[AsyncGenerator[bytes, None]]:
    """The body of an answer in fair pieces. Behind a whole reply the end of the body is read, which lets its connection
    serve the next call; any other connection is closed."""
    async with (
        contextlib.aclosing(response.aiter_bytes()) as body,
        contextlib.aclosing(_fairly(body)) as chunks,
    ):
        try:
            yield chunks
        finally:
            if is_whole():
                await _read_on(chunks)


async def _read_on(chunks: AsyncIterator[bytes]) -> None:
    """Reads a body to its end, if that comes soon. Nothing of it is needed any more, so whatever goes wrong here only
    costs the connection."""
    with contextlib.suppress(TimeoutError, *_BROKEN):
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for _ in chunks:
                pass
