"""Estimates how many tokens a model will count for a message.

Tokenizers download their tables at run time, which a server must not do. But a provider reports how many tokens each
reply had: that is exact for the reply, and shows how many bytes a token has in this conversation, for its language and
its model. Only content is roughly estimated.
"""

import math
from collections.abc import Iterable, Sequence

from notecase import v1

from notecase_server.models.contract import is_text

BYTES_PER_TOKEN = 4.0
"""Bytes of a token when no reply shows it: English and code. Other scripts need more tokens for each character, and
more bytes too."""

LIKELY = (1.0, 8.0)
"""The least and the most bytes a token that are believed: a token is at least one byte, and a text of words has no
tokens as long as eight on average. What lies beyond is a provider that counts something else."""

MESSAGE_TOKENS = 4
"""What providers add for a message's role and frame."""

IMAGE_TOKENS = 1000
"""Tokens of an image. Providers scale images down before they count: a photograph has between 765 and 1,600."""

AUDIO_BYTES = 1000
"""Of audio for each token: 10 to 32 tokens a second, of 16 KB as MP3 and 32 KB as WAV for speech."""

DOCUMENT_BYTES = 50
"""Bytes of a PDF and the like for each token: a page has 50 to 100 KB and 1,000 to 2,000 tokens."""


class Gauge:
    """Counts tokens by the reports on some of a conversation's messages."""

    def __init__(self, known: Iterable[v1.Message] = ()) -> None:
        size = tokens = 0
        for message in known:
            if reported := _reported(message):
                size += _text_bytes(message)
                tokens += reported
        least, most = LIKELY
        self.bytes_per_token = min(max(size / tokens, least), most) if size and tokens else BYTES_PER_TOKEN

    def tokens(self, message: v1.Message) -> int:
        """Returns the tokens of everything that a provider is shown of a message: the outcomes of its calls, but not
        its reasoning and the content made in it."""
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
    """Returns the tokens of messages together, from the reports in them if possible."""
    return sum(map(Gauge(messages).tokens, messages))


def _reported(message: v1.Message) -> int:
    """Returns the tokens of a reply's own text and calls; 0 if its provider reported none, or counted made content as
    well."""
    if any(part.HasField("blob") or part.HasField("file") for part in message.parts):
        return 0
    return max(message.usage.output_tokens - message.usage.reasoning_tokens, 0)


def _text_bytes(message: v1.Message) -> int:
    """Returns the bytes of a message itself: its calls without their outcomes."""
    texts = (
        part.text + part.json + part.refusal + part.tool_call.tool + part.tool_call.arguments for part in message.parts
    )
    return sum(len(text.encode()) for text in texts)
