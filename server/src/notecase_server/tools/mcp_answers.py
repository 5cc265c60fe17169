"""What one answer of an MCP server may have, whatever way it comes."""

from collections.abc import AsyncIterator
from typing import cast

import httpx2

from notecase_server.tools.outcome import MAX_MEDIA, MAX_RESULT

MAX_ANSWER = 6 * MAX_RESULT + 2 * MAX_MEDIA
"""Bytes of one answer, be it a body, an event of a stream or a line on a pipe. JSON writes a byte of text as six at
most, and three of media as four, so no result that is taken is longer."""

MAX_OBJECTS = 10_000
"""Objects in one answer: the library makes each into one of its own before anybody can look at them, and 500,000 small
ones take a gigabyte."""


def fits(size: int, objects: int) -> bool:
    """Returns whether an answer of so many bytes, with so many opening braces, is taken."""
    return size <= MAX_ANSWER and objects <= MAX_OBJECTS


class Bounded(httpx2.AsyncByteStream):
    """The body of an answer up to what one may have: MAX_ANSWER bytes and MAX_OBJECTS objects; of a stream of events,
    each event. A packed one is refused, since a megabyte may unpack to a gigabyte and was not asked for."""

    def __init__(self, response: httpx2.Response, *, events: bool) -> None:
        self._stream = cast("httpx2.AsyncByteStream", response.stream)
        self._packed = response.headers.get("content-encoding", "identity") != "identity"
        self._events = events

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._packed:
            raise httpx2.StreamError("The answer is packed, which was not asked for.")
        size = objects = 0
        async for chunk in self._stream:
            end = max(chunk.rfind(b"\n\n"), chunk.rfind(b"\n\r\n")) if self._events else -1
            size, objects = size + len(chunk), objects + chunk.count(b"{")
            if not fits(size, objects):
                raise httpx2.StreamError("The answer is larger than the server takes.")
            if end >= 0:
                size, objects = len(chunk) - end, chunk.count(b"{", end)
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
