"""Models behind any OpenAI-compatible Chat Completions endpoint: each call ends as a whole reply or as one typed
failure, and neither the key nor a header is ever told.

The openai SDK makes the headers, once. The rest goes past it: the request's JSON is made by `request` and goes out
over `wire`, the answer's bytes are read by `chat_stream`, refusals by `answers`, all bounded. Nothing is repeated here,
which is the engine's business.
"""

import asyncio
import contextlib
import hashlib
import itertools
import math
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from types import MappingProxyType
from typing import Any

import httpx2
import msgspec
import openai
import structlog
from notecase import v1

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.limit import Limit
from notecase_server.models.answers import media, provider_errors
from notecase_server.models.answers.media import Encoded
from notecase_server.models.answers.redaction import Redactor
from notecase_server.models.chat_stream import UNREADABLE, ChatReply, Piece
from notecase_server.models.contract import MUCH_BYTES, Delta, Media, ModelRequest, Returned, Text
from notecase_server.models.endpoint import endpoint_of
from notecase_server.models.pieces import Pieces, encoded
from notecase_server.models.profiles import ROWS, Profile, Profiles, Row, after
from notecase_server.models.request import body, is_large, model_of, returns_data
from notecase_server.models.request_content import in_names, loaded
from notecase_server.models.wire import BROKEN, Answer, Wire

log = structlog.get_logger(__name__)

_OF_CONTENT = re.compile(
    r"(?i)\bimages?\b|image_url|vision|multi-?modal|modalit|\baudio\b|\bmedia\b|\bfiles?\b|`text`"
    r"|\bcontent\b.{0,80}\bstring\b"
)
"""What a provider says that takes text alone. DeepSeek: unknown variant `image_url`, expected `text`; Groq:
'messages.1.content' : value must be a string."""

_CREDENTIALS = re.compile(r"//[^/\s]*@")
"""What an address may have before its host: a proxy's user and password."""

_MAX_REFUSAL_BYTES = 64 << 10
"""What is read of a refusal, unpacked: a sentence and its frame."""


class _Sent(msgspec.Struct):
    """A request as it goes out, and what of it counts for its reply."""

    model: str
    audio_format: str
    body: Pieces


class OpenAIProvider:
    """The provider `openai`. One object, with one pool of connections, serves all runs at once, of one loop."""

    def __init__(
        self,
        api_key: str,
        base_url: str | None,
        default_model: str,
        *,
        key_source: str = "",
        model_source: str = "",
        headers: Mapping[str, str] = MappingProxyType({}),
        connect_timeout: float = 10.0,
        first_timeout: float = 600.0,
        idle_timeout: float = 300.0,
        whole_timeout: float = 3600.0,
        profile: Mapping[str, Any] = MappingProxyType({}),
        rows: Sequence[Row] = ROWS,
        clock: Callable[[], int] = lambda: 0,
    ) -> None:
        """An empty `api_key` is for servers that want none. `base_url` None is OpenAI's own; a query in it goes with
        each request, and so do `headers`, whose values are kept as secret as the key. `key_source` and
        `model_source` are the settings that have the key and the default model, for the errors that the provider
        refuses them. `profile` is an operator's choice as `profiles.read`
        gives it.

        Seconds: `connect_timeout` to connect; `first_timeout` until the first piece of a reply, `idle_timeout` between
        two, whatever else the server sends meanwhile; `whole_timeout` for a whole answer. A server that was silent for
        `first_timeout` is not asked again: it may be at work. `clock` gives microseconds since 1970, which count where
        a provider asks to wait until a date and names no Date of its own.

        The SDK would read some settings from the environment by itself. Key and base URL are always given to it, so
        that OPENAI_API_KEY, OPENAI_BASE_URL and an Authorization in OPENAI_CUSTOM_HEADERS have no say; OPENAI_ORG_ID
        and OPENAI_PROJECT_ID count for OpenAI's own endpoint only, being nobody else's business. HTTPS_PROXY and its
        relatives are honoured.

        Raises ValueError, without the key in it, when the key, the URL or the proxy cannot work."""
        endpoint = endpoint_of(api_key, base_url, headers)
        self._clock = clock
        self._default_model = default_model
        self._model_source = model_source
        self._first_timeout = first_timeout
        self._idle_timeout = idle_timeout
        self._whole_timeout = whole_timeout
        url, host = endpoint.url, endpoint.url.host
        self._base_url = url.copy_with(query=None)
        secrets = [value for name, value in url.params.multi_items() if name != "api-version"]
        self._redactor = Redactor(api_key, *secrets, *headers.values(), source=key_source)
        self._profiles = Profiles(host, profile, rows)
        self._tag = f"openai-{hashlib.sha256(str(self._base_url).encode()).hexdigest()[:16]}"
        """Stands for the endpoint, whose address is nobody's business, in the data that it gets back."""
        auth: dict[str, Any] = {"Authorization": f"Bearer {endpoint.key}"}
        if self._profiles.of("").auth == "api-key":
            auth = {"api-key": endpoint.key, "Authorization": openai.Omit()}
        certificates = httpx2.create_ssl_context()
        self._client = openai.AsyncOpenAI(
            api_key=endpoint.key,
            base_url=self._base_url,
            default_headers={**auth, **headers},
            http_client=httpx2.AsyncClient(verify=certificates, trust_env=False),
        )
        if not host.endswith(".openai.com"):
            self._client.organization = self._client.project = None
        path = f"{self._base_url.path.rstrip('/')}/chat/completions"
        self._wire = Wire(
            url.copy_with(path=path),
            self._headers,
            certificates,
            openai.DEFAULT_CONNECTION_LIMITS,
            endpoint.proxy,
            connect_timeout=connect_timeout,
            head_timeout=first_timeout,
        )

    def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        """See Provider.stream. Closing it before its end drops the connection, which is how the provider learns of it.
        Once the reply is whole it ends, or is closed, within wire.DRAIN_SECONDS: its connection may be used again."""
        return self._tried_twice(request) if request.texts is None else self._tried(request)

    async def _tried_twice(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        """As `_tried`. If the provider refuses something that the request can do without, it is sent once more without
        that. A failure that may pass is raised only if that fails as well."""
        begun = False
        try:
            async with aclosing(self._tried(request)) as stream:
                async for delta in stream:
                    begun = True
                    yield delta
            return
        except NotecaseError as error:
            if begun or (plainer := await self._plainer(request, error)) is None:
                raise
            refused = error.with_traceback(None)  # its frames hold the first request
        try:
            async with aclosing(plainer) as stream:
                async for delta in stream:
                    begun = True
                    yield delta
        except NotecaseError:
            if begun or refused.reason == v1.ERROR_REASON_MODEL_ERROR:
                raise
            raise refused from None

    async def _plainer(self, request: ModelRequest, error: NotecaseError) -> AsyncGenerator[Delta, None] | None:
        """What to try after the error: the request with older content named, if the model takes none, or without the
        provider's own data. Nothing after an error with usage: the request was accepted."""
        if error.usage is not None:
            return None
        status, large = error.metadata.get("status"), is_large(request)
        refused = error.of_request or error.reason == v1.ERROR_REASON_MODEL_ERROR
        _, _, words = error.message.partition(": ")  # before them is the model's name, which may have such words too
        if refused and _OF_CONTENT.search(words):
            name = partial(in_names, request.messages)
            if (named := await asyncio.to_thread(name) if large else name()) is not None:
                log.info("content_refused", status=status)
                return self._tried(request._replace(messages=named))
        look = partial(returns_data, request, model_of(request, self._default_model), self._tag)
        if error.of_request and (await asyncio.to_thread(look) if large else look()):
            log.info("provider_data_refused", status=status)
            return self._tried(request, with_data=False)
        return None

    async def _tried(
        self, request: ModelRequest, *, with_data: bool = True, forms: Sequence[Profile] = ()
    ) -> AsyncGenerator[Delta, None]:
        """A call in the last of `forms`, those before it being refused. If an answer refuses that as well, the request
        is sent again in the form that the answer names."""
        model = model_of(request, self._default_model)
        tried = [*forms] or [self._profiles.of(model)]
        profile = tried[-1]
        write, sent, behind_calls = await self._ready(request, model, profile, with_data=with_data)
        reply = ChatReply(sent.model, self._redactor, behind_calls, profile.think_tags, sent.audio_format)
        made = itertools.count(1)
        cut: NotecaseError | None = None
        answer: Answer | None = None
        clock: _Clock | None = None
        try:
            try:
                async with Limit() as limit:
                    unnamed = not request.model and model == self._default_model
                    answer = await self._accepted(sent, write, tried, limit, default=unnamed)
                    sent.body = Pieces([])  # it may have megabytes, which nobody needs while the answer is read
                    clock = _Clock(self._first_timeout, self._idle_timeout, self._whole_timeout)
                    while not reply.done:
                        limit.due = clock.due
                        chunk = await answer.read()
                        limit.due = math.inf  # what is done with the pieces takes its own time
                        if not chunk:
                            break
                        pieces = reply.feed(chunk)
                        if reply.heard:
                            clock.heard()
                        for piece in pieces if len(pieces) < 2 else _joined(pieces):
                            yield await _decoded(piece, next(made)) if isinstance(piece, Encoded) else piece
            except BROKEN as error:
                cut = self._broken(error, "The connection to the model provider broke during the reply.")
            except TimeoutError:
                if clock is None:
                    raise _silent(self._first_timeout, again=False) from None
                cut = clock.complaint
            last: Sequence[Piece] | None = None
            try:
                last = reply.end(cut)
            except NotecaseError as error:
                if clock is None or clock.begun or await self._other(error, write, tried) is None:
                    raise
            for piece in last or ():
                if isinstance(piece, Returned):
                    piece.data.provider, piece.data.model = self._tag, sent.model
                yield await _decoded(piece, next(made)) if isinstance(piece, Encoded) else piece
        finally:
            if answer is not None:
                await answer.leave(whole=reply.done)
        if last is not None:
            return
        async with aclosing(self._tried(request, with_data=with_data, forms=tried)) as stream:
            async for delta in stream:
                yield delta

    async def _ready(
        self, request: ModelRequest, model: str, profile: Profile, *, with_data: bool
    ) -> tuple[Callable[[Profile], _Sent], _Sent, bool]:
        """Returns what writes the request in any form, the request in that of `profile`, and whether it ends with the
        outcomes of calls."""
        large, behind_calls = is_large(request), False
        if request.texts is None:
            given, request = request, await loaded(request, profile)
            large = large or request is not given
            behind_calls = _is_behind_calls(request.messages)
        write = partial(_written, request, model, self._tag, with_data=with_data)
        sent = await asyncio.to_thread(write, profile) if large else write(profile)
        return write, sent, behind_calls

    async def close(self) -> None:
        """See Provider.close. A reply under way fails as MODEL_UNAVAILABLE, and so does one asked for later."""
        await self._wire.close()

    def _headers(self) -> Mapping[str, str]:
        """The headers of every request, as the SDK makes them. It says there which loop runs."""
        made: dict[str, tuple[str, str]] = {}
        sent = {"Content-Type": "application/json", "Accept-Encoding": "gzip, deflate"}
        for name, value in (self._client.default_headers | sent).items():
            if isinstance(value, str):
                made[name.lower()] = name, value  # an operator may have written a name in another case
        return dict(made.values())

    async def _accepted(
        self, sent: _Sent, write: Callable[[Profile], _Sent], tried: list[Profile], limit: Limit, *, default: bool
    ) -> Answer:
        """As `_answer`. If the provider refuses the form of the request, and says what it takes instead, the request is
        sent again in that form: once for each that it refuses. `tried` has those so far."""
        while True:
            try:
                return await self._answer(sent, limit, default=default)
            except NotecaseError as error:
                if (again := await self._other(error, write, tried, sent)) is None:
                    raise
                sent.body = again.body

    async def _other(
        self, error: NotecaseError, write: Callable[[Profile], _Sent], tried: list[Profile], sent: _Sent | None = None
    ) -> _Sent | None:
        """Returns the request in the form that a refusal of the last one names, and adds that to `tried`; None if the
        refusal names none, or the request is the same in it."""
        if not error.of_request or error.usage is not None or (other := after(error.message, tried[-1])) in tried:
            return None
        before = await asyncio.to_thread(write, tried[-1]) if sent is None else sent
        again = await asyncio.to_thread(write, other)
        if again.body.is_same(before.body):
            return None
        log.info("request_form_refused", status=error.metadata.get("status"))
        tried.append(other)
        return again

    async def _answer(self, sent: _Sent, limit: Limit, *, default: bool) -> Answer:
        """Returns the provider's answer, its body unread. Raises what a refusal or a failure to reach it comes to;
        `limit` ends it where the provider is silent. `default` says that the agent names no model."""
        try:
            answer = await self._wire.post(sent.body, limit)
        except BROKEN as error:
            raise self._broken(error, "The model provider cannot be reached.") from error
        if 200 <= answer.status < 300:
            return answer
        told = await self._words(answer)
        wait = provider_errors.retry_after(answer.headers, self._clock)
        refused = provider_errors.failure(answer.status, told, sent.model, self._redactor, wait)
        if answer.headers.get("x-should-retry") == "false":
            refused.repeats = 0
        if default and self._model_source and provider_errors.lacks_model(answer.status, told):
            refused.message += f" (the agent names no model; the default is {self._model_source})"
        raise refused

    async def _words(self, answer: Answer) -> provider_errors.Told:
        """What a refusal says, of as much of its body as a refusal takes. The answer is closed with it."""
        body = bytearray()
        with contextlib.closing(answer), contextlib.suppress(TimeoutError, *BROKEN):
            async with asyncio.timeout(self._idle_timeout):
                while len(body) <= _MAX_REFUSAL_BYTES and (chunk := await answer.read()):
                    body += chunk
        try:
            return provider_errors.told_by_body(bytes(body[:_MAX_REFUSAL_BYTES]))
        except UNREADABLE:
            return provider_errors.told_by("")

    def _broken(self, error: BaseException, message: str) -> NotecaseError:
        """The caller gets this message, and the log the cause."""
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        cause = _CREDENTIALS.sub("//", f"{type(root).__name__}: {root}")
        log.warning("model_unreachable", cause=self._redactor.told(cause))
        return errors.model_unavailable(message)


class _Clock:
    """How long an answer may go on: until its first piece, between two pieces, and in all. What is no piece of the
    reply, such as a comment that keeps the connection, counts as silence."""

    def __init__(self, first: float, idle: float, whole: float) -> None:
        self._now = asyncio.get_running_loop().time
        self._idle = idle
        self._limit = first
        self.begun = False
        """A piece of the reply has come."""
        self._whole = whole
        now = self._now()
        self._end = now + whole
        self.due = min(now + first, self._end)
        """The loop's time at which it has been too long."""

    def heard(self) -> None:
        self.begun = True
        self._limit = self._idle
        self.due = min(self._now() + self._idle, self._end)

    @property
    def complaint(self) -> NotecaseError:
        if self.due == self._end:
            return errors.model_unavailable(f"The model provider's answer did not end within {self._whole:g} seconds.")
        return _silent(self._limit, again=self.begun)


def _silent(seconds: float, *, again: bool) -> NotecaseError:
    """A server that has not begun may be at work, which asking again would only double."""
    failure = errors.model_unavailable(f"The model provider sent nothing for {seconds:g} seconds.")
    failure.repeats = None if again else 0
    return failure


def _written(request: ModelRequest, model: str, tag: str, profile: Profile, *, with_data: bool) -> _Sent:
    made = body(request, model, profile, tag, with_data=with_data)
    audio_format = _audio_format(made["audio"]) if "audio" in made else ""
    return _Sent(str(made["model"]), audio_format, encoded(made, long=request.size > MUCH_BYTES))


def _is_behind_calls(messages: Sequence[v1.Message]) -> bool:
    """Whether a request ends with the outcomes of calls, behind which a model may have nothing more to say."""
    return bool(messages) and any(part.HasField("tool_call") for part in messages[-1].parts)


async def _decoded(found: Encoded, number: int) -> Media:
    """The content, decoded off the loop: it may have megabytes."""
    return await asyncio.to_thread(media.decoded, found, number)


def _joined(pieces: list[Piece]) -> list[Piece]:
    """The pieces, with texts that follow each other as one: what was read together goes on together."""
    made: list[Piece] = []
    texts: list[str] = []
    for piece in pieces:
        if type(piece) is Text:
            texts.append(piece.text)
            continue
        if texts:
            made.append(Text("".join(texts)))
            texts.clear()
        made.append(piece)
    if texts:
        made.append(Text("".join(texts)))
    return made


def _audio_format(audio: Any) -> str:
    """The format that `generation.extra` asks for."""
    asked = audio.get("format") if isinstance(audio, dict) else None
    return asked if isinstance(asked, str) else ""
