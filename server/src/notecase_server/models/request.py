"""A model call as the body of a Chat Completions request, in the shape that its profile says.

The history is sent whole with each call, so that what is done for every message is kept cheap.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import msgspec
from notecase import v1

from notecase_server import errors
from notecase_server.models.contract import MUCH_BYTES, ModelRequest, Tool, is_many
from notecase_server.models.profiles import Profile
from notecase_server.models.request_content import (
    content_of,
    in_words,
    is_image,
    is_one_text,
    newest_images,
    newest_of_user,
    outcome,
    reply_text,
    system_text,
)
from notecase_server.models.request_tools import Json, arguments, declared, is_nine, loosen, made_id, shaped, tool_name

LARGE_BYTES = 64 << 10
"""Bytes of declarations from which on a request is written in a thread: a parser takes up to 10 ms for them."""

MANY_TEXTS = 5000
"""Messages of one text from which on a request is written in a thread: each takes about a microsecond."""

BEGIN = "Begin."
"""What a user says in a conversation that would begin with a reply."""

GO_ON = "Continue."
"""What a user says in a request that would end with a reply."""

BRIDGE = "I have the result."
"""What an assistant says between a tool's message and a user's, for servers that take no user there."""

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

_NOTHING: dict[str, Json] = {"null": {"content": None}, "empty": {"content": ""}, "absent": {}}
"""How a reply without text is written, by Profile.empty_content."""


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
        "messages": _Conversation(profile, origin).written(
            [request.instruction, asked], request.messages, request.texts
        ),
        "stream": profile.stream,
    }
    if profile.stream and profile.stream_options:
        made["stream_options"] = {"include_usage": True}
    tools = request.tools
    if not tools and profile.called_tools == "declared":
        tools = [Tool(name, "Not available now.", "") for name in sorted(set(_called(request.messages)))]
    if tools:
        how = profile.schemas, profile.schema_without, profile.combined, profile.descriptions
        made["tools"] = [declared(tool, *how) for tool in tools]
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
        loosen(made, request.messages)
    if not made.get("model"):
        raise errors.model_error("The agent names no model, and the provider has no default model.")
    return made


def model_of(request: ModelRequest, default: str) -> str:
    """Returns the model that a request is for, which `Generation.extra` may name. Raises MODEL_ERROR when that is no
    JSON object."""
    named = _extra(request.generation.extra).get("model") if request.generation.extra else None
    return named if isinstance(named, str) and named else request.model or default


def returns_data(request: ModelRequest, model: str, provider: str) -> bool:
    """Whether anything in the request's history is the provider's own data for that model."""
    return request.texts is None and any(
        _is_from(data, (provider, model))
        for message in request.messages
        if message.role == v1.Message.ROLE_ASSISTANT and not is_one_text(message)
        for part in message.parts
        for data in (part.reasoning.provider_data, part.tool_call.provider_data)
    )


def _called(messages: Iterable[v1.Message]) -> Iterator[str]:
    for message in messages:
        yield from (tool_name(part.tool_call.tool) for part in message.parts if part.HasField("tool_call"))


def is_large(request: ModelRequest) -> bool:
    """Whether the request takes long to write, its content apart."""
    size = len(request.output_schema)
    for tool in request.tools:
        size += len(tool.description) + len(tool.parameters)
    many = is_many(request.messages) if request.texts is None else len(request.texts) > MANY_TEXTS
    return size > LARGE_BYTES or request.size > MUCH_BYTES or many


def _extra(text: str) -> Json:
    try:
        return msgspec.json.decode(text, type=Json)
    except (msgspec.DecodeError, RecursionError):
        raise errors.model_error("The agent's generation.extra is not a JSON object.") from None


def _output(request: ModelRequest, profile: Profile) -> tuple[str, Json | None]:
    """Returns what the system message says about the reply's schema, and the `response_format`."""
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
        schema["schema"] = shaped(request.output_schema, profile.schemas, profile.schema_without)
    if profile.schemas == "strict":
        schema["strict"] = True
    return "", {"type": "json_schema", "json_schema": schema}


class _Neighbours(list[Any]):
    """Contents that become the content of one message once all of them are known. Joined one by one, those before would
    be copied each time."""


class _Conversation:
    """Writes the messages of one request, oldest first."""

    def __init__(self, profile: Profile, origin: tuple[str, str]) -> None:
        self._profile = profile
        self._origin = origin
        self._joined = profile.neighbours == "joined"
        self._unsigned = profile.unsigned_reply
        self._made: list[Json] = []
        self._system: list[str] = []
        self._taken: set[str] = set()
        """Ids of calls so far: some servers begin again with each reply."""

    def written(self, first: Iterable[str], messages: Sequence[v1.Message], texts: Sequence[str] | None) -> list[Json]:
        """Returns the conversation as Chat Completions has it. A message without content, or of blanks alone, is left
        out, since providers refuse it. `texts` as in ModelRequest."""
        for text in first:
            if text:
                self._say_system(text)
        if texts is None:
            self._say(messages)
        else:
            self._say_texts(messages, texts)
        made = self._made
        for message in made if self._joined else ():
            if isinstance(message.get("content"), _Neighbours):
                message["content"] = _together(message["content"])
        if self._profile.last == "user" and (not made or made[-1]["role"] not in ("user", "tool")):
            self._say_user(GO_ON)
        if self._profile.first == "user" and made and made[0]["role"] == "assistant":
            made.insert(0, {"role": "user", "content": BEGIN})
        if self._system:
            self._say_first("\n\n".join(self._system))
        return made

    def _say_texts(self, messages: Sequence[v1.Message], texts: Sequence[str]) -> None:
        """As `_say`, for messages that are one text each. A text is not read from its message, which would take longer
        than all the rest."""
        made, before, assistant = self._made, None, v1.Message.ROLE_ASSISTANT
        for message, text in zip(messages, texts, strict=True):
            role = message.role
            if text.isspace():
                continue
            if role == before and self._joined:
                _add(made[-1], text)
            elif role == assistant:
                made.append({**self._unsigned, "role": "assistant", "content": text})
            else:
                made.append({"role": "user", "content": text})
            before = role

    def _say(self, messages: Sequence[v1.Message]) -> None:
        turn = self._turn(messages)
        newest, asked = newest_images(messages, self._profile), newest_of_user(messages)
        for index, message in enumerate(messages):
            role, parts = message.role, message.parts
            if len(parts) == 1 and (text := parts[0].text or parts[0].json):
                # Nearly every message.
                if text.isspace():
                    continue
                if role == v1.Message.ROLE_ASSISTANT:
                    self._say_assistant({"role": "assistant", "content": text})
                elif role == v1.Message.ROLE_SYSTEM:
                    self._say_system(text)
                else:
                    self._say_user(text)
            elif role == v1.Message.ROLE_ASSISTANT:
                self._reply(message, index >= turn, index == newest)
            elif role == v1.Message.ROLE_SYSTEM:
                if (text := system_text(parts)) and not text.isspace():
                    self._say_system(text)
            elif content := [shown for part in parts if (shown := content_of(part, index not in asked)) is not None]:
                self._say_user(self._as_text(content))

    def _turn(self, messages: Sequence[v1.Message]) -> int:
        """Returns the index from which on reasoning is given back."""
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
        elif self._profile.system_role == "user":
            self._say_user(text)
        else:
            self._made.append({"role": self._profile.system_role, "content": text})

    def _say_first(self, text: str) -> None:
        """Puts a system message before all others."""
        role, made = self._profile.system_role, self._made
        if role == "user" and self._joined and made and made[0]["role"] == "user":
            made[0]["content"] = _together(_Neighbours([text, made[0]["content"]]))
        else:
            made.insert(0, {"role": role, "content": text})

    def _say_user(self, content: str | list[Json]) -> None:
        last = self._made[-1] if self._made else {}
        if self._joined and last.get("role") == "user":
            _add(last, content)
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
            self._made[-1] = message | {"content": last["content"]}
            _add(self._made[-1], message.get("content"))
        else:
            self._made.append(message)

    def _as_text(self, content: list[Json]) -> str | list[Json]:
        if self._profile.text == "string" and all(part["type"] == "text" for part in content):
            return "\n\n".join(part["text"] for part in content)
        return content

    def _reply(self, message: v1.Message, with_reasoning: bool, with_images: bool) -> None:
        """Writes what the model said, and behind it one answer to each of its calls."""
        profile = self._profile
        said = [part for part in message.parts if part.WhichOneof("kind") not in {"reasoning", "refusal", "tool_call"}]
        images = [part for part in said if with_images and is_image(part) and not part.HasField("blob")]
        text = reply_text(said, profile.made_images == "words")
        text = text if text.strip() else ""  # Anthropic refuses blank text as it does empty text
        refusal = "".join(part.refusal for part in message.parts)
        refusal = refusal if refusal.strip() else ""
        calls = [part.tool_call for part in message.parts if part.HasField("tool_call")]
        if refusal and profile.refusal == "text":
            text, refusal = f"{text}\n\n{refusal}" if text else refusal, ""
        if text or refusal or calls:
            self._say_reply(message, text, refusal, calls, with_reasoning)
        # A tool's answer can only be text there, and so can a reply: what else they gave is shown behind them.
        for call in calls:
            if media := [content_of(part) for part in call.result if in_words(part) is None]:
                title = {"type": "text", "text": f"From the result of {call.tool}:"}
                self._say_user([title, *(part for part in media if part is not None)])
        if shown := [content for part in images if (content := content_of(part)) is not None]:
            self._say_user([{"type": "text", "text": "From your reply:"}, *shown])

    def _say_reply(
        self, message: v1.Message, text: str, refusal: str, calls: list[v1.ToolCall], with_reasoning: bool
    ) -> None:
        profile = self._profile
        nothing = _NOTHING[profile.empty_content]
        reasoning = self._reasoning(message) if with_reasoning else {}
        made: Json = reasoning | {"role": "assistant"} | ({"content": text or None} if text or refusal else nothing)
        if refusal:
            made["refusal"] = refusal
        for group in [calls] if profile.calls == "many" or not calls else [[call] for call in calls]:
            if shown := [self._call(call) for call in group]:
                made["tool_calls"] = shown
            self._say_assistant(made)
            for call, written in zip(group, shown, strict=True):
                content = outcome(call)
                content = content if content.strip() else profile.empty_result
                self._made.append({"role": "tool", "tool_call_id": written["id"], "content": content})
            made = {name: value for name, value in made.items() if name == "role" or name in reasoning} | nothing

    def _reasoning(self, message: v1.Message) -> Json:
        """Returns what the provider gets back of its model's reasoning, if it is its own and whole."""
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
        if not call_id or call_id in self._taken or (self._profile.call_ids == "nine" and not is_nine(call_id)):
            call_id = made_id(call.call_id)
        self._taken.add(call_id)
        made: Json = {
            "id": call_id,
            "type": "function",
            "function": {"name": tool_name(call.tool), "arguments": arguments(call.arguments)},
        }
        return ((own and _members(call.provider_data)) or self._profile.unsigned_call) | made


def _add(message: Json, content: str | list[Json] | None) -> None:
    """Adds to the content of a message."""
    held = message["content"]
    if not isinstance(held, _Neighbours):
        held = message["content"] = _Neighbours([held])
    held.append(content)


def _together(contents: _Neighbours) -> str | list[Json]:
    """Returns one content of several, of which nothing is left out but what is empty."""
    texts = list(takewhile(lambda content: not isinstance(content, list), contents))
    text, others = "\n\n".join(filter(None, texts)), contents[len(texts) :]
    if not others:
        return text
    parts = [part if isinstance(part, list) else [{"type": "text", "text": part}] for part in (text, *others) if part]
    return [one for part in parts for one in part]


def _is_from(data: v1.ProviderData, origin: tuple[str, str]) -> bool:
    return bool(data.provider) and (data.provider, data.model) == origin


def _members(data: v1.ProviderData) -> Json:
    """Returns the members as they came, byte for byte."""
    if not data.members:
        return {}
    try:
        members: Json = msgspec.json.decode(data.members, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return {}  # an import may hold anything
    return members
