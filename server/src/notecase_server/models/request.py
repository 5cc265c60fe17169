"""A model call as the body of a Chat Completions request, in the shape that its profile says.

The history is sent whole with each call, so that what is done for every message is kept cheap.
"""

import asyncio
import hashlib
import json
import mimetypes
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import msgspec
from notecase import v1

from notecase_server import errors
from notecase_server.models.contract import ModelRequest, Tool, is_text
from notecase_server.models.pieces import Base64
from notecase_server.models.profiles import Profile

Json = dict[str, Any]

MAX_CONTENT_BYTES = 32 << 20
"""Of all content in one request, before it grows by a third as base64: providers take 50 MB, and each call holds it in
memory."""

LARGE_BYTES = 64 << 10
"""Of declarations, from which on a request is written in a thread: a parser takes up to 10 ms for them."""

MANY_MESSAGES = 1000
"""From which on it is, too: each takes some 5 microseconds."""

BEGIN = "Begin."
"""What a user says in a conversation that would begin with a reply."""

GO_ON = "Continue."
"""What a user says in a request that would end with a reply."""

BRIDGE = "I have the result."
"""What an assistant says between a tool's message and a user's, for servers that take no user there."""


_TOOL_NAME = re.compile(r"[^a-zA-Z0-9_-]")

_NINE = re.compile(r"[a-zA-Z0-9]{9}")
_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

_AUDIO_FORMATS = {
    "audio/wav": "wav",
    "audio/x-wav": "wav",
    "audio/wave": "wav",
    "audio/vnd.wave": "wav",
    "audio/mpeg": "mp3",
    "audio/mp3": "mp3",
}

_OF_REPLIES = frozenset(
    {
        *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
        *("response_format", "structured_outputs", "grammar", "json_schema"),
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        *("stop", "max_tokens", "max_completion_tokens", "min_tokens", "n", "prediction"),
        *("modalities", "audio", "web_search_options"),
    }
)
"""Members of `generation.extra` that are for an agent's replies, and not for a text about the conversation."""

_MAPS_OF_SCHEMAS = frozenset({"properties", "$defs", "definitions", "patternProperties", "dependentSchemas"})
_LISTS_OF_SCHEMAS = frozenset({"anyOf", "allOf", "oneOf", "prefixItems"})
_SCHEMAS = frozenset(
    {
        *("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"),
        *("unevaluatedItems", "unevaluatedProperties"),
    }
)
"""Keywords that hold schemas, in the three ways in which they do."""


def body(request: ModelRequest, model: str, profile: Profile, provider: str, *, with_data: bool = True) -> Json:
    """Returns the request as it is sent to `model`. `provider` is the one whose own data it gets back, unless
    `with_data` is false. `Generation.extra` is merged last, member by member, and so can change everything; null
    unsets.

    Raises CONTENT_UNSUPPORTED for content of the newest message of a user, or of the system, that Chat Completions has
    no place for; elsewhere it is named. Raises MODEL_ERROR when there is no model to ask or `extra` is no JSON
    object."""
    generation = request.generation
    asked, format_ = _output(request, profile) if request.output_schema else ("", None)
    origin = (provider, model) if with_data else ("", "")
    made: Json = {
        "model": model,
        "messages": _Conversation(profile, origin).told(
            [request.instruction, asked], request.messages, only_text=request.only_text
        ),
        "stream": True,
    }
    if profile.stream_options:
        made["stream_options"] = {"include_usage": True}
    if request.tools:
        made["tools"] = [_declared(tool, profile.schemas, profile.schema_without) for tool in request.tools]
        if profile.calls == "one":
            made["parallel_tool_calls"] = False
    if format_ is not None:
        made["response_format"] = format_
    for name in ("temperature", "top_p", "seed"):
        if generation.HasField(name):
            made[name] = getattr(generation, name)
    if generation.HasField("max_output_tokens"):
        made[profile.limit_field] = generation.max_output_tokens
    if generation.stop:
        made["stop"] = list(generation.stop)
    if generation.reasoning_effort:
        made["reasoning_effort"] = generation.reasoning_effort
    if generation.extra:
        extra = _extra(generation.extra)
        if request.plain:
            extra = {name: value for name, value in extra.items() if name not in _OF_REPLIES}
        made = {name: value for name, value in (made | extra).items() if value is not None}
        if "tool_choice" in made:
            _loosen(made, request.messages)
    if not made.get("model"):
        raise errors.model_error("The agent names no model, and the provider has no default model.")
    return made


def returns_data(request: ModelRequest, model: str, provider: str) -> bool:
    """Whether anything in the request's history is the provider's own data for that model."""
    return not request.only_text and any(
        _is_from(data, (provider, model))
        for message in request.messages
        if message.role == v1.Message.ROLE_ASSISTANT and not _is_text(message)
        for part in message.parts
        for data in (part.reasoning.provider_data, part.tool_call.provider_data)
    )


def is_large(request: ModelRequest) -> bool:
    """Whether it takes long to write, its content apart."""
    declared = len(request.output_schema)
    for tool in request.tools:
        declared += len(tool.description) + len(tool.parameters)
    return declared > LARGE_BYTES or len(request.messages) > MANY_MESSAGES


async def loaded(request: ModelRequest, profile: Profile) -> ModelRequest:
    """Returns the request with the content that its messages refer to within them, as far as it is shown.

    What has no place there, and the oldest content when there is more than a request may carry, stays as it is, and
    `body` names it. Raises CONTENT_UNSUPPORTED only where the newest messages of a user, which one run began with, have
    such content or too much of it, before any is read."""
    if request.only_text:
        return request
    messages = request.messages
    newest = _newest_images(messages, profile)
    if not any(any(_carried(message, index == newest)) for index, message in enumerate(messages)):
        return request
    assert request.load is not None, "who refers to content brings the means to load it"
    filled = list(messages)
    for index, places in sorted(_chosen(messages, newest).items()):
        filled[index] = v1.Message()
        filled[index].CopyFrom(messages[index])
        for place, part in enumerate(_carried(filled[index], index == newest)):
            if place not in places:
                continue
            media_type, filename = part.blob.media_type, part.blob.filename
            data = await request.load(part.blob)
            part.data.media_type, part.data.filename = media_type, filename
            await asyncio.to_thread(setattr, part.data, "data", data)
    return request._replace(messages=filled)


def _chosen(messages: Sequence[v1.Message], newest: int) -> dict[int, set[int]]:
    """The content that a request has room for, by message: places in what `_carried` yields. The newest messages
    of a user come first, then the others from the newest on."""
    asked = {index: [part.blob for part in _carried(messages[index], False)] for index in _newest_of_user(messages)}
    held = [blob for blobs in asked.values() for blob in blobs]
    for blob in held:
        _check_media_type(blob.media_type)
    if (total := sum(blob.size_bytes for blob in held)) > MAX_CONTENT_BYTES:
        raise errors.content_unsupported(
            f"The run's messages refer to {total} bytes of content; the model accepts at most {MAX_CONTENT_BYTES}."
        )
    room = MAX_CONTENT_BYTES - total
    chosen = {index: set(range(len(blobs))) for index, blobs in asked.items() if blobs}
    for index in range(len(messages) - 1, -1, -1):
        if index in asked:
            continue
        for place, part in reversed([*enumerate(_carried(messages[index], index == newest))]):
            if not _is_taken(part.blob.media_type):
                continue
            room -= part.blob.size_bytes
            if room < 0:
                return chosen
            chosen.setdefault(index, set()).add(place)
    return chosen


def _newest_of_user(messages: Sequence[v1.Message]) -> list[int]:
    """The indices of the newest message of a user and of those before it that the same run began with. One that a run
    without a reply began with is not among them: what cannot be shown of it would fail each later run."""
    found: list[int] = []
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if message.role == v1.Message.ROLE_USER and (not found or message.run == messages[found[0]].run):
            found.append(index)
        elif found and message.role != v1.Message.ROLE_SYSTEM:
            break
    return found


def _carried(message: v1.Message, images: bool) -> Iterator[v1.Part]:
    """The parts whose content a request carries. Of what a model made that is text alone, unless its `images` are
    shown."""
    if _is_text(message):
        return
    reply = message.role == v1.Message.ROLE_ASSISTANT
    for part in message.parts:
        if part.HasField("blob") and (not reply or is_text(part.blob.media_type) or (images and _is_image(part))):
            yield part
        yield from (inner for inner in part.tool_call.result if inner.HasField("blob"))


def _newest_images(messages: Sequence[v1.Message], profile: Profile) -> int:
    """The index of the newest reply with images, if such are shown; -1 for none."""
    if profile.made_images == "words":
        return -1
    found = (
        index
        for index in range(len(messages) - 1, -1, -1)
        if messages[index].role == v1.Message.ROLE_ASSISTANT
        and not _is_text(messages[index])
        and any(map(_is_image, messages[index].parts))
    )
    return next(found, -1)


def _is_text(message: v1.Message) -> bool:
    """Whether a message is one text and nothing else, as nearly every one is."""
    parts = message.parts
    return len(parts) == 1 and bool(parts[0].text)


def _is_image(part: v1.Part) -> bool:
    """Whether a part is an image, here or elsewhere."""
    media_type = part.blob.media_type or part.data.media_type or part.file.media_type
    return _media_type(media_type).startswith("image/")


def _extra(text: str) -> Json:
    try:
        return msgspec.json.decode(text, type=Json)
    except (msgspec.DecodeError, RecursionError):
        raise errors.model_error("The agent's generation.extra is not a JSON object.") from None


def _loosen(made: Json, messages: Sequence[v1.Message]) -> None:
    """A choice among tools goes with tools only, and a forced one ends with the result of the call that it forced:
    otherwise the model could never speak."""
    if not made.get("tools"):
        del made["tool_choice"]
        return
    choice = made["tool_choice"]
    forced, name = choice in ("required", "any"), ""
    if isinstance(choice, dict):
        function = choice.get("function")
        name = str(function.get("name") or "") if isinstance(function, dict) else str(choice.get("name") or "")
        allowed = choice.get("allowed_tools", choice)
        forced = bool(name) or (isinstance(allowed, dict) and allowed.get("mode") in ("required", "any"))
    if forced and any(not name or _tool_name(call.tool) == name for call in _calls_of_turn(messages)):
        made["tool_choice"] = choice | {"allowed_tools": allowed | {"mode": "auto"}} if _limits(choice) else "auto"


def _limits(choice: object) -> bool:
    """Whether the choice also says among which tools."""
    return isinstance(choice, dict) and isinstance(choice.get("allowed_tools"), dict)


def _calls_of_turn(messages: Sequence[v1.Message]) -> Iterator[v1.ToolCall]:
    for message in reversed(messages):
        if message.role == v1.Message.ROLE_USER:
            return
        for part in message.parts:
            if part.HasField("tool_call"):
                yield part.tool_call


def _output(request: ModelRequest, profile: Profile) -> tuple[str, Json | None]:
    """What the system message says of the reply's schema, and the `response_format`."""
    if request.plain:
        return "", None
    words = f"Reply only with JSON that matches this JSON Schema:\n{request.output_schema}"
    if request.tools and profile.output_with_tools == "words":
        return f"Call tools as you need them. When you call none: {words}", None
    match profile.output:
        case "words":
            return words, None
        case "json_object":
            return words, {"type": "json_object"}
    # Sent as it was written. `strict` is left out, since OpenAI grants it to a part of JSON Schema only.
    schema: Json = {"name": "reply", "schema": msgspec.Raw(request.output_schema.encode())}
    if profile.schemas == "strict" or profile.schema_without:
        schema["schema"] = _schema(request.output_schema, profile.schemas, profile.schema_without)
    if profile.schemas == "strict":
        schema["strict"] = True
    return "", {"type": "json_schema", "json_schema": schema}


@lru_cache(1024)
def _declared(tool: Tool, schemas: str, without: tuple[str, ...]) -> Json:
    function: Json = {"name": _tool_name(tool.name)}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = _schema(tool.parameters or "{}", schemas, without, parameters=True)
    if schemas == "strict":
        function["strict"] = True
    return {"type": "function", "function": function}


@lru_cache(1024)
def _schema(text: str, schemas: str, without: tuple[str, ...], parameters: bool = False) -> msgspec.Raw:
    """A schema in the shape that servers take: parameters are an object with `properties`, a list says of what. One
    with a number that no double holds, or nested by the hundred, stays as it is written."""
    try:
        schema = _decoded(text)
        if parameters and isinstance(schema, dict):
            schema = {name: value for name, value in schema.items() if _is_meant(name, value)}
            if not schema.keys() & {"$ref", "anyOf", "oneOf", "allOf"}:
                schema.setdefault("type", "object")
                schema.setdefault("properties", {})
        return msgspec.Raw(msgspec.json.encode(_shaped(schema, schemas, frozenset(without))))
    except (ValueError, RecursionError):
        return msgspec.Raw(text.encode())


def _decoded(text: str) -> Any:
    """Python's own writer, by which a schema may have come, has NaN and Infinity, which are not JSON. Raises
    ValueError."""
    try:
        return msgspec.json.decode(text)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        return json.loads(text, parse_constant=lambda _: None)


def _is_meant(keyword: str, value: Any) -> bool:
    """Whether a keyword has a value that can be its own. Servers in Go and PHP write null or a list for what is empty
    in them."""
    if value is None:
        return keyword in {"default", "const"}
    if keyword in _MAPS_OF_SCHEMAS:
        return isinstance(value, dict)
    if keyword in _LISTS_OF_SCHEMAS or keyword in {"required", "enum"}:
        return isinstance(value, list)
    return keyword not in _SCHEMAS or bool(value) or not isinstance(value, list)


def _shaped(schema: Any, schemas: str, without: frozenset[str]) -> Any:
    if not isinstance(schema, dict):
        return schema
    shaped = {
        name: _inside(name, value, schemas, without)
        for name, value in schema.items()
        if name not in without and _is_meant(name, value)
    }
    types = shaped.get("type")
    types = types if isinstance(types, list) else [types]
    if "array" in types and "prefixItems" not in shaped:
        shaped.setdefault("items", {})
    if schemas == "strict" and ("object" in types or "properties" in shaped):
        shaped |= {"additionalProperties": False, "required": list(shaped.setdefault("properties", {}))}
    return shaped


def _inside(keyword: str, value: Any, schemas: str, without: frozenset[str]) -> Any:
    if keyword in _MAPS_OF_SCHEMAS and isinstance(value, dict):
        return {key: _shaped(inner, schemas, without) for key, inner in value.items()}
    if keyword in _LISTS_OF_SCHEMAS and isinstance(value, list):
        return [_shaped(inner, schemas, without) for inner in value]
    return _shaped(value, schemas, without) if keyword in _SCHEMAS else value


class _Conversation:
    """The messages of one request in the making, oldest first."""

    def __init__(self, profile: Profile, origin: tuple[str, str]) -> None:
        self._profile = profile
        self._origin = origin
        self._joined = profile.neighbours == "joined"
        self._unsigned = profile.unsigned_reply
        self._made: list[Json] = []
        self._system: list[str] = []
        self._taken: set[str] = set()
        """Ids of calls so far: some servers begin anew with each reply."""

    def told(self, first: Iterable[str], messages: Sequence[v1.Message], *, only_text: bool = False) -> list[Json]:
        """The conversation as Chat Completions has it. A message that holds nothing is left out, since providers refuse
        it. `only_text` as in ModelRequest."""
        for text in first:
            if text:
                self._say_system(text)
        if only_text:
            self._say_texts(messages)
        else:
            self._say(messages)
        made = self._made
        if self._profile.last == "user" and (not made or made[-1]["role"] not in ("user", "tool")):
            self._say_user(GO_ON)
        if self._profile.first == "user" and made and made[0]["role"] == "assistant":
            made.insert(0, {"role": "user", "content": BEGIN})
        if self._system:
            made.insert(0, {"role": self._profile.system_role, "content": "\n\n".join(self._system)})
        return made

    def _say_texts(self, messages: Sequence[v1.Message]) -> None:
        """As `_say`, of messages that are one text each."""
        made, before, assistant = self._made, None, v1.Message.ROLE_ASSISTANT
        for message in messages:
            role, text = message.role, message.parts[0].text
            if role == before and self._joined:
                made[-1]["content"] += f"\n\n{text}"
            elif role == assistant:
                made.append({**self._unsigned, "role": "assistant", "content": text})
            else:
                made.append({"role": "user", "content": text})
            before = role

    def _say(self, messages: Sequence[v1.Message]) -> None:
        turn = self._turn(messages)
        newest, asked = _newest_images(messages, self._profile), _newest_of_user(messages)
        for index, message in enumerate(messages):
            role, parts = message.role, message.parts
            if len(parts) == 1 and (text := parts[0].text or parts[0].json):
                # Nearly every message.
                if role == v1.Message.ROLE_ASSISTANT:
                    self._say_assistant({"role": "assistant", "content": text})
                elif role == v1.Message.ROLE_SYSTEM:
                    self._say_system(text)
                else:
                    self._say_user(text)
            elif role == v1.Message.ROLE_ASSISTANT:
                self._reply(message, index >= turn, index == newest)
            elif role == v1.Message.ROLE_SYSTEM:
                if text := _text(parts, "A system message"):
                    self._say_system(text)
            elif content := [shown for part in parts if (shown := _content(part, index not in asked)) is not None]:
                self._say_user(self._as_text(content))

    def _turn(self, messages: Sequence[v1.Message]) -> int:
        """The index from which on reasoning is given back."""
        match self._profile.reasoning:
            case "always":
                return 0
            case "none":
                return len(messages)
        for index in range(len(messages) - 1, -1, -1):
            if messages[index].role == v1.Message.ROLE_USER:
                return index
        return 0

    def _say_system(self, text: str) -> None:
        if self._profile.system == "first":
            self._system.append(text)
        else:
            self._made.append({"role": self._profile.system_role, "content": text})

    def _say_user(self, content: str | list[Json]) -> None:
        last = self._made[-1] if self._made else {}
        if self._joined and last.get("role") == "user":
            last["content"] = self._together(last["content"], content)
            return
        if last.get("role") == "tool" and self._profile.after_tool == "assistant":
            self._say_assistant({"role": "assistant", "content": BRIDGE})
        self._made.append({"role": "user", "content": content})

    def _say_assistant(self, message: Json) -> None:
        if self._unsigned:
            message = self._unsigned | message
        last = self._made[-1] if self._made else {}
        if self._joined and last.get("role") == "assistant" and last.keys() <= {"role", "content", *self._unsigned}:
            # Without calls: behind those stands a tool's message.
            texts = filter(None, (last["content"], message.get("content")))
            self._made[-1] = message | {"content": "\n\n".join(texts)}
        else:
            self._made.append(message)

    def _together(self, one: str | list[Json], other: str | list[Json]) -> str | list[Json]:
        if isinstance(one, str) and isinstance(other, str):
            return f"{one}\n\n{other}"
        parts = [[{"type": "text", "text": part}] if isinstance(part, str) else part for part in (one, other)]
        return [*parts[0], *parts[1]]

    def _as_text(self, content: list[Json]) -> str | list[Json]:
        if self._profile.text == "string" and all(part["type"] == "text" for part in content):
            return "\n\n".join(part["text"] for part in content)
        return content

    def _reply(self, message: v1.Message, with_reasoning: bool, with_images: bool) -> None:
        """What the model said, and behind it one answer to each of its calls."""
        profile = self._profile
        said = [part for part in message.parts if part.WhichOneof("kind") not in {"reasoning", "refusal", "tool_call"}]
        images = [part for part in said if with_images and _is_image(part) and not part.HasField("blob")]
        text = _told(said, profile.made_images == "words")
        text = text if text.strip() else ""  # which Anthropic refuses as it does an empty one
        refusal = "".join(part.refusal for part in message.parts)
        calls = [part.tool_call for part in message.parts if part.HasField("tool_call")]
        if refusal and profile.refusal == "text":
            text, refusal = f"{text}\n\n{refusal}" if text else refusal, ""
        if text or refusal or calls:
            self._say_reply(message, text, refusal, calls, with_reasoning)
        # A tool's answer can only be text there, and so can a reply: what else they gave is shown behind them.
        for call in calls:
            if media := [_content(part) for part in call.result if _in_words(part) is None]:
                title = {"type": "text", "text": f"From the result of {call.tool}:"}
                self._say_user([title, *(part for part in media if part is not None)])
        if shown := [content for part in images if (content := _content(part)) is not None]:
            self._say_user([{"type": "text", "text": "From your reply:"}, *shown])

    def _say_reply(
        self, message: v1.Message, text: str, refusal: str, calls: list[v1.ToolCall], with_reasoning: bool
    ) -> None:
        profile = self._profile
        made: Json = {"role": "assistant", "content": text or None}
        if refusal:
            made["refusal"] = refusal
        if not text and not refusal:
            if profile.empty_content == "absent":
                del made["content"]
            elif profile.empty_content == "empty":
                made["content"] = ""
        reasoning = self._reasoning(message) if with_reasoning else {}
        made = reasoning | made
        for group in [calls] if profile.calls == "many" else [[call] for call in calls] or [calls]:
            told = [self._call(call) for call in group]
            if told:
                made["tool_calls"] = told
            self._say_assistant(made)
            for call, shown in zip(group, told, strict=True):
                content = _outcome(call)
                content = content if content.strip() else profile.empty_result
                self._made.append({"role": "tool", "tool_call_id": shown["id"], "content": content})
            made = {name: value for name, value in made.items() if name == "role" or name in reasoning}
            if profile.empty_content != "absent":
                made["content"] = None if profile.empty_content == "null" else ""

    def _reasoning(self, message: v1.Message) -> Json:
        """What the provider gets back of its model's reasoning, if it is its own and whole."""
        members: Json = {}
        if message.status == v1.Message.STATUS_INCOMPLETE:
            return members
        parts = [part.reasoning for part in message.parts if part.HasField("reasoning")]
        own = [part.provider_data for part in parts if _is_from(part.provider_data, self._origin)]
        for data in own:
            members |= _members(data)
        text_member = next((data.text_member for data in own if data.text_member), "")
        if text_member and not members:
            members[text_member] = "".join(part.text for part in parts)
        return members

    def _call(self, call: v1.ToolCall) -> Json:
        own = _is_from(call.provider_data, self._origin)
        call_id = call.provider_data.call_id if own else ""
        if not call_id or call_id in self._taken or (self._profile.call_ids == "nine" and not _is_nine(call_id)):
            call_id = _made_id(call.call_id)
        self._taken.add(call_id)
        made: Json = {
            "id": call_id,
            "type": "function",
            "function": {"name": _tool_name(call.tool), "arguments": _arguments(call.arguments)},
        }
        return ((own and _members(call.provider_data)) or self._profile.unsigned_call) | made


def _is_from(data: v1.ProviderData, origin: tuple[str, str]) -> bool:
    return bool(data.provider) and (data.provider, data.model) == origin


def _members(data: v1.ProviderData) -> Json:
    """As they came, byte for byte."""
    if not data.members:
        return {}
    try:
        members: Json = msgspec.json.decode(data.members, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return {}  # an import may hold anything
    return members


def _is_nine(call_id: str) -> bool:
    return _NINE.fullmatch(call_id) is not None


@lru_cache(4096)
def _made_id(call_id: str) -> str:
    """An id for a call that the provider did not make: 9 letters and digits, which every server takes, and the same
    each time."""
    number = int.from_bytes(hashlib.sha256(call_id.encode()).digest()[:8], "big")
    letters = []
    for _ in range(9):
        number, digit = divmod(number, 62)
        letters.append(_LETTERS[digit])
    return "".join(letters)


def _text(parts: Iterable[v1.Part], where: str) -> str:
    """What can be nothing but words there."""
    texts = []
    for part in parts:
        words = _named(part) if part.HasField("blob") else _words(part)
        if words is None:
            kind = part.WhichOneof("kind")
            media_type = part.data.media_type or part.file.media_type
            held = f"media type {media_type!r}" if media_type else f"a part of kind {kind!r}"
            raise errors.content_unsupported(f"{where} contains {held}; the model accepts only text there.")
        texts.append(words)
    return "".join(texts)


def _told(parts: Sequence[v1.Part], named: bool) -> str:
    """A reply in words, since an assistant's message can be nothing else. What was made there is `named`; sound is not,
    where words say what it says."""
    spoken = any(_words(part) for part in parts)
    told = []
    for part in parts:
        if (words := _words(part)) is not None:
            told.append(words)
        elif named or is_text(part.blob.media_type):
            made = part.blob if part.HasField("blob") else part.data if part.HasField("data") else part.file
            sound = made.media_type.startswith("audio/")
            told.append("" if sound and spoken else f"\n[{made.media_type}{made.filename and ': '}{made.filename}]\n")
    text = "".join(told)
    return text if len(parts) == 1 and spoken else text.strip("\n")


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


def _in_words(part: v1.Part) -> str | None:
    """What `_words` says; of what is not sent or cannot be, its name."""
    if (words := _words(part)) is not None:
        return words
    sent = _is_taken(part.data.media_type) if part.HasField("data") else part.HasField("file") and _is_image(part)
    return None if sent else _named(part)


def _named(part: v1.Part) -> str:
    kind = part.WhichOneof("kind") or "text"
    content = getattr(part, kind)
    filename = getattr(content, "filename", "")
    return f"[{getattr(content, 'media_type', '') or kind}{filename and ': '}{filename}, not shown]"


def _content(part: v1.Part, named: bool = False) -> Json | None:
    """A part of a user's message; None when it is empty. What has no place there is `named`, or else refused."""
    if (words := _in_words(part) if named else _words(part)) is not None:
        return {"type": "text", "text": words} if words else None
    match part.WhichOneof("kind"):
        case "file":
            if not _media_type(part.file.media_type).startswith("image/"):
                raise errors.content_unsupported(
                    f"The model accepts only images by URI, not media type {part.file.media_type!r}; send the data."
                )
            return {"type": "image_url", "image_url": {"url": part.file.uri}}
        case "data":
            return _data(part.data)
        case kind:
            raise errors.content_unsupported(
                f"A user's message contains a part of kind {kind!r}, which only models can write."
            )


def _data(data: v1.InlineData) -> Json:
    _check_media_type(data.media_type)
    media_type = _media_type(data.media_type)
    if audio_format := _AUDIO_FORMATS.get(media_type):
        return {"type": "input_audio", "input_audio": {"data": Base64("", data.data), "format": audio_format}}
    url = Base64(f"data:{media_type};base64,", data.data)
    if media_type.startswith("image/"):
        return {"type": "image_url", "image_url": {"url": url}}
    # Providers want a name, and go by its ending.
    name = data.filename or f"file{mimetypes.guess_extension(media_type) or ''}"
    return {"type": "file", "file": {"filename": name, "file_data": url}}


def _check_media_type(told: str) -> None:
    if not _is_taken(told):
        raise errors.content_unsupported(
            f"The model accepts text, images, documents and audio as WAV or MP3, not media type {told!r}."
        )


def _is_taken(told: str) -> bool:
    media_type = _media_type(told)
    return media_type.startswith(("image/", "application/", "text/")) or media_type in _AUDIO_FORMATS


def _media_type(told: str) -> str:
    """Without parameters, in lower case."""
    return told.partition(";")[0].strip().lower()


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
    words = [_in_words(part) for part in call.result]
    return "".join(filter(None, words)) or call.error or ("Its content follows." if None in words else "")
