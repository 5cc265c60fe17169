"""The bytes of a request in pieces, so that no step of a request with much content blocks the interpreter or the loop
for long."""

import asyncio
import base64
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import msgspec

BASE64_BYTES = 3 << 18
"""Encoded at once, which takes about 3 ms: a multiple of three, so that pieces make one whole."""

PIECE_BYTES = 256 << 10
"""Written to a connection at once."""

TEXT_LENGTH = 256 << 10
"""Characters written as JSON at once, which takes up to 4 ms."""


class Base64:
    """A text of JSON that ends with content: as a value in a request it is written piece by piece."""

    __slots__ = ("_data", "_prefix")

    def __init__(self, prefix: str, data: bytes) -> None:
        self._prefix = prefix
        self._data = data

    def pieces(self) -> Iterator[bytes]:
        yield msgspec.json.encode(self._prefix)[:-1]
        view = memoryview(self._data)
        for start in range(0, len(view), BASE64_BYTES):
            yield base64.b64encode(view[start : start + BASE64_BYTES])
        yield b'"'


class Pieces:
    """A body that is sent piece by piece, as often as it is asked for."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self.size = sum(map(len, pieces))
        self.whole = pieces[0] if len(pieces) == 1 and self.size <= PIECE_BYTES else b""
        """All of it where it is one short piece; otherwise nothing."""

    def is_same(self, other: "Pieces") -> bool:
        """Whether the other has the same pieces."""
        return self._pieces == other._pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            for start in range(0, len(piece), PIECE_BYTES):
                yield piece[start : start + PIECE_BYTES]
                await asyncio.sleep(0)


def encoded(body: Mapping[str, Any], *, long: bool = False) -> Pieces:
    """The JSON of a request, whose values may be Base64. The messages of a `long` one are written some at a time, and
    their long texts in pieces."""
    held: list[Base64] = []
    mark = ""

    def marked(value: Base64) -> str:
        nonlocal mark
        held.append(value)
        mark = mark or secrets.token_hex(16)
        return mark

    messages = body.get("messages")
    if long and isinstance(messages, list):
        batches = [batch if len(batch) > 1 else [_by_pieces(batch[0])] for batch in _batches(messages)]
        # The brackets are left out: such a text stands for all messages of its batch.
        written = [msgspec.json.encode(batch, enc_hook=marked)[1:-1] for batch in batches]
        body = {**body, "messages": [*map(msgspec.Raw, written)]}
    text = msgspec.json.encode(body, enc_hook=marked)
    if not held:
        return Pieces([text])
    first, *texts = text.split(f'"{mark}"'.encode())
    pieces = [first]
    for value, text in zip(held, texts, strict=True):
        pieces += [*value.pieces(), text]
    return Pieces(pieces)


def _batches(messages: Sequence[Any]) -> Iterator[list[Any]]:
    """Yields the messages in batches of at most TEXT_LENGTH characters. One that is longer, or has more than a role and
    a text, is a batch by itself."""
    batch, room = list[Any](), TEXT_LENGTH
    for message in messages:
        text = message.get("content") if isinstance(message, dict) and len(message) == 2 else None
        length = len(text) if isinstance(text, str) else TEXT_LENGTH + 1
        if length > room and batch:
            yield batch
            batch, room = [], TEXT_LENGTH
        batch.append(message)
        room -= length
    if batch:
        yield batch


def _by_pieces(message: Any) -> Any:
    """Returns a message whose text, if it is long, has been written already."""
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str) or len(text) <= TEXT_LENGTH:
        return message
    pieces = (text[start : start + TEXT_LENGTH] for start in range(0, len(text), TEXT_LENGTH))
    written = b"".join([msgspec.json.encode(piece)[1:-1] for piece in pieces])
    return {**message, "content": msgspec.Raw(b'"%b"' % written)}
