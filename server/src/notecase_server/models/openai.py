"""Models behind any OpenAI-compatible Chat Completions endpoint: each call ends as a whole reply or as one typed
failure, and neither the key nor a header is ever told.

The openai SDK makes the headers and brings its aiohttp transport. The rest goes past it: the request's JSON is made
here, the answer's bytes are read by `chat_stream`, refusals by `provider_errors`, both bounded. Nothing is repeated
here, which is the engine's business.
"""

import asyncio
import base64
import contextlib
import mimetypes
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any

import aiohttp
import httpx2
import msgspec
import openai
import structlog
from notecase import v1

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.models.answers import provider_errors
from notecase_server.models.answers.redaction import Redactor
from notecase_server.models.chat_stream import ChatReply
from notecase_server.models.contract import Delta, ModelRequest, Tool, is_text

log = structlog.get_logger(__name__)

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

_FAIR_READS = 16
"""Reads after which other tasks get their turn."""

_MOST_REDIRECTS = 3

_REDIRECTS = frozenset({301, 302, 307, 308})
"""Statuses that name another address for the same request. It is sent there as it was, within the same origin."""

_ROLES = {v1.Message.ROLE_ASSISTANT: "assistant", v1.Message.ROLE_SYSTEM: "system"}

_TOOL_NAME = re.compile(r"[^a-zA-Z0-9_-]")

_AUDIO_FORMATS = {
    "audio/wav": "wav",
    "audio/x-wav": "wav",
    "audio/wave": "wav",
    "audio/vnd.wave": "wav",
    "audio/mpeg": "mp3",
    "audio/mp3": "mp3",
}


MAX_CONTENT_BYTES = 32 << 20
"""Of all content in one request, before it grows by a third as base64: providers take 50 MB, and each call holds it in
memory."""


class OpenAIProvider:
    """The provider `openai`. One object, with one pool of connections, serves all runs at once."""

    def __init__(
        self,
        api_key: str,
        base_url: str | None,
        default_model: str,
        *,
        idle_timeout: float = 120.0,
        connect_timeout: float = 10.0,
        silent_timeout: float = 600.0,
        clock: Callable[[], int] = lambda: 0,
    ) -> None:
        """An empty `api_key` is for servers that want none. `base_url` None is OpenAI's own. `idle_timeout` is how many
        seconds the provider may send nothing, before the reply or within it. `silent_timeout` is how many it may send
        what says nothing, such as comments that keep the connection alive. `clock` gives microseconds since 1970, which
        count where a provider names a date and no Date of its own.

        The SDK would read some settings from the environment by itself. Key and base URL are always given to it, so
        that OPENAI_API_KEY, OPENAI_BASE_URL and an Authorization in OPENAI_CUSTOM_HEADERS have no say; OPENAI_ORG_ID
        and OPENAI_PROJECT_ID count for OpenAI's own endpoint only, being nobody else's business. HTTPS_PROXY and its
        relatives are honoured.

        Raises ValueError, without the key in it, when the key or the URL cannot work."""
        key = api_key or "none"
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError("the API key holds a space, a line break or a character outside ASCII")
        self._redactor = Redactor(api_key)
        self._default_model = default_model
        self._idle_timeout = idle_timeout
        self._base_url = _checked_url(base_url or OPENAI_URL)
        host = self._base_url.host
        # Reasoning models at OpenAI refuse max_tokens, and both at once. Many other servers refuse or, worse, ignore
        # max_completion_tokens. Where the host misleads, `Generation.extra` can name the one that is right.
        newer = host.endswith((".openai.com", ".openai.azure.com"))
        self._limit_field = "max_completion_tokens" if newer else "max_tokens"
        timeout = httpx2.Timeout(idle_timeout, connect=connect_timeout)
        self._silent_timeout = silent_timeout
        self._clock = clock
        self._http = openai.DefaultAioHttpClient(timeout=timeout, follow_redirects=False)
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=self._base_url,
            default_headers={"Authorization": f"Bearer {key}"},
            http_client=self._http,
        )
        self._open: set[httpx2.Response] = set()
        if not host.endswith(".openai.com"):
            self._client.organization = self._client.project = None

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        """See Provider.stream. Closing it before its end drops the connection, which is how the provider learns of it.
        After Finish it ends within _DRAIN_SECONDS; who does not wait for that gives up the connection's next use."""
        body = _body(await _loaded(request), self._default_model, self._limit_field)
        model = str(body["model"])
        reply = ChatReply(model, self._redactor, behind_calls=_is_behind_calls(request.messages))
        async with self._answer(body) as response:
            chunks = response.aiter_bytes()
            cut: NotecaseError | None = None
            try:
                async for chunk in self._heard(chunks, reply):
                    for piece in chunk:
                        yield piece
            except _BROKEN as error:
                cut = self._broken(error, "The connection to the model provider broke within the reply.")
            for piece in reply.end(cut):
                yield piece
            await _drain(chunks)

    async def _heard(self, chunks: AsyncIterator[bytes], reply: ChatReply) -> AsyncIterator[list[Delta]]:
        """The pieces of each read, until the reply is done. Raises MODEL_UNAVAILABLE when the provider has said nothing
        for too long."""
        clock = asyncio.get_running_loop().time
        heard, turn = clock(), 0
        async for chunk in chunks:
            if pieces := reply.feed(chunk):
                heard = clock()
                yield pieces
            elif clock() - heard > self._silent_timeout:
                raise errors.model_unavailable(
                    f"The model provider kept the line open and said nothing for {self._silent_timeout:g} seconds."
                )
            if reply.done:
                return
            turn += 1
            if turn % _FAIR_READS == 0:
                await asyncio.sleep(0)  # one read may unpack to thousands of pieces, which come without a pause

    async def close(self) -> None:
        """See Provider.close. A reply under way fails as MODEL_UNAVAILABLE, and so does one asked for later."""
        # Closing the client alone would leave the readers of its connections waiting for ever.
        for response in tuple(self._open):
            await response.aclose()
        await self._client.close()

    @contextlib.asynccontextmanager
    async def _answer(self, body: Json) -> AsyncIterator[httpx2.Response]:
        """The provider's answer, its body unread; closed with the block. Raises what a refusal or a failure to reach it
        comes to."""
        model = str(body["model"])
        try:
            response = await self._sent(msgspec.json.encode(body), model)
        except _BROKEN as error:
            raise self._broken(error, "The model provider cannot be reached.") from error
        except RuntimeError:
            if not self._http.is_closed:
                raise
            raise errors.model_unavailable("The connections to the model provider are closed.") from None
        self._open.add(response)
        try:
            if not response.is_success:
                raise await self._refused(response, model)
            yield response
        finally:
            self._open.discard(response)
            await response.aclose()

    async def _sent(self, content: bytes, model: str) -> httpx2.Response:
        """Sends the request, once more to each address that it is redirected to. Raises MODEL_ERROR for an address of
        another origin, where neither the conversation nor the key goes, and for a circle."""
        url = httpx2.URL(f"{str(self._client.base_url).rstrip('/')}/chat/completions")
        seen = {url}
        headers = {name: value for name, value in self._client.default_headers.items() if isinstance(value, str)}
        headers["Accept-Encoding"] = "gzip, deflate"
        while True:
            request = self._http.build_request("POST", url, content=content, headers=headers)
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

    async def _refused(self, response: httpx2.Response, model: str) -> NotecaseError:
        """What a status comes to, with as much of its body as fits a refusal."""
        body = bytearray()
        chunks = response.aiter_bytes()
        with contextlib.suppress(TimeoutError, *_BROKEN):
            async with asyncio.timeout(self._idle_timeout):
                async for chunk in chunks:
                    body += chunk
                    if len(body) > _MAX_REFUSAL_BYTES:
                        break
                else:
                    await chunks.aclose()
        told = provider_errors.told_by_body(bytes(body[:_MAX_REFUSAL_BYTES]))
        wait = provider_errors.retry_after(response.headers, self._clock)
        return provider_errors.failure(response.status_code, told, model, self._redactor, wait)

    def _broken(self, error: BaseException, message: str) -> NotecaseError:
        """The client is told that, the log why."""
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        log.warning("model_unreachable", cause=self._redactor.told(f"{type(root).__name__}: {root}"))
        if isinstance(error, httpx2.ReadTimeout) or isinstance(error.__cause__, httpx2.ReadTimeout):
            message = f"The model provider sent nothing for {self._idle_timeout:g} seconds."
        return errors.model_unavailable(message)


def _redirected(status: int, where: str) -> NotecaseError:
    return errors.model_error(
        f"The model provider redirects the call {where} (status {status}); its base URL may be wrong.", status=status
    )


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _is_behind_calls(messages: Sequence[v1.Message]) -> bool:
    """Whether a request ends with the outcomes of calls, behind which a model may have nothing more to say."""
    return bool(messages) and any(part.HasField("tool_call") for part in messages[-1].parts)


def _checked_url(base_url: str) -> httpx2.URL:
    """Raises ValueError for what cannot be a base URL, or would put a secret where URLs are logged."""
    try:
        url = httpx2.URL(base_url)
        url.host.encode("idna")
    except (httpx2.InvalidURL, UnicodeError):
        raise ValueError("the base URL is no URL") from None
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError("the base URL must begin with http:// or https:// and name a host")
    if url.userinfo or url.query or url.fragment:
        raise ValueError("the base URL must hold neither credentials nor a query")
    return url


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    """Reads the end of a body, which lets its connection serve the next call. The reply is whole, so that whatever goes
    wrong here only costs the connection."""
    with contextlib.suppress(TimeoutError, *_BROKEN):
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for _ in chunks:
                pass


async def _loaded(request: ModelRequest) -> ModelRequest:
    """The request with the content that its messages refer to within them.

    Raises CONTENT_UNSUPPORTED for a media type that there is no place for, and for more content than a request may
    carry, before any of it is read."""
    referring = [index for index, message in enumerate(request.messages) if _refers(message)]
    if not referring:
        return request
    blobs = [part.blob for index in referring for part in _all_parts(request.messages[index]) if part.HasField("blob")]
    for blob in blobs:
        _check_media_type(blob.media_type)
    total = sum(blob.size_bytes for blob in blobs)
    if total > MAX_CONTENT_BYTES:
        raise errors.content_unsupported(
            f"The conversation refers to {total} bytes of content; the model takes at most {MAX_CONTENT_BYTES}."
        )
    assert request.load is not None, "who refers to content brings the means to load it"
    messages = list(request.messages)
    for index in referring:
        copied = v1.Message()
        copied.CopyFrom(messages[index])
        messages[index] = copied
        for part in _all_parts(copied):
            if part.HasField("blob"):
                media_type, filename = part.blob.media_type, part.blob.filename
                data = await request.load(part.blob)
                part.data.CopyFrom(v1.InlineData(data=data, media_type=media_type, filename=filename))
    return request._replace(messages=messages)


def _refers(message: v1.Message) -> bool:
    if len(message.parts) == 1 and message.parts[0].text:
        return False  # nearly every message
    return any(part.HasField("blob") for part in _all_parts(message))


def _all_parts(message: v1.Message) -> Iterator[v1.Part]:
    """Those of the results of its calls, too."""
    for part in message.parts:
        yield part
        yield from part.tool_call.result


def _body(request: ModelRequest, default_model: str, limit_field: str) -> Json:
    """The request as it is sent. `Generation.extra` is merged last, member by member, and so can change everything;
    null unsets, `{"stream_options": null}` for a server that does not know it.

    Raises CONTENT_UNSUPPORTED for content that Chat Completions has no place for, MODEL_ERROR when there is no model to
    ask or `extra` is no JSON object."""
    generation = request.generation
    body: Json = {
        "model": request.model or default_model,
        "messages": _messages(request.instruction, request.messages),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    if request.output_schema:
        # Not `strict`, which OpenAI grants to a part of JSON Schema only. Raw, so that it is sent as it was written.
        schema = {"name": "reply", "schema": msgspec.Raw(request.output_schema.encode())}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    for name in ("temperature", "top_p", "seed"):
        if generation.HasField(name):
            body[name] = getattr(generation, name)
    if generation.HasField("max_output_tokens"):
        body[limit_field] = generation.max_output_tokens
    if generation.stop:
        body["stop"] = list(generation.stop)
    if generation.reasoning_effort:
        body["reasoning_effort"] = generation.reasoning_effort
    if generation.extra:
        try:
            extra = msgspec.json.decode(generation.extra, type=Json)
        except (msgspec.DecodeError, RecursionError):
            raise errors.model_error("The agent's generation.extra is no JSON object.") from None
        body = {name: value for name, value in (body | extra).items() if value is not None}
    if not body.get("model"):
        raise errors.model_error("The agent names no model and the provider has no default one.")
    return body


def _tool(tool: Tool) -> Json:
    function: Json = {"name": tool.name, "description": tool.description}
    function["parameters"] = msgspec.json.decode(tool.parameters) if tool.parameters else {"type": "object"}
    return {"type": "function", "function": function}


def _messages(instruction: str, messages: Sequence[v1.Message]) -> list[Json]:
    """The conversation as Chat Completions has it. A message that holds nothing is left out, since providers refuse
    it."""
    made: list[Json] = []
    if instruction:
        made.append({"role": "system", "content": instruction})
    for message in messages:
        role, parts = message.role, message.parts
        if len(parts) == 1 and (text := parts[0].text or parts[0].json):
            # Nearly every message: in the one shape that every server takes, and in a quarter of the time that the ways
            # below would need. A history is sent whole with each call.
            made.append({"role": _ROLES.get(role, "user"), "content": text})
        elif role == v1.Message.ROLE_ASSISTANT:
            made.extend(_assistant(message))
        elif role == v1.Message.ROLE_SYSTEM:
            if text := _text(parts, "A system message"):
                made.append({"role": "system", "content": text})
        elif content := [shown for part in parts if (shown := _content(part)) is not None]:
            made.append({"role": "user", "content": content})
    return made


def _text(parts: Iterable[v1.Part], where: str) -> str:
    """What can be nothing but words there."""
    texts = []
    for part in parts:
        if (words := _words(part)) is None:
            kind = part.WhichOneof("kind")
            media_type = part.data.media_type or part.file.media_type
            held = f"media type {media_type!r}" if media_type else f"a part of kind {kind!r}"
            raise errors.content_unsupported(f"{where} holds {held}; the model takes only text there.")
        texts.append(words)
    return "".join(texts)


def _words(part: v1.Part) -> str | None:
    """What of a part can be said in words; None for what cannot."""
    match part.WhichOneof("kind"):
        case "text":
            return part.text
        case "json":
            return part.json
        case "data" if is_text(part.data.media_type):
            text = part.data.data.decode(errors="replace")
            # No provider takes a text file as a file; all of them read text.
            return f"{part.data.filename}:\n{text}" if part.data.filename else text
    return None


def _content(part: v1.Part) -> Json | None:
    """A part of a user's message; None when it is empty."""
    if (words := _words(part)) is not None:
        return {"type": "text", "text": words} if words else None
    match part.WhichOneof("kind"):
        case "file":
            if not _media_type(part.file.media_type).startswith("image/"):
                raise errors.content_unsupported(
                    f"The model takes only images by URI, not media type {part.file.media_type!r}; send the data."
                )
            return {"type": "image_url", "image_url": {"url": part.file.uri}}
        case "data":
            return _data(part.data)
        case kind:
            raise errors.content_unsupported(f"A user's message holds a part of kind {kind!r}; models make those.")


def _data(data: v1.InlineData) -> Json:
    _check_media_type(data.media_type)
    media_type = _media_type(data.media_type)
    encoded = base64.b64encode(data.data).decode("ascii")
    url = f"data:{media_type};base64,{encoded}"
    if media_type.startswith("image/"):
        return {"type": "image_url", "image_url": {"url": url}}
    if audio_format := _AUDIO_FORMATS.get(media_type):
        return {"type": "input_audio", "input_audio": {"data": encoded, "format": audio_format}}
    # Providers want a name, and go by its ending.
    name = data.filename or f"file{mimetypes.guess_extension(media_type) or ''}"
    return {"type": "file", "file": {"filename": name, "file_data": url}}


def _check_media_type(told: str) -> None:
    media_type = _media_type(told)
    if not (media_type.startswith(("image/", "application/", "text/")) or media_type in _AUDIO_FORMATS):
        raise errors.content_unsupported(
            f"The model takes text, images, documents and audio as WAV or MP3, not media type {told!r}."
        )


def _media_type(told: str) -> str:
    """Without parameters, in lower case."""
    return told.partition(";")[0].strip().lower()


def _assistant(message: v1.Message) -> list[Json]:
    """What the model said, and behind it one answer to each of its calls. Its reasoning is not sent back: providers
    refuse or ignore it."""
    said = [part for part in message.parts if part.WhichOneof("kind") not in {"reasoning", "refusal", "tool_call"}]
    text = _text(said, "An assistant's message")
    refusal = "".join(part.refusal for part in message.parts)
    calls = [part.tool_call for part in message.parts if part.HasField("tool_call")]
    if not (text or refusal or calls):
        return []
    made: Json = {"role": "assistant", "content": text or None}
    if refusal:
        made["refusal"] = refusal
    if calls:
        made["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": _tool_name(call.tool), "arguments": _arguments(call.arguments)},
            }
            for call in calls
        ]
    answers = [{"role": "tool", "tool_call_id": call.call_id, "content": _outcome(call)} for call in calls]
    # A tool's answer can only be text there, so that what else it gave is shown behind the answers.
    shown = [
        {"role": "user", "content": [{"type": "text", "text": f"From the result of {call.tool}:"}, *media]}
        for call in calls
        if (media := [_content(part) for part in call.result if _words(part) is None])
    ]
    return [made, *answers, *shown]


def _tool_name(tool: str) -> str:
    """A model may have called what no tool can be named, and a provider refuses the history that says so."""
    return _TOOL_NAME.sub("_", tool)[:64] or "_"


def _arguments(arguments: str) -> str:
    """As the model wrote them. Some servers parse the history's arguments and refuse all of it for one call that was
    cut off, so that what is no JSON object is shown inside of one."""
    if not arguments:
        return "{}"
    try:
        msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        return msgspec.json.encode({"malformed": arguments}).decode()
    return arguments


def _outcome(call: v1.ToolCall) -> str:
    if call.outcome == v1.ToolCall.OUTCOME_CANCELLED:
        return call.error or "cancelled"
    words = [_words(part) for part in call.result]
    return "".join(filter(None, words)) or call.error or ("Its content follows." if None in words else "")
