"""MCP servers that deviate from the protocol: their usable data is used, and no call waits for data that never
comes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from mcp import types
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.tools import mcp, naming
from notecase_server.tools.clock import Clock
from notecase_server.tools.contract import Incomplete, Toolbox
from notecase_server.tools.mcp_questions import Questions
from notecase_server.tools.mcp_settings import McpServerSettings
from notecase_server.tools.toolbox import make_toolbox

from tests.support.mcp_process import at, stdio
from tests.tools.calls import context
from tests.tools.test_mcp_answers import ABOUT, EVENTS, JSON, Hostile, _http, _result, answer

T = {"name": "t", "inputSchema": {"type": "object"}}
U = {"name": "u", "inputSchema": {"type": "object"}}

BINDING = v1.ToolBinding(mcp=v1.McpBinding(server="s", tool="t"))


class Lists(Hostile):
    """Lists its tools as `page` has them for a cursor; a call is answered by `body`."""

    def __init__(self, page: Callable[[str | None], Any], body: bytes = b"") -> None:
        super().__init__(JSON, body)
        self._page = page
        self.cursors: list[str | None] = []

    def _answer(self, asked: dict[str, Any]) -> bytes:
        if asked.get("method") != "tools/list":
            return super()._answer(asked)
        self.cursors.append(asked.get("params", {}).get("cursor"))
        return _http(f"Content-Type: {JSON}\r\n", _result(asked, self._page(self.cursors[-1])))

    @asynccontextmanager
    async def box(self) -> AsyncIterator[Toolbox]:
        async with self.serving() as url:
            made = make_toolbox([], {"s": at(url, timeout=60)})
            try:
                yield made
            finally:
                await made.close()


async def listed(box: Toolbox) -> list[str]:
    return [function.name for function in await box.resolve(v1.Tool(mcp=v1.McpTool(server="s")))]


@pytest.mark.parametrize(
    ("page", "names", "asked"),
    [
        (lambda cursor: {"tools": [T], "nextCursor": ""}, ["t"], 2),
        (lambda cursor: {"tools": [T, U] if cursor else [T], "nextCursor": "x"}, ["t", "u"], 2),
        (lambda cursor: {"tools": [U]} if cursor == "" else {"tools": [T], "nextCursor": ""}, ["t", "u"], 2),
        (lambda cursor: {"tools": [T], "nextCursor": f"{cursor}+"}, ["t"], 2),
        (lambda cursor: {"tools": [T, T, U]}, ["t", "u"], 1),
        (lambda cursor: {"tools": [{"a": "a"}, T, {**U, "description": 5}, True]}, ["t"], 1),
        (lambda cursor: {"tools": [{"name": "a"}, {**U, "inputSchema": None, "description": None}]}, ["a", "u"], 1),
        (lambda cursor: {"tools": [{**T, "title": 5, "annotations": {"readOnlyHint": "yes"}}]}, ["t"], 1),
        (lambda cursor: {"tools": None}, [], 1),
        (lambda cursor: {}, [], 1),
        (lambda cursor: {"tools": [U]} if cursor == "2" else {"tools": [T], "nextCursor": 2}, ["t", "u"], 2),
    ],
    ids=[
        *("empty", "same", "empty once", "ignored", "twice", "wrong tools", "no schema", "not used"),
        *("null", "left out", "numbered"),
    ],
)
async def test_a_list_is_what_can_be_used_of_it(
    page: Callable[[str | None], Any], names: list[str], asked: int
) -> None:
    """It ends where it would begin again, has each name once, and a tool that is wrong is left out alone."""
    server = Lists(page)
    async with server.box() as box:
        assert names == await listed(box)
    assert asked == len(server.cursors)


@pytest.mark.parametrize(
    ("limit", "most", "asked"), [("LIST_PAGES", 3, 3), ("LIST_TOOLS", 2, 3), ("LIST_BYTES", 100, 1)]
)
async def test_a_list_without_end_is_none(monkeypatch: pytest.MonkeyPatch, limit: str, most: int, asked: int) -> None:
    monkeypatch.setattr(mcp, limit, most)
    server = Lists(lambda cursor: {"tools": [{**T, "name": f"t{cursor}"}], "nextCursor": f"{cursor}+"})
    async with server.box() as box:
        with pytest.raises(NotecaseError, match="does not list its tools"):
            await listed(box)
    assert asked == len(server.cursors)


async def test_a_run_has_a_bounded_number_of_tools_of_a_server_that_lists_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "MOST", 2)
    async with Lists(lambda cursor: {"tools": [{**T, "name": f"t{n}"} for n in range(3)]}).box() as box:
        with pytest.raises(NotecaseError, match="has 3 tools, of which a run has at most 2"):
            await listed(box)
        found = await box.resolve(v1.Tool(mcp=v1.McpTool(server="s", tools=["t2", "t0"])))
        assert ["t0", "t2"] == [function.name for function in found]


@pytest.mark.parametrize("code", [-32000, -32001, -32700])
async def test_an_error_of_the_server_is_reported_in_its_words_whatever_its_code(code: int) -> None:
    """The library uses the first two itself, for what is lost and what takes too long."""
    body = b'{"jsonrpc":"2.0","id":ASKED,"error":{"code":%d,"message":"There is no such city."}}' % code
    async with Lists(lambda cursor: {"tools": [T]}, body).box() as box:
        outcome = await box.call(BINDING, {}, context())
    assert outcome.error == "The MCP server 's' refused the call: There is no such city."


@pytest.mark.parametrize("code", [-32000, -32001])
async def test_a_handshake_that_is_refused_with_any_code_leads_to_the_next_protocol(code: int) -> None:
    methods: list[str] = []

    class Refusing(Lists):
        def _answer(self, asked: dict[str, Any]) -> bytes:
            methods.append(asked["method"])
            told = b'{"jsonrpc":"2.0","id":%d,"error":{"code":%d,"message":"no"}}' % (asked["id"], code)
            return _http(f"Content-Type: {JSON}\r\n", told)

    async with Refusing(lambda cursor: {}).box() as box:
        with pytest.raises(NotecaseError, match="cannot be reached"):
            await listed(box)
    assert ["initialize", "server/discover"] == methods[:2]


async def test_a_handshake_that_lists_tools_is_one() -> None:
    class Telling(Lists):
        def _answer(self, asked: dict[str, Any]) -> bytes:
            if asked.get("method") != "initialize":
                return super()._answer(asked)
            return _http(f"Content-Type: {JSON}\r\n", _result(asked, ABOUT | {"tools": [T, {"name": "a"}]}))

    async with Telling(lambda cursor: {"tools": [T, U]}).box() as box:
        assert ["t", "u"] == await listed(box)


@pytest.mark.parametrize(
    "about",
    [
        {"serverInfo": {"name": "s"}},
        {"serverInfo": {"name": "s", "version": None, "title": None}},
        {"serverInfo": None},
        {"capabilities": {"tools": True, "logging": None, "prompts": False, "experimental": []}},
        {"capabilities": None},
    ],
    ids=str,
)
async def test_what_a_server_says_of_itself_may_lack_what_is_not_used(about: dict[str, Any]) -> None:
    class Telling(Lists):
        def _answer(self, asked: dict[str, Any]) -> bytes:
            if asked.get("method") != "initialize":
                return super()._answer(asked)
            return _http(f"Content-Type: {JSON}\r\n", _result(asked, ABOUT | about))

    async with Telling(lambda cursor: {"tools": [T]}).box() as box:
        assert ["t"] == await listed(box)


@pytest.mark.parametrize("status", [401, 404, 503])
async def test_an_error_status_is_reported(status: int) -> None:
    """Of 401 and 403, where to look, too."""

    class Refusing(Lists):
        refuses = "tools/call"

        def _answer(self, asked: dict[str, Any]) -> bytes:
            if asked.get("method") in {self.refuses, "server/discover"}:
                return f"HTTP/1.1 {status} Sorry\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nno".encode()
            return super()._answer(asked)

    detail = f": it answered with status {status}" + ("; check the `headers` in its settings" if status == 401 else "")
    server = Refusing(lambda cursor: {"tools": [T]})
    async with server.box() as box:
        assert f"The MCP server 's' refused the call{detail}" == (await box.call(BINDING, {}, context())).error
        server.refuses = "tools/list"
        with pytest.raises(NotecaseError) as refused:
            await listed(box)
        assert f"The MCP server 's' does not list its tools{detail}." == refused.value.message
    server.refuses = "initialize"
    async with server.box() as box:
        with pytest.raises(NotecaseError) as refused:
            await listed(box)
        assert f"The MCP server 's' cannot be reached{detail}." == refused.value.message


async def test_a_redirect_in_the_middle_tells_no_address() -> None:
    class Moved(Lists):
        def _answer(self, asked: dict[str, Any]) -> bytes:
            if asked.get("method") != "tools/call":
                return super()._answer(asked)
            return b"HTTP/1.1 302 Found\r\nLocation: /other?token=secret\r\nContent-Length: 0\r\n\r\n"

    async with Moved(lambda cursor: {"tools": [T]}).box() as box:
        outcome = await box.call(BINDING, {}, context())
    assert outcome.error == "The MCP server 's' redirects to another address, where it is not called."


@pytest.mark.parametrize("data", [b"aGkhaGk", rb"aGkh\naGk=\r\n"])
async def test_base64_with_lines_or_without_its_end_is_read(data: bytes) -> None:
    body = answer(b'{"type":"image","data":"%s","mimeType":"image/png"}' % data)
    async with Lists(lambda cursor: {"tools": [T]}, body).box() as box:
        (part,) = (await box.call(BINDING, {}, context())).parts
    assert b"hi!hi" == part.data.data


async def test_a_media_type_counts_as_text_of_a_result() -> None:
    body = answer(b'{"type":"image","data":"aGkh","mimeType":"image/%s"}' % (b"x" * 600_000))
    async with Lists(lambda cursor: {"tools": [T]}, body).box() as box:
        assert "at most 524288 are taken" in (await box.call(BINDING, {}, context())).error


def program(pids: Path, **settings: Any) -> McpServerSettings:
    args = ("-m", "tests.support.mcp_careless", str(pids))
    return stdio(args=args, **settings)


TEXT = '{"jsonrpc":"2.0","id":ID,"result":{"content":[{"type":"text","text":"%s"}]}}'
REFUSED = "The MCP server 's' refused the call: "


A = {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        ({}, {"type": "object"}),
        ({"properties": A["properties"]}, A),
        ({"type": None, "properties": None}, {"type": "object", "properties": None}),
        ({"type": ["object", "null"], "properties": A["properties"]}, A),
        ({"$ref": "#/$defs/A", "$defs": {"A": A}}, {"$ref": "#/$defs/A", "$defs": {"A": A}, "type": "object"}),
        ({"anyOf": [A]}, {"anyOf": [A], "type": "object"}),
        (True, {"type": "object"}),
        ([], {"type": "object"}),
    ],
)
async def test_a_schema_of_arguments_is_one_of_an_object(given: object, schema: object) -> None:
    """Generators of schemas leave its type out, or refer to a definition: the protocol has the type there."""
    async with Lists(lambda cursor: {"tools": [{"name": "t", "inputSchema": given}]}).box() as box:
        (function,) = await box.resolve(v1.Tool(mcp=v1.McpTool(server="s")))
    assert schema == msgspec.json.decode(function.parameters)


LINES = {
    TEXT % "a\\ud83d": "a\ufffd",
    TEXT % "caf\xe9": "caf\ufffd",
    '{"jsonrpc":"2.0","id":ID,"error":{"code":"E1","message":"No city."}}': f"{REFUSED}No city.",
    '{"jsonrpc":"2.0","id":ID,"error":{"code":1,"message":null}}': f"{REFUSED}It gave no reason.",
    '{"jsonrpc":"2.0","id":ID,"error":"No city."}': f"{REFUSED}No city.",
    '{"jsonrpc":"2.0","id":ID,"result":5}': f"{REFUSED}It gave an answer that is not valid.",
    '{"jsonrpc":"2.0","id":null,"error":{"code":1,"message":"No city."}}': f"{REFUSED}No city.",
    '{"jsonrpc":"2.0","error":{"code":"E1","message":"No city."}}': f"{REFUSED}No city.",
    (TEXT % "a").replace('"jsonrpc":"2.0",', ""): "a",
    (TEXT % "a").replace("ID", "ID.0"): "a",
    f'[{{"jsonrpc":"2.0","method":"notifications/message","params":{{}}}},{TEXT % "a"}]': "a",
    '{"jsonrpc":"2.0","id":ID,"result":{}}': "",
    '{"jsonrpc":"2.0","id":ID,"result":{"isError":true}}': "The tool failed.",
}
OF_PIPES = {
    'Calling "t" ... ' + TEXT % "a": "a",
    "\x1b[32m{t}: " + (TEXT % "a").replace('"jsonrpc":"2.0",', "")[:-1] + ',"jsonrpc":"2.0"} done\x1b[0m': "a",
    '{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":"b"}}' + TEXT % "a": "a",
    'Asked: {"jsonrpc":"2.0","id":ID,"method":"tools/call","params":{"name":"t"}}\n' + TEXT % "a": "a",
    TEXT % 'quoting {\\"jsonrpc\\": 2}': 'quoting {"jsonrpc": 2}',
}
"""There other words may share a line with an answer."""
OF_HTTP = {TEXT.replace("ID", "999") % "a": "a", "No JSON.": f"{REFUSED}It gave an answer that is not valid."}
"""There an answer is to what was asked with it, whatever it says."""


@pytest.mark.parametrize("transport", ["pipes", "http", "events"])
async def test_an_answer_that_is_not_quite_one_is_mended_or_an_error_at_once(tmp_path: Path, transport: str) -> None:
    """And never waited for until its time is over."""

    class Saying(Lists):
        def _answer(self, asked: dict[str, Any]) -> bytes:
            if asked.get("method") == "tools/call":
                line = asked["params"]["arguments"]["line"].replace("ID", str(asked["id"])).encode("latin-1")
                if transport == "events":
                    return _http(f"Content-Type: {EVENTS}\r\n", b"data: %b\n\n" % line)
                return _http(f"Content-Type: {JSON}\r\n", line)
            return super()._answer(asked)

    async with Saying(lambda cursor: {"tools": [T]}).serving() as url:
        over = at(url, timeout=60)
        box = make_toolbox([], {"s": program(tmp_path / "pids", timeout=60) if transport == "pipes" else over})
        try:
            for line, result in (LINES | (OF_PIPES if transport == "pipes" else OF_HTTP)).items():
                outcome = await box.call(BINDING, {"line": line}, context())
                assert result == (outcome.error or "".join(part.text for part in outcome.parts)), line
        finally:
            await box.close()


@pytest.mark.parametrize("kind", ["", "text/plain; charset=utf-8", "Application/JSON-RPC", "application/octet-stream"])
async def test_json_is_read_whatever_its_server_calls_it(kind: str) -> None:
    class Typed(Lists):
        def _answer(self, asked: dict[str, Any]) -> bytes:
            head, _, body = super()._answer(asked).partition(b"\r\n\r\n")
            named = f"Content-Type: {kind}\r\n" if kind else ""
            return head.replace(f"Content-Type: {JSON}\r\n".encode(), named.encode()) + b"\r\n\r\n" + body

    async with Typed(lambda cursor: {"tools": [T]}, answer(b'{"type":"text","text":"x"}')).box() as box:
        assert ["t"] == await listed(box)
        assert ["x"] == [part.text for part in (await box.call(BINDING, {}, context())).parts]


async def test_a_line_of_a_log_in_json_is_no_answer(tmp_path: Path) -> None:
    box = make_toolbox([], {"s": program(tmp_path / "pids", timeout=60)})
    try:
        line = '{"level":30,"msg":"t is called","error":"none"}\n' + TEXT % "a"
        assert ["a"] == [part.text for part in (await box.call(BINDING, {"line": line}, context())).parts]
    finally:
        await box.close()


async def test_a_program_that_hangs_is_replaced_once_it_does_not_list_its_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp, "LIST_SECONDS", 0)
    pids = tmp_path / "pids"
    settings = program(pids, timeout=0.1, connect_timeout=60)
    server = mcp.McpServer("s", settings)
    try:
        assert 1 == len(await server.functions("", ()))
        # A call may have been given up before it was written.
        while "silent" not in pids.read_text():
            assert "did not answer within" in (await server.call("t", {"silent": True}, context())).error
        with monkeypatch.context() as patch:
            patch.setattr(server, "_settings", msgspec.structs.replace(settings, connect_timeout=0.1))
            with pytest.raises(NotecaseError, match="does not list its tools"):
                await server.functions("", ())
        assert 1 == len(await server.functions("", ()))
    finally:
        await server.close()
    assert 2 == sum(map(str.isdigit, pids.read_text().split()))


@pytest.mark.parametrize(
    ("told", "error"),
    [
        (["string", "null"], "it is not known which of them asks"),
        (["object", "null"], "neither text, a number"),
        ([{}], "neither text, a number"),
        ({}, "neither text, a number"),
        (None, "neither text, a number"),
    ],
)
async def test_a_type_of_a_form_s_field_may_be_a_list(told: Any, error: str) -> None:
    form = types.ElicitRequestFormParams(message="?", requested_schema={"properties": {"a": {"type": told}}})
    answered = await Questions("s").answer(None, form)  # type: ignore[arg-type]
    assert isinstance(answered, types.ErrorData)
    assert error in answered.message


GIVEN = {
    b'{"content":[{"type":"text","text":" "}],"structuredContent":{"a":1}}': '{"a": 1}',
    b'{"content":[{"type":"text","text":"x"}],"structuredContent":{"a":1}}': "x",
    b'{"structuredContent":{"a":1}}': '{"a": 1}',
    b'{"content":"x"}': "x",
    b'{"content":[],"structuredContent":[1]}': "[1]",
    b'{"content":[{"type":"text","text":" "}],"structuredContent":[1]}': "[1]",
    b'{"content":[{"type":"text","text":"x","annotations":{"priority":7}}],"isError":null}': "x",
    b'{"content":[{"type":"text","text":"x"},{"type":"chart","points":[1]}]}': "x[chart that cannot be read]",
    b'{"content":[{"type":"text","text":"x"},{"type":"text","text":null}]}': "x[text that cannot be read]",
    b'{"content":[{"type":"text","text":5},{"type":"text","text":{"a":1}}]}': '5{"a": 1}',
    b'{"content":[{"type":"resource_link","uri":"plan://a"}]}': "resource: plan://a",
    b'{"content":[{"type":"resource","resource":{"text":"x"}}]}': "x",
    b'{"content":[{"type":"text","text":"x"},{"type":"image","data":"%","mimeType":"image/png"}]}': (
        "x[1 more that cannot be read]"
    ),
}


@pytest.mark.parametrize(("result", "text"), list(GIVEN.items()))
async def test_what_can_be_read_of_a_result_is_given(result: bytes, text: str) -> None:
    """The tool has taken effect, whatever the rest of it is, and whether or not it fits the schema of its results."""
    listed_so = {**T, "outputSchema": {"type": "object", "required": ["n"], "properties": {"n": {"type": "nonsense"}}}}
    body = b'{"jsonrpc":"2.0","id":ASKED,"result":%s}' % result
    async with Lists(lambda cursor: {"tools": [listed_so]}, body).box() as box:
        assert ["t"] == await listed(box)
        outcome = await box.call(BINDING, {}, context())
    assert text == (outcome.error or "".join(part.text for part in outcome.parts))


@pytest.mark.parametrize("data", ["data:image/png;base64,+/+/", "-_-_"])
async def test_base64_of_an_address_is_read(data: str) -> None:
    body = answer(b'{"type":"image","data":"%s","mimeType":"image/png"}' % data.encode())
    async with Lists(lambda cursor: {"tools": [T]}, body).box() as box:
        (part,) = (await box.call(BINDING, {}, context())).parts
    assert b"\xfb\xff\xbf" == part.data.data


NO_SESSION = '{"jsonrpc":"2.0","id":ASKED,"error":{"code":-32000,"message":"%s"}}'


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ("404 Not Found", ""),
        ("400 Bad Request", NO_SESSION % "Bad Request: No valid session ID provided"),
        ("400 Bad Request", "Invalid or missing session ID"),
        ("401 Unauthorized", "Unauthorized: Session not found"),
        ("200 OK", NO_SESSION % "Session not found"),
    ],
)
async def test_a_session_that_a_server_no_longer_knows_is_opened_again_however_it_says_so(
    status: str, told: str
) -> None:
    """The protocol says 404; the examples of its own libraries, and servers made after them, say 400 or 401."""

    class Forgetful(Lists):
        forgotten = False

        def _answer(self, asked: dict[str, Any]) -> bytes:
            if asked.get("method") == "initialize":
                self.forgotten = False
                return _http(f"Content-Type: {JSON}\r\nMcp-Session-Id: one\r\n", _result(asked, ABOUT))
            if not self.forgotten or "id" not in asked:
                return super()._answer(asked)
            body = told.replace("ASKED", str(asked["id"])).encode()
            kind = JSON if told.startswith("{") else "text/plain"
            head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
            return head.encode() + body

    server = Forgetful(lambda cursor: {"tools": [T]}, answer(b'{"type":"text","text":"x"}'))
    async with server.box() as box:
        assert not (await box.call(BINDING, {}, context())).error
        server.forgotten = True
        assert (await box.call(BINDING, {}, context())).error
        assert "x" == (await box.call(BINDING, {}, context())).parts[0].text


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (f"200 OK\r\nContent-Type: {JSON}", NO_SESSION % "Browser session b1 not found"),
        (f"200 OK\r\nContent-Type: {JSON}", NO_SESSION % "The index is not initialized."),
        (f"400 Bad Request\r\nContent-Type: {JSON}", NO_SESSION % "Invalid session of the shop"),
        ("401 Unauthorized\r\nContent-Type: text/plain", "The session of the shop has expired: session expired"),
        ("409 Conflict\r\nContent-Type: text/plain\r\nContent-Encoding: gzip", "is no gzip"),
    ],
    ids=["200", "200 of another", "400", "401", "409 packed"],
)
async def test_a_session_of_a_tool_s_own_that_is_lost_leaves_the_connection(head: str, told: str) -> None:
    """With it the calls of everybody else would be lost."""
    connected = 0

    class Selling(Lists):
        sells = True

        def _answer(self, asked: dict[str, Any]) -> bytes:
            nonlocal connected
            if asked.get("method") == "initialize":
                connected += 1
                return _http(f"Content-Type: {JSON}\r\nMcp-Session-Id: one\r\n", _result(asked, ABOUT))
            if self.sells or asked.get("method") != "tools/call":
                return super()._answer(asked)
            body = told.replace("ASKED", str(asked["id"])).encode()
            return f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    server = Selling(lambda cursor: {"tools": [T]}, answer(b'{"type":"text","text":"x"}'))
    async with server.box() as box:
        assert not (await box.call(BINDING, {}, context())).error
        server.sells = False
        for _ in range(2):
            assert "refused the call" in (await box.call(BINDING, {}, context())).error
        server.sells = True
        assert not (await box.call(BINDING, {}, context())).error
    assert 1 == connected


async def test_a_result_of_more_blocks_than_are_read_says_so() -> None:
    body = b'{"jsonrpc":"2.0","id":ASKED,"result":{"content":[%s]}}' % b",".join([b"0"] * 10_001)
    async with Lists(lambda cursor: {"tools": [T]}, body).box() as box:
        outcome = await box.call(BINDING, {}, context())
    assert ["[10001 blocks, more than can be read]"] == [part.text for part in outcome.parts]


async def test_a_server_that_has_no_stream_keeps_its_session() -> None:
    """One that knows POST alone answers GET as it answers any address that it does not have."""
    connected = 0

    class Posted(Lists):
        def _answer(self, asked: dict[str, Any]) -> bytes:
            nonlocal connected
            if not asked:
                return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
            if asked.get("method") == "initialize":
                connected += 1
                return _http(f"Content-Type: {JSON}\r\nMcp-Session-Id: one\r\n", _result(asked, ABOUT))
            return super()._answer(asked)

    async with Posted(lambda cursor: {"tools": [T]}, answer(b'{"type":"text","text":"x"}')).box() as box:
        for _ in range(3):
            assert not (await box.call(BINDING, {}, context())).error
    assert 1 == connected


async def test_a_stream_that_ends_at_once_is_not_asked_for_without_pause() -> None:
    asked: list[float] = []
    enough, now = asyncio.Event(), asyncio.get_running_loop().time

    class Ending(Lists):
        def _answer(self, request: dict[str, Any]) -> bytes:
            if not request:
                asked.append(now())
                if len(asked) == 4:
                    enough.set()
                return _http(f"Content-Type: {EVENTS}\r\n", b"retry: 0\n\n")
            if request.get("method") == "initialize":
                return _http(f"Content-Type: {JSON}\r\nMcp-Session-Id: one\r\n", _result(request, ABOUT))
            return super()._answer(request)

    async with Ending(lambda cursor: {"tools": [T]}).box() as box:
        await box.resolve(v1.Tool(mcp=v1.McpTool(server="s")))
        await enough.wait()
    assert asked[3] - asked[0] > 1.5 * mcp.STREAM_SECONDS


async def test_a_tool_that_is_missing_or_has_no_name_leaves_the_others() -> None:
    """The error names what was left out, with the tools that can be used."""
    async with Lists(lambda cursor: {"tools": [T, {**U, "name": "u" * 300}]}).box() as box:
        with pytest.raises(Incomplete, match="longer than 256") as left_out:
            await listed(box)
        assert ["t"] == [function.name for function in left_out.value.functions]
        with pytest.raises(Incomplete, match="has no tool 'gone'") as left_out:
            await box.resolve(v1.Tool(mcp=v1.McpTool(server="s", tools=["t", "gone"])))
        assert ["t"] == [function.name for function in left_out.value.functions]


async def test_what_is_null_in_a_form_is_as_if_it_were_not_there() -> None:
    asked: list[str] = []

    async def pose(question: str, schema: str) -> v1.InputResponse:
        asked.append(schema)
        return v1.InputResponse(decision=v1.InputResponse.DECISION_CANCEL)

    field = {"type": "string", "enum": None, "title": None, "default": None}
    form = types.ElicitRequestFormParams(
        message="?", requested_schema={"type": "object", "properties": {"a": field}, "required": None}
    )
    questions = Questions("s")
    with questions.of(context(pose=pose), Clock(None)):
        await questions.answer(None, form)  # type: ignore[arg-type]
    expected = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"a": {"type": "string", "default": None}},
    }
    assert [expected] == [msgspec.json.decode(schema) for schema in asked]
