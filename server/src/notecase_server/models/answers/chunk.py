"""Decodes one document of a Chat Completions answer, whatever types a server gives to its members.

Nearly every chunk has the types that OpenAI documents and is decoded straight into structs. Any other is decoded into
plain values and read member by member: a member whose type cannot be converted counts as absent, and only a document
that is not an object is refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
from notecase import v1

from notecase_server import errors
from notecase_server.errors import NotecaseError

Json = dict[str, Any]
Label = str | int | float | bool | None


class Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None
    parameters: Any = None
    """Some servers' name for the arguments."""


class CallPiece(msgspec.Struct, gc=False):
    index: Label = None
    id: Label = None
    function: Function | None = None
    extra_content: Any = None
    provider_specific_fields: Any = None
    name: Any = None
    """Next to the id, if a server leaves out `function`; the arguments too."""
    arguments: Any = None
    input: Any = None
    parameters: Any = None

    @property
    def is_usual(self) -> bool:
        """Whether its function's name and arguments are where OpenAI has them."""
        if self.function is None:
            return not (self.name or self.arguments or self.input or self.parameters)
        return self.function.arguments is not None or not self.function.parameters


class Said(msgspec.Struct, gc=False):
    """What a delta or a message says."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[CallPiece] | None = None
    function_call: Any = None
    reasoning_details: Any = None
    audio: Any = None
    images: Any = None
    image: Any = None
    annotations: Any = None
    extra_content: Any = None
    thinking_blocks: Any = None
    reasoning_opaque: Any = None
    reasoning_text: Any = None
    thinking: Any = None
    thought: Any = None
    error: Any = None


class Choice(msgspec.Struct, gc=False):
    index: Label = None
    delta: Said | None = None
    message: Said | None = None
    """The whole reply, in place of `delta` or behind all of them."""
    finish_reason: str | None = None
    usage: Any = None
    error: Any = None

    @property
    def may_fail(self) -> bool:
        """Whether it has a member that may hold an error."""
        told = self.error or (self.delta and self.delta.error) or (self.message and self.message.error)
        return bool(told)


class Chunk(msgspec.Struct):
    choices: list[Choice] | None = None
    usage: Any = None
    model: Any = None
    object: Any = None
    error: Any = None
    x_groq: Any = None
    timings: Any = None
    citations: Any = None
    search_results: Any = None
    errors: Any = None
    base_resp: Any = None
    error_code: Any = None
    error_msg: Any = None
    error_message: Any = None

    @property
    def may_fail(self) -> bool:
        """Whether it has a member that may hold an error."""
        told = self.error or self.errors or self.base_resp or self.error_code or self.error_msg or self.error_message
        return bool(told) or (isinstance(self.x_groq, dict) and bool(self.x_groq.get("error")))


class _TextDelta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: None = None
    reasoning: None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    reasoning_details: None = None
    audio: None = None
    images: None = None
    image: None = None
    annotations: None = None
    extra_content: None = None
    thinking_blocks: None = None
    reasoning_opaque: None = None
    reasoning_text: None = None
    thinking: None = None
    thought: None = None
    error: None = None


class _TextChoice(msgspec.Struct, gc=False):
    delta: _TextDelta
    index: Literal[0] | None = None
    message: None = None
    finish_reason: None = None
    usage: None = None
    error: None = None


class Token(msgspec.Struct, gc=False):
    """A chunk that holds some text and nothing else, as nearly every one does: what `Chunk` has besides is absent."""

    choices: tuple[_TextChoice]
    model: str | None = None
    usage: None = None
    error: None = None
    x_groq: None = None
    citations: None = None
    search_results: None = None
    errors: None = None
    base_resp: None = None
    error_code: None = None
    error_msg: None = None
    error_message: None = None


class Counted(msgspec.Struct, forbid_unknown_fields=True):
    """A chunk that holds the usage and nothing else, as OpenAI ends a reply."""

    object: Literal["chat.completion.chunk"]
    choices: tuple[()]
    usage: dict[str, Any]
    id: Any = None
    created: Any = None
    model: str | None = None
    service_tier: Any = None
    system_fingerprint: Any = None
    obfuscation: Any = None


_MALFORMED = "The model provider sent something that is not part of a Chat Completions reply."

_CHUNK = msgspec.json.Decoder(Chunk)
_TOKEN = msgspec.json.Decoder(Token)
_TOKENS = msgspec.json.Decoder(list[Token])
_COUNTED = msgspec.json.Decoder(Counted)
_ANY = msgspec.json.Decoder()

_THOUGHTS = ("reasoning_content", "reasoning", "reasoning_text", "thinking", "thought", "thinking_content")
"""The members in which servers put reasoning, most usual first: DeepSeek, vLLM before 0.11 and most others; OpenRouter,
Groq, Ollama, vLLM; GitHub Copilot; Anthropic's own word; Gemini gateways; MiniMax gateways."""

_THOUGHT_PARTS = frozenset({"thinking", "reasoning", "thought", "reasoning.text", "reasoning.summary", "summary_text"})
_AS_THEY_ARE = (
    "function_call",
    "reasoning_details",
    "audio",
    "images",
    "image",
    "annotations",
    "extra_content",
    "thinking_blocks",
    "reasoning_opaque",
)

_CALL_PARTS = frozenset({"tool_use", "tool_call", "function_call"})
"""Types of parts of the content that are calls: Anthropic's, and those of OpenAI's Responses."""

_ARGUMENTS = ("arguments", "input", "parameters")
"""The members with a call's arguments: OpenAI's, Anthropic's, Llama's."""

_IMAGE_PARTS = frozenset({"image_url", "output_image", "image", "image_generation_call", "inline_data", "inlineData"})
"""Types of parts that hold an image, and members by which one without a type does."""

_OF_PARTS = frozenset({"type", "text", "refusal", *_IMAGE_PARTS})
"""Members by which an object is a part of the content."""

_OF_CHUNKS = ("usage", "model", "object", "error", "x_groq", "citations", "search_results")


def decode(data: bytes) -> tuple[Chunk | None, bool]:
    """Returns the chunk, and whether its strings may hold lone surrogates. None for a document that needs `loose`.
    Raises MODEL_ERROR for what is not JSON."""
    try:
        return _CHUNK.decode(data), False
    except (msgspec.ValidationError, RecursionError):
        return None, False
    except ValueError:
        return None, True


def token(data: bytes) -> Token | None:
    """Returns the chunk if it is nothing but text."""
    try:
        return _TOKEN.decode(data)
    except (ValueError, RecursionError):
        return None


def tokens(documents: list[bytes]) -> list[Token] | None:
    """Returns the chunks, in order, if each document is one of nothing but text and has no line feed. Decoding them as
    one array takes a tenth of the time that one after the other takes."""
    joined = b",".join(documents)
    if b"\n" in joined:
        return None
    try:
        found = _TOKENS.decode(b"[%b]" % joined)
    except (ValueError, RecursionError):
        return None
    return found if len(found) == len(documents) else None


def counted(data: bytes) -> Counted | None:
    """Returns the chunk if it is nothing but the usage."""
    try:
        return _COUNTED.decode(data)
    except (ValueError, RecursionError):
        return None


def plain(data: bytes) -> Any:
    """Decodes a document into plain values, also one that is not quite JSON but sent by real servers: half a surrogate
    pair, a character cut in two, NaN. Raises MODEL_ERROR."""
    try:
        return _ANY.decode(data)
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(data.decode("utf-8", "replace"), strict=False, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        raise NotJsonError from None


def last_line(text: bytes) -> Any:
    """Decodes the last line of a text whose first ones were cut; returns None if it is not JSON either."""
    _, line, rest = text.rpartition(b"\n")
    try:
        return plain(rest) if line else None
    except NotJsonError:
        return None


def loose(value: Any) -> Chunk:
    """Makes a chunk of a plain value. Raises MODEL_ERROR when it or one of its choices is not an object."""
    if not isinstance(value, dict):
        raise malformed()
    choices = value.get("choices")
    if isinstance(choices, dict):
        choices = [choices]
    if choices is not None and not isinstance(choices, list):
        raise malformed()
    return Chunk(
        choices=[_choice(choice) for choice in choices or () if isinstance(choice, dict)],
        **{name: value.get(name) for name in _OF_CHUNKS},
    )


class NotJsonError(NotecaseError):
    """A document that is not JSON, or only the beginning of some."""

    def __init__(self) -> None:
        super().__init__(v1.ERROR_REASON_MODEL_ERROR, _MALFORMED)


def malformed() -> NotecaseError:
    return errors.model_error(_MALFORMED)


def _choice(value: Json) -> Choice:
    reason = value.get("finish_reason")
    return Choice(
        index=_label(value.get("index")),
        delta=_said(value.get("delta")),
        message=_said(value.get("message")),
        finish_reason=reason if isinstance(reason, str) else None,
        usage=value.get("usage"),
        error=value.get("error"),
    )


def _said(value: Any) -> Said | None:
    if isinstance(value, str):
        return Said(content=value)
    if not isinstance(value, dict):
        return None
    said = Said(**{name: value.get(name) for name in _AS_THEY_ARE})
    content = value.get("content")
    if content is not None and not isinstance(content, str | list | dict):
        raise malformed()  # the reply itself, in a type that says nothing
    if content and isinstance(content, dict) and content.keys().isdisjoint(_OF_PARTS):
        content = json.dumps(content, ensure_ascii=False)  # a reply by a schema, decoded by its server
    refusal = value.get("refusal") or [part.get("refusal") for part in _parts(content) if isinstance(part, dict)]
    said.content, said.refusal = _text_of(content), _text_of(refusal)
    thought = next((text for name in _THOUGHTS if (text := thought_of(value.get(name)))), "")
    said.reasoning_content = thought or _thoughts_within(content)
    if images := _images_within(content):
        said.images = [*images, *(value["images"] if isinstance(value.get("images"), list) else ())]
    calls = value.get("tool_calls") or [part for part in _parts(content) if _is_call(part)] or None
    if isinstance(calls, dict):
        calls = [calls]
    if isinstance(calls, list):
        said.tool_calls = [call_piece(call) for call in calls if isinstance(call, dict)]
    return said


def usual(piece: CallPiece) -> CallPiece:
    """Returns a piece in the usual form, if its function's members have other names or are next to its id."""
    return call_piece(msgspec.to_builtins(piece))


def call_piece(value: Json, index: Label = None) -> CallPiece:
    """Makes a piece of a call from an object: its function's members may be next to its id."""
    held = value.get("function")
    function = held if isinstance(held, dict) else value
    name = function.get("name")
    arguments = next((given for member in _ARGUMENTS if (given := function.get(member)) is not None), None)
    if isinstance(arguments, dict | list):
        arguments = json.dumps(arguments, ensure_ascii=False, separators=(",", ":")) if arguments else "{}"
    return CallPiece(
        index=_label(value.get("index", index)),
        id=_label(value.get("call_id") or value.get("id")),
        function=Function(name if isinstance(name, str) else None, arguments if isinstance(arguments, str) else None),
        extra_content=value.get("extra_content"),
        provider_specific_fields=value.get("provider_specific_fields"),
    )


def _label(value: Any) -> Label:
    """Makes a label of a member that only identifies something; equal labels mean the same."""
    return value if isinstance(value, str | int | float | bool) else None


def _text_of(value: Any) -> str:
    """The text of a member that should be a string: itself, or that of its parts."""
    if isinstance(value, str):
        return value
    return "".join(_part_text(part) for part in _parts(value))


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type") in _THOUGHT_PARTS:
        return ""
    text = part.get("text")
    if isinstance(text, dict):
        text = text.get("value")
    return text if isinstance(text, str) else ""


def thought_of(value: Any, depth: int = 0) -> str:
    """The text of reasoning, in whatever shape: a string, an object, a list of either."""
    if isinstance(value, str):
        return value
    if depth > 4:
        return ""
    if isinstance(value, dict):
        held = next(
            (value[name] for name in ("text", "content", "thinking", "summary", "reasoning") if value.get(name)), ""
        )
        return thought_of(held, depth + 1)
    if isinstance(value, Sequence):
        return "".join(thought_of(part, depth + 1) for part in value)
    return ""


def _thoughts_within(content: Any) -> str:
    return "".join(
        thought_of(part) for part in _parts(content) if isinstance(part, dict) and part.get("type") in _THOUGHT_PARTS
    )


def _is_call(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _CALL_PARTS


def _images_within(content: Any) -> list[Json]:
    return [
        part
        for part in _parts(content)
        if isinstance(part, dict) and (part.get("type") in _IMAGE_PARTS or not part.keys().isdisjoint(_IMAGE_PARTS))
    ]


def _parts(content: Any) -> Iterator[Any]:
    if isinstance(content, Mapping):
        yield content
    elif isinstance(content, list):
        yield from content
