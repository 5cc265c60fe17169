"""An MCP server made with the protocol's own library, as a process: what operators connect, and what goes wrong there.

`python -m tests.support.mcp_server stdio` speaks on its pipes. `… http` serves streamable HTTP on the loopback
interface and prints its URL; with `--sessions` it knows only the protocol's earlier versions, in which a server keeps
sessions and forgets them when it ends; with `--sessionless` only the newest.
"""

import argparse
import asyncio
import base64
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import uvicorn
from mcp.server.mcpserver import Context, Elicit, MCPServer, Resolve
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import (
    UNSUPPORTED_PROTOCOL_VERSION,
    AudioContent,
    BlobResourceContents,
    CallToolResult,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
    Tool,
)
from pydantic import BaseModel
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class Counting(MCPServer):
    """Counts the requests for its tools."""

    listings = 0

    async def list_tools(self) -> list[Tool]:
        self.listings += 1
        return await super().list_tools()


server = Counting("tests", log_level="CRITICAL")

pipes: list[int] = []
"""Where messages go: the library puts standard output elsewhere, so that nothing else is written to it by mistake."""

PIXEL = b"\x89PNG\r\n\x1a\n"


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """A tool whose result is its content alone."""
    return server.tool(structured_output=False)(function)


@plain
def echo(text: str) -> str:
    """Says it again."""
    return text


@plain
def listings() -> str:
    """How often the tools of this server were listed."""
    return str(server.listings)


@plain
def environment() -> str:
    return json.dumps(dict(os.environ))


@plain
def about(context: Context) -> str:
    """The request's headers and what came with the call."""
    meta: Any = context.request_context.meta or {}
    return json.dumps({"headers": dict(context.headers or {}), "meta": dict(meta)})


@plain
async def wait(witness: str) -> str:
    """Tells a unix socket that it has started, and when it is cancelled; it ends in no other way."""
    _, writer = await asyncio.open_unix_connection(witness)
    try:
        writer.write(f"started {os.getpid()}\n".encode())
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        writer.write(b"cancelled\n")
        raise
    finally:
        writer.close()
    return ""


@plain
def flood(size: int) -> str:
    return "x" * size


@plain
def fail(size: int = 1) -> str:
    raise ToolError("no such page " * size)


@plain
def crash() -> str:
    """Ends the process in the middle of the call."""
    os._exit(1)


@plain
def babble() -> str:
    """Writes other text than messages to standard output, and to standard error."""
    for pipe in pipes:
        os.write(pipe, b"Traceback: this is no JSON\n")
    sys.stderr.write("to standard error\n")
    sys.stderr.flush()
    return "said"


@plain
def content() -> Sequence[Any]:
    encoded = base64.b64encode(PIXEL).decode()
    return [
        TextContent(text="a text"),
        ImageContent(data=encoded, mime_type="image/png"),
        AudioContent(data=encoded, mime_type="audio/wav"),
        EmbeddedResource(resource=TextResourceContents(uri="memo://a", text="a memo")),
        EmbeddedResource(resource=BlobResourceContents(uri="memo://b/plan.pdf", blob=encoded)),
        ResourceLink(name="plan", uri="https://example.org/plan.png", mime_type="image/png"),
        ResourceLink(name="notes", uri="memo://notes", description="All of them."),
    ]


@plain
def structured() -> CallToolResult:
    return CallToolResult(content=[], structured_content={"found": 3})


@plain
def photograph(size: int) -> CallToolResult:
    return CallToolResult(content=[ImageContent(data=base64.b64encode(b"x" * size).decode(), mime_type="image/jpeg")])


@plain
def broken_image() -> CallToolResult:
    return CallToolResult(content=[ImageContent(data="!!", mime_type="image/png")])


class Coat(BaseModel):
    colour: Literal["red", "blue"]


class Oil(BaseModel):
    colour: str


@plain
async def paint(context: Context, what: str = "fence") -> str:
    """Asks its user in which colour, and tells what came of it."""
    got = await context.elicit(f"Which colour for the {what}?", schema=Coat)
    return f"accept {got.data.colour}" if got.action == "accept" else got.action


async def tone() -> Elicit[Oil]:
    return Elicit("Which tone?", Oil)


@plain
async def varnish(oil: Annotated[Oil, Resolve(tone)]) -> str:
    """Asks as every version of the protocol can."""
    return f"{oil.colour} varnish"


@plain
async def pay(context: Context) -> str:
    """Sends its user somewhere."""
    return (await context.elicit_url("Please pay.", "https://example.org/pay", "payment-1")).action


@plain
async def deliver(context: Context) -> str:
    """Asks for more than a form can hold."""
    form = {"type": "object", "properties": {"address": {"type": "object"}}}
    answer: str = (await context.session.elicit_form("Where to?", form, context.request_id)).action
    return answer


@plain
async def prime_and_paint(context: Context) -> str:
    """Asks two things at once."""
    asked = (context.elicit(f"Which colour for the {what}?", schema=Coat) for what in ("primer", "top"))
    return " ".join(got.action for got in await asyncio.gather(*asked))


@plain
async def doubt(context: Context, witness: str) -> str:
    """Asks, and cancels its question when a unix socket is closed."""
    reader, writer = await asyncio.open_unix_connection(witness)
    asking = asyncio.create_task(context.elicit("Which colour?", schema=Coat))
    await reader.read()
    asking.cancel()
    await asyncio.wait([asking])
    writer.close()
    return "never mind"


@plain
async def ask_and_tell(context: Context, witness: str) -> str:
    """Asks, and tells a unix socket when it is cancelled."""
    _, writer = await asyncio.open_unix_connection(witness)
    try:
        return (await context.elicit("Which colour?", schema=Coat)).action
    except asyncio.CancelledError:
        writer.write(b"cancelled\n")
        raise
    finally:
        writer.close()


@plain
async def grow(name: str, context: Context) -> str:
    """Gives the server one more tool, and says so."""
    server.add_tool(echo, name=name, structured_output=False)
    await context.notify_tools_changed()
    await context.request_context.session.send_tool_list_changed()
    return "grown"


class OnlySessions:
    """Refuses the protocol's newest version as the servers do that were written before it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        versions = [value for name, value in scope.get("headers", []) if name == b"mcp-protocol-version"]
        if any(version > b"2025-12-31" for version in versions):
            await PlainTextResponse("unsupported protocol version", 400)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class NoSessions:
    """Knows the protocol's newest version only."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        versions = [value for name, value in scope.get("headers", []) if name == b"mcp-protocol-version"]
        if scope["type"] == "http" and not any(version > b"2025-12-31" for version in versions):
            supported = {"supported": ["2026-07-28"]}
            told = {"code": UNSUPPORTED_PROTOCOL_VERSION, "message": "no handshake", "data": supported}
            await JSONResponse({"jsonrpc": "2.0", "id": 1, "error": told}, 400)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("transport", choices=["stdio", "http"])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--sessions", action="store_true")
    parser.add_argument("--sessionless", action="store_true")
    options = parser.parse_args()
    if options.transport == "stdio":
        pipes.append(os.dup(1))
        server.run("stdio")
        return
    listening = socket.create_server(("127.0.0.1", options.port))
    sys.stdout.write(f"http://127.0.0.1:{listening.getsockname()[1]}/mcp\n")
    sys.stdout.flush()
    app: Any = server.streamable_http_app()
    if options.sessions or options.sessionless:
        app = OnlySessions(app) if options.sessions else NoSessions(app)
    config = uvicorn.Config(app, log_level="critical")
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
