"""Models behind any OpenAI-compatible Chat Completions endpoint: each call ends as a whole reply or as one typed
failure, and neither the key nor a header is ever told.

The openai SDK carries the request: its authentication and status errors, over its aiohttp transport. What costs CPU per
token and per message goes past it: the request's JSON is made by `request`, in the shape that `profiles` knows, and the
answer's bytes are read by `chat_stream`. Time-outs and repeats are here, since an operator sets them.
"""

import asyncio
import contextlib
import email.utils
import hashlib
import math
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import aiohttp
import httpx2
import msgspec
import openai
import structlog
from openai import RequestOptions
from openai.types.chat import ChatCompletionChunk

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.models.chat_stream import ChatReply
from notecase_server.models.contract import Delta, ModelRequest, Returned
from notecase_server.models.profiles import ROWS, Profiles, Row
from notecase_server.models.request import body, loaded, returns_data

log = structlog.get_logger(__name__)

Json = dict[str, Any]

OPENAI_URL = "https://api.openai.com/v1"

_BROKEN = (openai.APIConnectionError, httpx2.RequestError, aiohttp.ClientError)
"""What a connection that cannot be made or breaks raises: the transport translates most of aiohttp's errors, not
all."""

_DRAIN_SECONDS = 0.1
"""How long to wait for the end of a body whose reply is whole, to keep its connection: less than opening another costs
far away, and no more than the SDK's own iterator waits."""

_MAX_BACKOFF = 8.0
"""Seconds between two attempts, where the provider names none."""

_MAX_RETRY_AFTER = 24 * 3600.0
"""Seconds. A provider that names more is not down but gone, and any number must fit into RetryInfo."""

_TOLD_CHARS = 300
"""Of a provider's message: enough for its sentence, too little for a request that it echoes."""

_SECRET = re.compile(r"(?i)\bbearer\s+\S+|\bsk-[\w*.-]{6,}")

_TOO_LONG = re.compile(r"(?i)context_length|exceed_context|context (length|window|size)|prompt is too long")

_OVERLOADED = re.compile(r"(?i)overload|rate.?limit|too.many|unavailable|time.?d?.?out|capacity|server.?error|internal")


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
        max_retries: int = 2,
        retry_time: float = 60.0,
        profile: Mapping[str, Any] = MappingProxyType({}),
        rows: Sequence[Row] = ROWS,
    ) -> None:
        """An empty `api_key` is for servers that want none. `base_url` None is OpenAI's own; a query in it goes with
        each request. `profile` is an operator's choice as `profiles.read` gives it.

        Seconds: `connect_timeout` to connect; `first_timeout` until the first piece of a reply, `idle_timeout` between
        two, whatever else the server sends meanwhile; `whole_timeout` for a whole answer. `max_retries` counts what
        follows the first attempt, while nothing of a reply has come, and `retry_time` is how many seconds after it the
        last one may begin. A server that was silent for `first_timeout` is not asked again: it may be at work.

        The SDK would read some settings from the environment by itself. Key and base URL are always given to it, so
        that OPENAI_API_KEY, OPENAI_BASE_URL and an Authorization in OPENAI_CUSTOM_HEADERS have no say; OPENAI_ORG_ID
        and OPENAI_PROJECT_ID count for OpenAI's own endpoint only, being nobody else's business. HTTPS_PROXY and its
        relatives are honoured.

        Raises ValueError, without the key in it, when the key or the URL cannot work."""
        key = api_key or "none"
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError("the API key holds a space, a line break or a character outside ASCII")
        self._api_key = api_key
        self._default_model = default_model
        self._first_timeout = first_timeout
        self._idle_timeout = idle_timeout
        self._whole_timeout = whole_timeout
        self._max_retries = max_retries
        self._retry_time = retry_time
        url = _checked_url(base_url or OPENAI_URL)
        self._base_url = url.copy_with(query=None)
        self._query_secrets = [value for name, value in url.params.items() if value and name != "api-version"]
        host = self._base_url.host
        self._profiles = Profiles(host, profile, rows)
        self._tag = f"openai-{hashlib.sha256(str(self._base_url).encode()).hexdigest()[:16]}"
        """Stands for the endpoint, whose address is nobody's business, in the data that it gets back."""
        self._options: RequestOptions = {"headers": {"Content-Type": "application/json"}}
        auth = {"Authorization": f"Bearer {key}"}
        if self._profiles.of("").auth == "api-key":
            auth = {"api-key": key}
            # A redirect to another host takes the credential off only where it is in Authorization.
            headers: dict[str, str | openai.Omit] = {
                "Content-Type": "application/json",
                "Authorization": openai.Omit(),
            }
            self._options = {"headers": headers, "follow_redirects": False}
        # How long a server may be silent is looked at here, since it is another time before the reply and within it.
        timeout = httpx2.Timeout(None, connect=connect_timeout)
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=self._base_url,
            max_retries=0,
            timeout=timeout,
            default_headers=auth,
            default_query=dict(url.params),
            http_client=openai.DefaultAioHttpClient(timeout=timeout),
        )
        self._open: set[httpx2.Response] = set()
        if not host.endswith(".openai.com"):
            self._client.organization = self._client.project = None

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        """See Provider.stream. Closing it before its end drops the connection, which is how the provider learns of it.
        After Finish it ends within _DRAIN_SECONDS; who does not wait for that gives up the connection's next use."""
        request = await loaded(request)
        model = request.model or self._default_model
        sent = body(request, model, self._profiles.of(model), self._tag)
        if returns_data(request, model, self._tag):
            answer = self._answer(sent, lambda: body(request, model, self._profiles.of(model), "", with_data=False))
        else:
            answer = self._answer(sent)
        model = str(sent["model"])
        reply = ChatReply(model, lambda error: self._refused(_status_in(error), error, model))
        async with answer as response:
            chunks = response.aiter_bytes()
            clock = _Clock(self._first_timeout, self._idle_timeout, self._whole_timeout)
            try:
                while not reply.done:
                    async with asyncio.timeout_at(clock.due):
                        chunk = await anext(chunks, None)
                    if chunk is None:
                        break
                    pieces = reply.feed(chunk)
                    clock.heard(bool(pieces))
                    for piece in pieces:
                        yield piece
            except _BROKEN as error:
                if not reply.whole:
                    raise self._broken(error, "The connection to the model provider broke within the reply.") from error
            except TimeoutError:
                if not reply.whole:
                    raise errors.model_unavailable(clock.complaint) from None
            for piece in reply.end():
                yield _tagged(piece, self._tag, model)
            await _drain(chunks)

    async def close(self) -> None:
        """See Provider.close. A reply under way fails as MODEL_UNAVAILABLE, and so does one asked for later."""
        # Closing the client alone would leave the readers of its connections waiting for ever.
        for response in tuple(self._open):
            await response.aclose()
        await self._client.close()

    @contextlib.asynccontextmanager
    async def _answer(self, sent: Json, plainer: Callable[[], Json] | None = None) -> AsyncIterator[httpx2.Response]:
        """The provider's answer, its body unread; closed with the block. Where the provider refuses the request,
        `plainer` makes the one that is tried once instead. Raises what a refusal or a failure to reach it comes to."""
        try:
            try:
                response = await self._post(sent)
            except openai.APIStatusError as error:
                if plainer is None or error.status_code not in {400, 422} or self._is_too_long(error.body):
                    raise
                log.info("provider_data_refused", status=error.status_code)
                response = await self._post(plainer())
        except openai.APIStatusError as error:
            # Not chained: the SDK's error holds the provider's whole answer, which may echo the key.
            raise self._refused(
                error.status_code, error.body, str(sent["model"]), _retry_after(error.response.headers)
            ) from None
        except _BROKEN as error:
            raise self._broken(error, "The model provider cannot be reached.") from error
        except TimeoutError:
            raise errors.model_unavailable(_silent(self._first_timeout)) from None
        except RuntimeError:
            if not self._client.is_closed():
                raise
            raise errors.model_unavailable("The connections to the model provider are closed.") from None
        self._open.add(response)
        try:
            yield response
        finally:
            self._open.discard(response)
            await response.aclose()

    async def _post(self, sent: Json) -> httpx2.Response:
        """Sends a request until it is answered, as often as the settings say. Raises what the last attempt raised."""
        content = msgspec.json.encode(sent)
        loop = asyncio.get_running_loop()
        until = loop.time() + self._retry_time
        attempt = 0
        while True:
            try:
                async with asyncio.timeout(self._first_timeout):
                    # The method behind `create`, without its transforms: they cost per message of the history, and a
                    # sixth of a turn even for none.
                    stream = await self._client.post(
                        "/chat/completions",
                        cast_to=ChatCompletionChunk,
                        content=content,
                        options=self._options,
                        stream=True,
                        stream_cls=openai.AsyncStream[ChatCompletionChunk],
                    )
                    return stream.response
            except openai.APIStatusError as error:
                failure: Exception = error
                if not _is_passing(error.status_code, "") or error.response.headers.get("x-should-retry") == "false":
                    raise
                wait = _retry_after(error.response.headers)
            except _BROKEN as error:
                failure, wait = error, None
            attempt += 1
            if wait is None:
                wait = min(0.5 * 2 ** (attempt - 1), _MAX_BACKOFF) * random.uniform(0.75, 1.0)
            if attempt > self._max_retries or loop.time() + wait > until:
                raise failure
            log.info("model_request_repeated", attempt=attempt, seconds=round(wait, 3))
            await asyncio.sleep(wait)

    def _is_too_long(self, body: object) -> bool:
        message, code = _error_words(body)
        return _TOO_LONG.search(f"{code} {message}") is not None

    def _broken(self, error: BaseException, message: str) -> NotecaseError:
        """The client is told that, the log why."""
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        log.warning("model_unreachable", cause=self._told(f"{type(root).__name__}: {root}"))
        return errors.model_unavailable(message)

    def _refused(self, status: int | None, body: object, model: str, retry_after: float | None = None) -> NotecaseError:
        """What a status or an error object comes to."""
        message, code = _error_words(body)
        told = self._told(message)
        answer = f"status {status}" if status else "an error"
        facts: dict[str, object] = {"status": status} if status else {}
        if code and (code := self._told(code)):
            facts["code"] = code
        words = f": {told}" if told else "."
        if status != 429 and _TOO_LONG.search(f"{code} {message}"):
            facts["code"] = "context_length_exceeded"
            return errors.model_error(f"The conversation is longer than the model {model!r} takes{words}", **facts)
        if status in {401, 403} or "authentication" in code or code == "invalid_api_key":
            return errors.model_error(f"The model provider refused the server's credential ({answer}).", **facts)
        if code == "insufficient_quota":
            return errors.model_error(f"The server's account with the model provider is used up{words}", **facts)
        if _is_passing(status, code or message):
            return errors.model_unavailable(
                f"The model provider cannot answer just now ({answer}){words}", retry_after, **facts
            )
        return errors.model_error(f"The model provider refused the call of {model!r} ({answer}){words}", **facts)

    def _told(self, text: str) -> str:
        """A provider's words as they may be shown: one short line, and whatever it echoes, no key."""
        for secret in self._query_secrets:
            text = text.replace(secret, "[query]")
        if self._api_key:
            text = text.replace(self._api_key, "[key]")
        text = " ".join(_SECRET.sub("[key]", text).split())
        text = "".join(char if char.isprintable() else "\ufffd" for char in text)
        return text if len(text) <= _TOLD_CHARS else text[: _TOLD_CHARS - 1] + "…"


class _Clock:
    """How long an answer may go on: until its first piece, between two pieces, and in all. What is no piece of the
    reply, such as a comment that keeps the connection, counts as silence."""

    def __init__(self, first: float, idle: float, whole: float) -> None:
        self._now = asyncio.get_running_loop().time
        self._idle = idle
        self._limit = first
        self._whole = whole
        now = self._now()
        self._end = now + whole
        self.due = min(now + first, self._end)
        """The loop's time at which it has been too long."""

    def heard(self, piece: bool) -> None:
        """Bytes have come, with a piece of the reply in them or not."""
        if piece:
            self._limit = self._idle
            self.due = min(self._now() + self._idle, self._end)

    @property
    def complaint(self) -> str:
        if self.due == self._end:
            return f"The model provider's answer had no end within {self._whole:g} seconds."
        return _silent(self._limit)


def _silent(seconds: float) -> str:
    return f"The model provider sent nothing for {seconds:g} seconds."


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


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    """Reads the end of a body, which lets its connection serve the next call. The reply is whole, so that whatever goes
    wrong here only costs the connection."""
    with contextlib.suppress(TimeoutError, *_BROKEN):
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for _ in chunks:
                pass


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds a provider asks to wait. A date counts from the answer's own Date, since clocks differ."""
    for name, per_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / per_second
        except ValueError:
            continue
        if math.isfinite(seconds):
            return min(max(seconds, 0.0), _MAX_RETRY_AFTER)
    until, now = (email.utils.parsedate_tz(headers.get(name, "")) for name in ("retry-after", "date"))
    if until is None or now is None:
        return None
    try:
        seconds = float(email.utils.mktime_tz(until) - email.utils.mktime_tz(now))
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER)


def _error_words(body: object) -> tuple[str, str]:
    """The message, and the code or else the type, in the shapes that servers give an error: an object, an object in
    `error`, a plain string, `detail` of FastAPI. A web page says nothing."""
    if isinstance(body, dict):
        inner = body.get("error")
        if isinstance(inner, dict | str):
            body = inner
    if isinstance(body, str):
        return ("" if body.lstrip().startswith("<") else body), ""
    if not isinstance(body, dict):
        return "", ""
    message = next((body[name] for name in ("message", "detail") if isinstance(body.get(name), str)), "")
    code = next((body[name] for name in ("code", "type") if isinstance(body.get(name), str)), "")
    return message, code


def _status_in(error: object) -> int | None:
    """The HTTP status that an error object carries as its code: what came before it was a 200."""
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, str) and code.isdecimal() and len(code) == 3:
        code = int(code)
    return code if isinstance(code, int) and 400 <= code < 600 else None


def _is_passing(status: int | None, words: str) -> bool:
    """Whether a repeat may succeed. Only an error object without a status is judged by its words."""
    if status is not None:
        return status in {408, 409, 425, 429} or status >= 500
    return bool(_OVERLOADED.search(words))
