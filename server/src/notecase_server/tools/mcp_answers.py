"""Limits the answers of MCP servers over any transport, and reads answers that deviate from the protocol."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, cast

import httpx2
from mcp import types
from mcp.shared.message import SessionMessage

from notecase_server.tools.outcome import MAX_MEDIA, MAX_RESULT

MAX_ANSWER = 6 * MAX_RESULT + 2 * MAX_MEDIA
"""Bytes of one answer, be it a body, an event of a stream or a line on a pipe. JSON writes a byte of text as six at
most, and three of media as four, so no result that is taken is longer."""

Asked = set[int | str | None]
"""Ids of requests that a server has not answered."""

HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair."""

MAX_OBJECTS = 10_000
"""Objects in one answer: the library converts all of them before our code sees any, and 500,000 small ones take a
gigabyte."""


def fits(size: int, objects: int) -> bool:
    """Returns whether an answer of so many bytes, with so many opening braces, is taken."""
    return size <= MAX_ANSWER and objects <= MAX_OBJECTS


class Bounded(httpx2.AsyncByteStream):
    """The body of an answer up to what one may have: MAX_ANSWER bytes and MAX_OBJECTS objects; of a stream of events,
    each event. A compressed one is refused, since a megabyte may expand to a gigabyte, and none was requested."""

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


class Mended(httpx2.AsyncByteStream):
    """The body that answers a request of that id, read at once and mended as `read_message` does."""

    def __init__(self, stream: httpx2.AsyncByteStream, asked: int | str) -> None:
        self._stream = stream
        self._asked = asked

    async def __aiter__(self) -> AsyncIterator[bytes]:
        body = b"".join([chunk async for chunk in self._stream])
        said = read_message(body, {self._asked})
        if isinstance(said, SessionMessage):
            if isinstance(said.message, types.JSONRPCResponse | types.JSONRPCError):
                said.message.id = self._asked
            body = said.message.model_dump_json(by_alias=True, exclude_unset=True).encode()
        yield body

    async def aclose(self) -> None:
        await self._stream.aclose()


class MendedEvents(httpx2.AsyncByteStream):
    """The events that answer a request of that id. Data of one line, as all of it usually is, is mended as
    `read_message` does, unless it has megabytes, which would take too long to read twice."""

    def __init__(self, stream: httpx2.AsyncByteStream, asked: int | str) -> None:
        self._stream = stream
        self._asked = asked

    async def __aiter__(self) -> AsyncIterator[bytes]:
        begun: list[bytes] = []
        async for chunk in self._stream:
            end = chunk.rfind(b"\n") + 1
            if not end:
                begun.append(chunk)
                continue
            lines = b"".join([*begun, chunk[:end]]).split(b"\n")
            begun = [chunk[end:]]
            yield b"\n".join(map(self._mended, lines))
        yield b"".join(begun)

    def _mended(self, line: bytes) -> bytes:
        data = line[5:]
        if not line.startswith(b"data:") or len(data) > MAX_RESULT or not data.lstrip().startswith((b"{", b"[")):
            return line
        try:
            types.jsonrpc_message_adapter.validate_json(data, by_name=False)
        except ValueError:
            said = read_message(data, {self._asked})
            if isinstance(said, SessionMessage):
                return b"data:" + said.message.model_dump_json(by_alias=True, exclude_unset=True).encode()
        return line

    async def aclose(self) -> None:
        await self._stream.aclose()


LOST_SESSION = re.compile(
    r"(?i)\b(no valid|no such|invalid|unknown|expired|missing)\b[^.]{0,20}\bsession"
    r"|\bsession\b[^.]{0,40}\b(not found|not exist|invalid|unknown|expired|terminated)"
    r"|\bnot (been )?initiali[sz]ed|^invalid request\.?$"
)
"""Words of servers about an unknown session. Every request is valid, so a server that finds one invalid does not know
its session."""

_OF_PROTOCOL = frozenset({types.INVALID_REQUEST, -32000, -32001})
"""Codes of errors that are about the connection, and not about a call's arguments or result."""


def reports_lost_session(error: types.ErrorData) -> bool:
    """Returns whether an error says that the server does not know the session that a request named."""
    return error.code in _OF_PROTOCOL and LOST_SESSION.search(error.message) is not None


def mend_about(result: dict[str, Any]) -> None:
    """Makes what a server says of itself what the protocol has: servers that were written by hand leave out its
    version, and say of a capability only that they have it."""
    info, capabilities = result.get("serverInfo"), result.get("capabilities")
    known = {name: value for name, value in info.items() if value is not None} if isinstance(info, dict) else {}
    result["serverInfo"] = {"name": "", "version": ""} | known
    result["capabilities"] = {
        name: {} if value is True else value
        for name, value in (capabilities.items() if isinstance(capabilities, dict) else ())
        if value is True or isinstance(value, dict)
    }


def mend_content(result: dict[str, Any]) -> None:
    """Makes the content of a call's result what the protocol has, since the library refuses it as a whole: text alone
    becomes a block, and a block of an unknown kind the text in it, or its name."""
    content = result.get("content")
    if content is None:
        content = []
    elif not isinstance(content, list):
        content = [content]
    elif len(content) > MAX_OBJECTS:
        content = [{"type": "text", "text": f"[{len(content)} blocks, more than can be read]"}]
    structured = result.get("structuredContent")
    if not isinstance(structured, dict):
        result.pop("structuredContent", None)
        if structured is not None and all(map(_is_blank, content)):
            content = [json.dumps(structured, ensure_ascii=False)]
    if result.get("isError") is None:
        result.pop("isError", None)
    for block in content:
        if isinstance(block, dict):
            block.pop("annotations", None)
            if block.get("type") == "resource_link" and not isinstance(block.get("name"), str):
                block["name"] = "resource"
    result["content"] = [block if _is_block(block) else {"type": "text", "text": _words(block)} for block in content]


def _is_blank(block: Any) -> bool:
    text = block.get("text") if isinstance(block, dict) and block.get("type") == "text" else block
    return isinstance(text, str) and not text.strip()


def _is_block(block: Any) -> bool:
    with suppress(ValueError):
        types.CallToolResult.model_validate({"content": [block]}, by_name=False)
        return isinstance(block, dict) and "type" in block
    return False


def _words(block: Any) -> str:
    if isinstance(block, str):
        return block
    held = block if isinstance(block, dict) else {}
    resource = held.get("resource")
    text = resource.get("text") if isinstance(resource, dict) else held.get("text")
    if text is None:
        return f"[{str(held.get('type', 'content'))[:40]} that cannot be read]"
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)


_MOST_STARTS = 16
"""Places of a line at which a message may begin that are tried: each may take as long as the line is."""

_DECODER = json.JSONDecoder(strict=False, parse_constant=lambda _: None)


def messages_of(line: bytes, asked: Asked) -> list[SessionMessage | Exception]:
    """Reads a line of a program's output: one message, or the answers that share it with words which the program wrote
    without a line end. Other messages among words may be a log of what the program was asked."""
    said = read_message(line, asked)
    if isinstance(said, SessionMessage):
        return [said]
    found: list[SessionMessage | Exception] = []
    text, at = line.decode("utf-8", "replace"), -1
    for _ in range(_MOST_STARTS):
        if (start := text.find("{", at + 1)) < 0:
            break
        try:
            _, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            at = start
            continue
        at = end - 1
        found.append(read_message(text[start:end].encode(), asked))
    answers = (types.JSONRPCResponse, types.JSONRPCError)
    return [each for each in found if isinstance(each, SessionMessage) and isinstance(each.message, answers)] or [said]


def read_message(line: bytes, asked: Asked) -> SessionMessage | Exception:
    """A line, or a body, as a message, or why it is none: the library takes both. An answer that is not quite one is
    mended, or becomes an error to what it answers, which would wait for it; one without an id, to what is `asked` if
    that is only one thing. A list with one answer, as an earlier version of the protocol had it, is that answer."""
    try:
        message = types.jsonrpc_message_adapter.validate_json(line, by_name=False)
        if isinstance(message, types.JSONRPCError) and message.id is None and len(asked) == 1:
            message.id = next(iter(asked))
        return SessionMessage(message)
    except ValueError as error:
        try:
            value = json.loads(line.decode("utf-8-sig", "replace"), strict=False, parse_constant=lambda _: None)
            if isinstance(value, list):
                answers = [said for said in value if isinstance(said, dict) and _is_answer(said)]
                value = answers[0] if len(answers) == 1 else None
            if isinstance(value, dict):
                return SessionMessage(_mended(value, asked))
        except (ValueError, RecursionError):
            pass
        return error


def _is_answer(said: dict[str, Any]) -> bool:
    """Whether an object answers something. A program's log lines, which some write as JSON, do not."""
    return "method" not in said and ("jsonrpc" in said or "result" in said or isinstance(said.get("error"), dict))


def _mended(said: dict[str, Any], asked: Asked) -> types.JSONRPCMessage:
    """Raises ValueError for what is neither a message nor answers one."""
    if _is_answer(said):
        said["jsonrpc"] = "2.0"
        if said.get("id") is None and len(asked) == 1:
            said["id"] = next(iter(asked))
        elif isinstance(said.get("id"), float):
            said["id"] = int(said["id"])
    text = HALF.sub("\ufffd", json.dumps(said, ensure_ascii=False))
    with suppress(ValueError):
        return types.jsonrpc_message_adapter.validate_json(text, by_name=False)
    told = said.get("error")
    words = told.get("message") if isinstance(told, dict) else told
    if not isinstance(words, str):
        words = "It gave an answer that is not valid." if told is None else "It gave no reason."
    if "method" in said or not isinstance(said.get("id"), int | str):
        raise ValueError("an answer to nothing")
    code = types.PARSE_ERROR if told is None else types.INTERNAL_ERROR
    error = types.ErrorData(code=code, message=HALF.sub("\ufffd", words))
    return types.JSONRPCError(jsonrpc="2.0", id=said["id"], error=error)
