"""How many tokens a model will count for a message, as far as that can be known before it does.

Tokenizers fetch their tables at run time, which a server must not. But a provider tells how many tokens each reply had:
that is exact for the reply, and shows how this conversation's text, in its own language and for its own model, falls
into tokens. Only what has no such measure is a round figure.
"""

import math
from collections.abc import Iterable, Sequence

from notecase import v1

from notecase_server.models.contract import is_text

BYTES_PER_TOKEN = 4.0
"""Where no reply tells: English and code. Other scripts take more tokens a character, and more bytes too."""

LIKELY = (1.0, 8.0)
"""The least and the most bytes a token that are believed: a token is at least one byte, and a text of words has no
tokens as long as eight on average. What lies beyond is a provider that counts something else."""

MESSAGE_TOKENS = 4
"""What providers add for a message's role and frame."""

IMAGE_TOKENS = 1000
"""Providers scale images down before they count: a photograph comes to between 765 and 1,600."""

AUDIO_BYTES = 1000
"""Of audio for each token: 10 to 32 tokens a second, of 16 KB as MP3 and 32 KB as WAV for speech."""

DOCUMENT_BYTES = 50
"""Of a PDF and the like for each token: a page has 50 to 100 KB and comes to 1,000 to 2,000."""


class Gauge:
    """Counts tokens by what some of a conversation's messages tell."""

    def __init__(self, known: Iterable[v1.Message] = ()) -> None:
        size = tokens = 0
        for message in known:
            if reported := _reported(message):
                size += _text_bytes(message)
                tokens += reported
        least, most = LIKELY
        self.bytes_per_token = min(max(size / tokens, least), most) if size and tokens else BYTES_PER_TOKEN

    def tokens(self, message: v1.Message) -> int:
        """Of all that a provider is shown of a message: its reasoning and what was made in it are not, what its calls
        came to is."""
        total = MESSAGE_TOKENS + (_reported(message) or self._text(_text_bytes(message)))
        for part in message.parts:
            if message.role != v1.Message.ROLE_ASSISTANT or is_text(part.blob.media_type):
                total += self._content(part)
            if part.HasField("tool_call"):
                call = part.tool_call
                text = sum(len((shown.text + shown.json).encode()) for shown in call.result) or len(call.error.encode())
                total += MESSAGE_TOKENS + self._text(text) + sum(self._content(shown) for shown in call.result)
        return total

    def _text(self, size: int) -> int:
        return math.ceil(size / self.bytes_per_token)

    def _content(self, part: v1.Part) -> int:
        match part.WhichOneof("kind"):
            case "file":
                return IMAGE_TOKENS  # providers take nothing else by URI
            case "blob":
                return self.content(part.blob.media_type, part.blob.size_bytes)
            case "data":
                return self.content(part.data.media_type, len(part.data.data))
        return 0

    def content(self, media_type: str, size: int) -> int:
        """Of content of that type and so many bytes."""
        if is_text(media_type):
            return self._text(size)
        kind = media_type.partition("/")[0].lower()
        if kind == "image":
            return IMAGE_TOKENS
        return size // (AUDIO_BYTES if kind == "audio" else DOCUMENT_BYTES)


def tokens_of(messages: Sequence[v1.Message]) -> int:
    """Returns the tokens of messages together, counted by what they tell."""
    return sum(map(Gauge(messages).tokens, messages))


def _reported(message: v1.Message) -> int:
    """The tokens of a reply's own text and calls; 0 where its provider told none, or counted what was made as well."""
    if any(part.HasField("blob") or part.HasField("file") for part in message.parts):
        return 0
    return max(message.usage.output_tokens - message.usage.reasoning_tokens, 0)


def _text_bytes(message: v1.Message) -> int:
    """Of what a message itself says, its calls without what they came to."""
    texts = (
        part.text + part.json + part.refusal + part.tool_call.tool + part.tool_call.arguments for part in message.parts
    )
    return sum(len(text.encode()) for text in texts)
