"""MCP servers whose answers are larger than an answer can be, whatever way they come."""

import asyncio
import gzip
import json
import os
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from notecase import v1
from notecase_server.tools.contract import Outcome
from notecase_server.tools.mcp_answers import MAX_ANSWER
from notecase_server.tools.toolbox import make_toolbox

from tests.support.mcp_process import at, stdio
from tests.tools.calls import context

JSON, EVENTS = "application/json", "text/event-stream"

TOOL = {"name": "t", "inputSchema": {"type": "object"}}
ABOUT = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": {"name": "s", "version": "1"}}


class Hostile:
    """Speaks the protocol, up to the answer of a call: that one is `body`, which is said to be of `kind`."""

    def __init__(self, kind: str, body: bytes, coding: str = "") -> None:
        self._headers = f"Content-Type: {kind}\r\n" + (f"Content-Encoding: {coding}\r\n" if coding else "")
        self._body = body

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length:")[2].partition("\r\n")[0] or 0)
                asked = json.loads(await reader.readexactly(length) or b"{}")
                writer.write(self._answer(asked))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def _answer(self, asked: dict[str, Any]) -> bytes:
        match asked.get("method"):
            case "initialize":
                return _http(f"Content-Type: {JSON}\r\n", _result(asked, ABOUT))
            case "tools/list":
                return _http(f"Content-Type: {JSON}\r\n", _result(asked, {"tools": [TOOL]}))
            case "tools/call":
                return _http(self._headers, self._body.replace(b"ASKED", str(asked["id"]).encode()))
            case str() if "id" in asked:
                error = {"code": -32601, "message": "no"}
                told = json.dumps({"jsonrpc": "2.0", "id": asked["id"], "error": error}).encode()
                return _http(f"Content-Type: {JSON}\r\n", told)
            case _:
                return b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"


def _http(headers: str, body: bytes) -> bytes:
    return f"HTTP/1.1 200 OK\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _result(asked: dict[str, Any], result: object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}).encode()


def answer(content: bytes) -> bytes:
    return b'{"jsonrpc":"2.0","id":ASKED,"result":{"content":[%s]}}' % content


def event(data: bytes) -> bytes:
    return b"event: message\ndata: " + data + b"\n\n"


BLOCK = b'{"type":"text","text":"x"}'
LONG = answer(b'{"type":"text","text":"%s"}' % (b"x" * MAX_ANSWER))
MANY = answer(b",".join([BLOCK] * 100_000))
SMALL = answer(BLOCK)


@pytest.mark.parametrize(
    ("kind", "body", "coding"),
    [
        (JSON, LONG, ""),
        (JSON, MANY, ""),
        (JSON, gzip.compress(answer(b'{"type":"text","text":"%s"}' % bytes(64 << 20))), "gzip"),
        (EVENTS, event(LONG), ""),
        (EVENTS, event(MANY), ""),
        (EVENTS, b": \n" * (MAX_ANSWER // 2), ""),
        (EVENTS, gzip.compress(event(LONG)), "gzip"),
    ],
    ids=["long", "many", "packed", "long event", "many in an event", "comments", "packed events"],
)
async def test_an_answer_that_is_too_large_fails_the_call_and_takes_no_memory(
    kind: str, body: bytes, coding: str
) -> None:
    async with Hostile(kind, body, coding).serving() as url:
        box = make_toolbox([], {"s": at(url, timeout=60)})
        try:
            (tool,) = await box.resolve(v1.Tool(mcp=v1.McpTool(server="s")))
            tracemalloc.start()
            try:
                outcome = await box.call(tool.implementation, {}, context())
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            # Where events come, the library tells no more than that the answer was not whole.
            told = "was lost; the call may have taken effect" if kind == EVENTS else "The answer is "
            assert told in outcome.error
            assert peak < 3 * MAX_ANSWER + 3 * len(body), "the server that answers is in this process too"
            again = await box.resolve(v1.Tool(mcp=v1.McpTool(server="s")))
            assert [tool] == again, "the server can be used as before"
        finally:
            await box.close()


async def test_what_the_library_cannot_use_is_quoted_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    notice = b'{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":{"secret":1}}}'
    async with Hostile(EVENTS, event(notice) + event(SMALL)).serving() as url:
        box = make_toolbox([], {"s": at(url, timeout=60)})
        try:
            assert not (await box.call(v1.ToolBinding(mcp=v1.McpBinding(server="s", tool="t")), {}, context())).error
        finally:
            await box.close()
    assert [] == caplog.records


@pytest.mark.parametrize(("kind", "body"), [(JSON, SMALL), (EVENTS, event(SMALL)), (EVENTS, b": wait\n\n" * 99_000)])
async def test_an_answer_is_bounded_for_itself_and_not_with_what_came_before_it(kind: str, body: bytes) -> None:
    """Comments and events before it are no part of it."""
    whole = body if SMALL in body else body + event(SMALL)
    async with Hostile(kind, whole).serving() as url:
        box = make_toolbox([], {"s": at(url, timeout=60)})
        try:
            (tool,) = await box.resolve(v1.Tool(mcp=v1.McpTool(server="s")))
            outcome = await box.call(tool.implementation, {}, context())
            assert ["x"] == [part.text for part in outcome.parts]
        finally:
            await box.close()


@pytest.mark.parametrize("how", ["long", "many", "endless"])
async def test_a_line_of_a_program_that_is_too_large_fails_the_call_and_ends_the_program(
    tmp_path: Path, how: str
) -> None:
    """The next call has a new one."""
    pids = tmp_path / "pids"
    args = ("-m", "tests.support.mcp_endless", str(pids))
    box = make_toolbox([], {"s": stdio(args=args, timeout=60)})
    try:
        (tool,) = await box.resolve(v1.Tool(mcp=v1.McpTool(server="s")))
        tracemalloc.start()
        try:
            outcome = await box.call(tool.implementation, {"how": how}, context())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert "was lost; the call may have taken effect" in outcome.error
        assert peak < 4 * MAX_ANSWER
        assert Outcome([v1.Part(text="x")]) == await box.call(tool.implementation, {"how": "short"}, context())
    finally:
        await box.close()
    first, second = map(int, pids.read_text().split())
    for pid in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
