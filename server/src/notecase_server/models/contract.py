"""The contract between the engine and models: a request in, an ordered stream of small pieces out, or a typed
failure."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import msgspec
from notecase import v1

T = TypeVar("T")

MAX_MEDIA_BYTES = 32 << 20
"""Of what a model makes in one reply besides words, together: as much as one request carries, so that it can be shown
again. An image has 1 to 3 MB, and a minute of audio 3."""

_TEXTS = frozenset({"application/json", "application/xml", "application/yaml", "application/x-yaml"})


def is_text(media_type: str) -> bool:
    """Whether content of that type is text to a model, whatever it is to others."""
    plain = media_type.partition(";")[0].strip().lower()
    return plain.startswith("text/") or plain in _TEXTS or plain.endswith(("+json", "+xml"))


MANY_PARTS = 1000
"""Parts of messages from which on what looks at each of them is done in a thread: it takes up to 7 microseconds."""

MUCH_BYTES = 512 << 10
"""Bytes of messages from which on they are read and written in a thread: a MiB of text takes up to 15 ms to become
JSON, since a character may be written as six."""


async def looked_at(messages: Sequence[v1.Message], size: int, look: Callable[[], T]) -> T:
    """Returns what `look` returns, which looks at messages of `size` bytes together: in a thread if that takes long."""
    return await asyncio.to_thread(look) if size > MUCH_BYTES or is_many(messages) else look()


_SPOKEN = (v1.Message.ROLE_USER, v1.Message.ROLE_ASSISTANT)


def texts_of(messages: Iterable[v1.Message]) -> list[str] | None:
    """Returns the text of each message; None if one is not one text that a user or the assistant said."""
    texts = list[str]()
    for message in messages:
        if message.role not in _SPOKEN or len(parts := message.parts) != 1 or not (text := parts[0].text):
            return None
        texts.append(text)
    return texts


def is_many(messages: Sequence[v1.Message]) -> bool:
    """Whether messages have so many parts together, those of results too, that a look at each takes long."""
    left = MANY_PARTS
    for message in messages:
        left -= len(message.parts)
        if left < 0:
            return True
        if message.role == v1.Message.ROLE_ASSISTANT:
            left -= sum(len(part.tool_call.result) for part in message.parts if part.HasField("tool_call"))
    return left < 0


class Tool(NamedTuple):
    """A function that the model may call."""

    name: str
    description: str
    parameters: str
    """JSON Schema text of an object; empty for anything."""


class ModelRequest(NamedTuple):
    """One model call. The messages are the server's own copies; a provider does not change them."""

    model: str
    """As the agent names it; empty for the provider's default."""
    instruction: str
    """The rendered system text; may be empty."""
    messages: Sequence[v1.Message]
    """Oldest first, well formed: every tool call in them has an outcome."""
    generation: v1.Generation
    tools: Sequence[Tool] = ()
    load: Callable[[v1.Blob], Awaitable[bytes]] | None = None
    """Content that a message refers to, whole. BLOB_NOT_FOUND. None where no message refers to any."""
    output_schema: str = ""
    """JSON Schema text of an object that the reply is asked to be valid by; whether it is, is looked at by the
    engine."""
    texts: Sequence[str] | None = None
    """The text of each message, if each is known to be one text that a user or the assistant said (`texts_of`): nothing
    in it has to be looked for."""
    plain: bool = False
    """The reply is a text about the conversation: what the agent's `generation.extra` says of tools and of the form of
    its replies does not apply."""
    size: int = 0
    """About how many bytes the messages have, content that they refer to apart; 0 if they are known to be few."""


class Text(msgspec.Struct, frozen=True, gc=False):
    """More of the reply's text."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, gc=False):
    """More of the model's reasoning."""

    text: str


class Thought(msgspec.Struct, frozen=True, gc=False):
    """All text of the reply so far has turned out to be the model's reasoning. `text` is all of it."""

    text: str


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """More of the model's own words for not answering."""

    text: str


class Call(msgspec.Struct, frozen=True, gc=False):
    """More of a tool call. `key` is the provider's own way to tell calls of one reply apart, stable over its pieces;
    `tool` and `arguments` append to what came before and may be empty."""

    key: int
    tool: str
    arguments: str


class Media(NamedTuple):
    """An image or a clip that the model made, whole."""

    data: bytes
    media_type: str
    filename: str


class Link(NamedTuple):
    """An image that the model made, by the address where its provider keeps it. Nobody fetches it."""

    uri: str
    media_type: str


class Source(NamedTuple):
    """What the reply's text rests on, as its provider says; `uri` is an http or https one. It is cited from `start` to
    `end`, in characters of all text of the reply; both are 0 where the provider does not say."""

    uri: str
    title: str
    start: int = 0
    end: int = 0


class Cited(NamedTuple):
    """The sources of the reply's text; at most once, after all of it."""

    sources: Sequence[Source]


class Returned(NamedTuple):
    """What the provider gets back with a later request: with the call of that key, or, where it is None, with the
    message, for its reasoning. At most one for each, after all pieces of it."""

    key: int | None
    data: v1.ProviderData


class Used(msgspec.Struct, frozen=True, gc=False):
    """What the call has taken so far, where its provider says so before the end. The newest counts, and Finish has the
    whole: this is for a call that is stopped."""

    usage: v1.Usage


class Finish(msgspec.Struct, frozen=True, gc=False):
    """The reply has ended; exactly one, and last. `reason` is the provider's word ("stop", "length", "tool_calls")."""

    reason: str
    usage: v1.Usage
    cut: bool = False
    """The reply was cut at a limit or by a filter: no call in it is run, and a repeat would end the same."""


Delta = Text | Reasoning | Thought | Refusal | Call | Media | Link | Cited | Returned | Used | Finish


class Repeats(NamedTuple):
    """How often and for how long a call of a model is repeated when what went wrong may pass."""

    most: int = 2
    seconds: float = 60.0
    """What may be waited between all tries together. A provider that asks for more is not asked again."""


class Provider(Protocol):
    """A source of models. One object serves all runs at once."""

    def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        """Yields the reply's pieces in order and ends with one Finish. `usage.model` names the model that answered and
        `usage.model_calls` is 1.

        Raises NotecaseError: MODEL_UNAVAILABLE where a repeat may succeed (before or in mid-stream), MODEL_ERROR or
        CONTENT_UNSUPPORTED where it would not. The provider does not repeat by itself: the engine does, within its
        limits, and heeds the error's `retry_after` and `repeats`. The error's `usage` is what the call took, where the
        provider told it. No message holds a key, a header or the request's content. Closing the generator ends the
        request."""
        ...

    async def close(self) -> None:
        """Ends open connections. Idempotent."""
        ...
