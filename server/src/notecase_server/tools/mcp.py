"""Calls the tools of MCP servers, over one connection to each, which is opened when it is first needed and again when
it was lost.

A call that is cut by the loss of a connection is an error for the model, because its effect is not known; it is never
repeated here. The next call opens a new connection.
"""

import asyncio
import base64
import json
import logging
import math
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Self, TextIO, cast

import anyio
import httpx2
import structlog
from mcp import Client, MCPError, types
from mcp.client import Transport
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import Subscription, SubscriptionLost
from mcp.types import methods
from mcp.types.version import MODERN_PROTOCOL_VERSIONS
from notecase import v1

from notecase_server import __version__, errors
from notecase_server.supervisor import Tasks
from notecase_server.tools import naming
from notecase_server.tools.clock import Clock
from notecase_server.tools.contract import CallContext, Function, Incomplete, Outcome
from notecase_server.tools.mcp_answers import (
    LOST_SESSION,
    MAX_ANSWER,
    Bounded,
    Mended,
    MendedEvents,
    mend_about,
    mend_content,
    reports_lost_session,
)
from notecase_server.tools.mcp_pipes import program
from notecase_server.tools.mcp_questions import Questions
from notecase_server.tools.mcp_settings import McpServerSettings, program_problem
from notecase_server.tools.outcome import failed, succeeded

log = structlog.get_logger()

# Its records tell of what could not be parsed by quoting it, and no message's content belongs into a log.
for _name in ("mcp", "client"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)

LIST_SECONDS = 60.0
"""How long a list of tools is used. A server may announce changes, but not every one does, and a notice can be lost
with its stream. A minute is soon enough for a new tool, and calling a removed one is an ordinary error."""

BROKEN = (TimeoutError, anyio.BrokenResourceError, anyio.ClosedResourceError)
"""What the library's streams raise when the transport goes away beneath them."""

INVALID = (RuntimeError, ValueError)
"""What the library raises for an answer that is not as the protocol or the tool's own schema has it."""

CLOSE_SECONDS = 10.0
"""How long a server may take to end when its connection is closed; its process is killed well before that."""

STREAM_SECONDS = 0.1
"""Between two requests for a stream. A server may end each at once, and ask to be asked again after no time."""

LIST_PAGES = 100
"""More pages than any list has: one that has more fails."""

LIST_TOOLS = 10_000
LIST_BYTES = MAX_ANSWER
"""Of a list in several pages, together: what one page could have."""

LOST = ("Connection closed", "SSE stream failed", "SSE stream ended")
"""How the library's own messages begin where an answer is lost. Servers use its code for errors of theirs, too."""

REFUSING = "Server returned an error response", "Not Found"
"""The library's messages for an error status, which do not say which."""

UNREAD = "Failed to parse SSE message", "Failed to parse JSON response"
"""How those begin that quote an answer, in several lines."""

ANSWERED = "it answered with status"

REDIRECTED = "Redirect to "
"""How the library's message begins that quotes an address, which may hold a token."""

SESSION = "mcp-session-id"

UNTYPED = "text/plain", "application/octet-stream"
"""What servers that were written by hand call their JSON, if anything."""

UNUSED = frozenset({"outputSchema", "annotations", "title", "icons"})
"""Members of a tool that are not used."""

EMPTY = frozenset({"isError", "_meta", "nextCursor"})
"""Members of a result that holds nothing."""

GONE = frozenset({httpx2.codes.NOT_FOUND, httpx2.codes.GONE})
"""The answers of a server that does not know the session of a request."""

REFUSED = frozenset({httpx2.codes.BAD_REQUEST, httpx2.codes.UNAUTHORIZED, httpx2.codes.CONFLICT})
"""Those of servers that say so in words."""


class McpServer:
    """One configured server. All of it belongs to one event loop."""

    def __init__(self, name: str, settings: McpServerSettings) -> None:
        self.changes = 0
        """How often it has said that its tools have changed."""
        self._name = name
        self._settings = settings
        self._current: _Connection | None = None
        self._owners = Tasks(f"mcp {name}")
        self._closed = False

    async def functions(self, prefix: str, only: Sequence[str]) -> list[Function]:
        """Its tools, or those named in `only`, in the server's order, under names that a model's API takes. Raises
        NotecaseError TOOL_ERROR when the server cannot be reached or has too many, and Incomplete with the others when
        it does not have one of them, or has one whose name cannot be recorded."""
        tools, wanted = await self._tools(), set(only)
        chosen = [tool for tool in tools if not wanted or tool.name in wanted]
        if len(chosen) > naming.MOST:
            problem = f"has {len(chosen)} tools, of which a run has at most {naming.MOST}"
            raise errors.tool_error(f"The MCP server {self._name!r} {problem}; list those to be used in `mcp.tools`.")
        usable = [tool for tool in chosen if len(tool.name) <= naming.OWN_LENGTH]
        functions = self._offered(prefix, usable)
        if missing := wanted - {tool.name for tool in tools}:
            lacking = ", ".join(map(repr, sorted(missing)))
            raise Incomplete(f"The MCP server {self._name!r} has no tool {lacking}.", functions)
        if len(usable) < len(chosen):
            problem = (
                f"has a tool whose name is longer than {naming.OWN_LENGTH}; list the tools to be used in `mcp.tools`"
            )
            raise Incomplete(f"The MCP server {self._name!r} {problem}.", functions)
        return functions

    def _offered(self, prefix: str, chosen: Sequence[types.Tool]) -> list[Function]:
        return [
            Function(
                name,
                tool.description or "",
                json.dumps(tool.input_schema, ensure_ascii=False),
                v1.ToolBinding(mcp=v1.McpBinding(server=self._name, tool=tool.name)),
            )
            for tool, name in zip(chosen, naming.offered(prefix, [tool.name for tool in chosen]), strict=True)
        ]

    async def close(self) -> None:
        """Ends the connection, and with it the server's process. Calls under way fail. Idempotent."""
        self._closed = True
        if self._current is not None:
            self._current.end()
        await self._owners.close(CLOSE_SECONDS)

    async def _tools(self) -> Sequence[types.Tool]:
        """Asked for once more where the connection proves to be lost: unlike a call, that does no harm."""
        connection = await self._connected()
        try:
            return await self._listed_by(connection)
        except errors.NotecaseError as error:
            if not connection.over or isinstance(error.__cause__, TimeoutError):
                raise
        return await self._listed_by(await self._connected())

    async def _listed_by(self, connection: "_Connection") -> Sequence[types.Tool]:
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                return await connection.tools()
        except (MCPError, *BROKEN, *INVALID) as error:
            log.warning("mcp_list_failed", server=self._name, error=type(error).__name__)
            if isinstance(error, TimeoutError) and connection.questions.idle:
                connection.end()  # a program that hangs is replaced
            problem = error.message if isinstance(error, MCPError) and error.message.startswith(ANSWERED) else ""
            problem = f"does not list its tools{problem and ': '}{problem}"
            raise errors.tool_error(f"The MCP server {self._name!r} {problem}.") from error

    async def call(self, tool: str, arguments: Mapping[str, Any], context: CallContext) -> Outcome:
        """Calls a tool by the server's own name of it, as Toolbox.call promises."""
        # By these a server that knows them makes an outside effect once, whatever becomes of the connection.
        meta: dict[str, Any] = {
            "notecase/idempotency_key": context.idempotency_key,
            "notecase/attempt": context.attempt,
        }
        clock = Clock(self._settings.timeout)
        try:
            json.dumps(arguments, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            # The library would find it only as it writes, and drop the connection with all its calls.
            return failed("The arguments hold half of a surrogate pair, which is no text.")
        try:
            connection = await self._connected()
        except errors.NotecaseError as error:
            return failed(error.message)
        try:
            async with clock:
                with connection.questions.of(context, clock) as call:
                    meta["traceparent"] = call.trace
                    result = await connection.client.call_tool(
                        tool, dict(arguments), meta=cast("types.RequestParamsMeta", meta)
                    )
        except MCPError as error:
            outcome = failed(self._lost if _is_lost(error, connection) else self._refused(error.message))
            if connection.may_have_lost_session(error):
                await self._ask_again(connection)
            return outcome
        except BROKEN:
            silent = f"The MCP server {self._name!r} did not answer within {self._settings.timeout:g} seconds."
            return failed(silent if clock.expired else self._lost)
        except INVALID as error:
            log.warning("mcp_answer_invalid", server=self._name, tool=tool, error=type(error).__name__)
            return failed(f"The MCP server {self._name!r} gave an answer that is not valid.")
        try:
            return _outcome(result)
        except ValueError:
            return failed(f"The MCP server {self._name!r} gave content that cannot be read.")

    async def _ask_again(self, connection: "_Connection") -> None:
        """Requests the list of tools, which ends the connection if its session is lost. If the tool's error meant
        something else, the connection stays, with all other calls."""
        connection.forget_tools()
        with suppress(errors.NotecaseError):
            await self._listed_by(connection)

    @property
    def _lost(self) -> str:
        return f"The answer of the MCP server {self._name!r} was lost; the call may have taken effect, or not."

    def _refused(self, message: str) -> str:
        if message.startswith(REDIRECTED):
            return f"The MCP server {self._name!r} redirects to another address, where it is not called."
        return f"The MCP server {self._name!r} refused the call: {message}"

    def _changed(self) -> None:
        self.changes += 1

    async def _connected(self) -> "_Connection":
        """The connection, opened when there is none. Those who come while it is opened wait for the same one."""
        if self._closed:
            raise errors.tool_error("The server is stopping.")
        connection = self._current
        if connection is None or connection.over:
            connection = self._current = _Connection(self._name, self._settings, self._changed)
            self._owners.start(connection.own(), "connection", fresh=True)
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                await connection.settled.wait()
        except TimeoutError:
            connection.end()
        if connection.over:
            problem = f"cannot be reached{connection.refusal and ': '}{connection.refusal}"
            raise errors.tool_error(f"The MCP server {self._name!r} {problem}.")
        return connection


class _Connection:
    """One connection and its end. The library's scopes are entered and left by one task, `own`; other code asks that
    task to end."""

    client: Client
    """Once settled, if not over."""

    def __init__(self, name: str, settings: McpServerSettings, changed: Callable[[], None]) -> None:
        self.settled = asyncio.Event()
        """Open, or over."""
        self.questions = Questions(name)
        self._name = name
        self._settings = settings
        self._changed = changed
        self._scope = anyio.CancelScope()
        self._done = False
        self._output_ended = False
        self._exit_code: int | None = None
        """Of a program that ended by itself."""
        self._refusals: dict[int | str | None, str] = {}
        """What error statuses say, by the id of what was asked, until the library tells of it."""
        self.refusal = ""
        """What the last of them says."""
        self._listing = asyncio.Lock()
        self._listed: Sequence[types.Tool] | None = None
        self._changes = 0
        self._fresh_until = 0.0
        self._has_session = False
        self._doubted = False
        """A call was refused with a status and in words that may mean the session."""
        self._listens = False
        """The server has had a stream for GET."""
        self._stream_due = 0.0
        """When the next answer to a GET is taken."""

    @property
    def over(self) -> bool:
        """No call is to be made on it any more."""
        return self._done or self._scope.cancel_called

    def end(self) -> None:
        self._scope.cancel()
        self.settled.set()

    async def own(self) -> None:
        """Opens the connection and holds it to its end. Raises nothing: waiting calls check `over`."""
        opened, wrong = False, set[str]()
        try:
            with self._scope:
                self._scope.deadline = anyio.current_time() + self._settings.connect_timeout
                async with AsyncExitStack() as stack:
                    self.client = await self._opened(stack)
                    changes = await self._subscribe(stack)
                    self._scope.deadline = math.inf
                    opened = True
                    self.settled.set()
                    log.info("mcp_connected", server=self._name, protocol=self.client.protocol_version)
                    await self._hold(changes)
        except Exception as error:  # noqa: BLE001 - whatever a transport raises, the connection is over
            wrong = {type(leaf).__name__ for leaf in _leaves(error)}
        finally:
            self._done = True
            self.settled.set()
        if opened:
            log.info("mcp_disconnected", server=self._name, errors=sorted(wrong))
            return
        known: dict[str, object] = {"refusal": self.refusal} if self.refusal else {}
        if self._output_ended:
            wrong.add("OutputEnded")
            known |= {} if self._exit_code is None else {"exit_code": self._exit_code}
        elif problem := program_problem(self._settings):
            known["problem"] = problem
        log.warning("mcp_unreachable", server=self._name, errors=sorted(wrong or {"TimeoutError"}), **known)

    async def _opened(self, stack: AsyncExitStack) -> Client:
        """Speaks the versions of the protocol in which a running tool can ask its user, which begin with a handshake,
        unless the settings say otherwise or the server refuses them."""
        if self._settings.protocol is None:
            try:
                return await stack.enter_async_context(self._made("legacy"))
            except (MCPError, ExceptionGroup) as error:
                refusals = [leaf for leaf in _leaves(error) if isinstance(leaf, MCPError)]
                if not refusals or any(_is_lost(refusal, self) for refusal in refusals):
                    raise
                codes = sorted({refusal.code for refusal in refusals})
                log.info("mcp_handshake_refused", server=self._name, codes=codes)
        return await stack.enter_async_context(self._made("auto"))

    def _made(self, mode: str) -> Client:
        return Client(
            cast("Transport", self._streams()),
            message_handler=self._heard,
            elicitation_callback=self.questions.answer,
            client_info=types.Implementation(name="notecase", version=__version__),
            mode=mode,
            cache=None,
        )

    async def tools(self) -> Sequence[types.Tool]:
        """The server's tools, asked for when they are not known or not fresh. A list ends where it would begin again:
        with a cursor that came before, or a page without a new tool. Raises ValueError for one that is too long."""
        now = asyncio.get_running_loop().time
        async with self._listing:
            if self._listed is not None and now() < self._fresh_until:
                return self._listed
            changes, found = self._changes, dict[str, types.Tool]()
            cursor: str | None = None
            cursors, size = set[str](), 0
            while True:
                page = await self._page(cursor)
                new = {tool.name: tool for tool in reversed(page.tools) if tool.name not in found}
                found |= dict(reversed(new.items()))
                cursor = page.next_cursor
                if cursor is None or cursor in cursors or (page.tools and not new):
                    break
                cursors.add(cursor)
                size += len(page.model_dump_json())
                if len(cursors) >= LIST_PAGES or len(found) > LIST_TOOLS or size > LIST_BYTES:
                    raise ValueError("a list of tools that is too long")
            listed = [*found.values()]
            if changes == self._changes:
                self._listed, self._fresh_until = listed, now() + LIST_SECONDS
            return listed

    async def _page(self, cursor: str | None) -> types.ListToolsResult:
        try:
            return await self.client.list_tools(cursor=cursor)
        except MCPError as error:
            if self._has_session and reports_lost_session(error.error):
                self._session_gone()
            raise

    def forget_tools(self) -> None:
        """Lets the next caller of `tools` ask the server."""
        self._changes += 1
        self._listed = None

    def may_have_lost_session(self, error: MCPError) -> bool:
        """Returns whether the error of a call can mean that the server does not know the session. It can also mean a
        session or a client within the tool, which the connection does not know."""
        doubted, self._doubted = self._doubted, False
        return not self.over and self._has_session and (doubted or reports_lost_session(error.error))

    async def _heard(self, message: object) -> None:
        if isinstance(message, types.ToolListChangedNotification):
            self.forget_tools()
            self._changed()

    async def _subscribe(self, stack: AsyncExitStack) -> Subscription | None:
        """Subscribes to changes if the protocol requires that: the notices come to `_heard`."""
        capability = self.client.server_capabilities.tools
        if self.client.protocol_version not in MODERN_PROTOCOL_VERSIONS or not (capability and capability.list_changed):
            return None
        try:
            return await stack.enter_async_context(self.client.listen(tools_list_changed=True))
        except (MCPError, SubscriptionLost) as error:
            log.info("mcp_changes_not_subscribed", server=self._name, error=type(error).__name__)
            return None

    async def _hold(self, changes: Subscription | None) -> None:
        """Waits for the end. The stream of changes is read so that it does not fill up; without it a list is used for a
        minute."""
        try:
            if changes is not None:
                with suppress(SubscriptionLost):
                    async for _ in changes:
                        pass
            await anyio.sleep_forever()
        finally:
            # Before the transport is closed, which takes time: no call may begin meanwhile.
            self._done = True

    @asynccontextmanager
    async def _streams(self) -> AsyncIterator[Any]:
        settings, self._exit_code = self._settings, None
        async with AsyncExitStack() as stack:
            if settings.url:
                http = httpx2.AsyncClient(
                    headers={**settings.headers, "Accept-Encoding": "identity"},
                    # A call's own time-out ends the wait for its answer.
                    timeout=httpx2.Timeout(settings.connect_timeout, read=None),
                    event_hooks={"response": [self._answered]},
                )
                await stack.enter_async_context(http)
                opened = streamable_http_client(settings.url, http_client=http, max_sse_event_size=MAX_ANSWER)
            else:
                opened = program(self._name, settings, stack.enter_context(_errors_of(settings)), self._exited)
            read, write = await stack.enter_async_context(opened)
            yield _Watched(read, self._ended, self._mend), write

    def _exited(self, code: int) -> None:
        self._exit_code = code

    def _ended(self) -> None:
        self._output_ended = True
        self.end()

    def _mend(self, said: object) -> None:
        """Mends what the library would refuse as a whole: what the server says of itself in the handshake and, behind
        that, a list of tools and what a call gave."""
        message = getattr(said, "message", None)
        if isinstance(message, types.JSONRPCError):
            refusal = self._refusals.pop(message.id, "")
            if refusal and message.error.message in REFUSING:
                message.error.message = refusal
            elif message.error.message.startswith(UNREAD) and "\n" in message.error.message:
                message.error.message = "It gave an answer that is not valid."
        if not isinstance(message, types.JSONRPCResponse) or self.over:
            return
        result = message.result
        if not self.settled.is_set():
            if "protocolVersion" in result:
                mend_about(result)
            return
        if result.keys() <= EMPTY:  # of a call or of a list: servers in Go leave out what is empty in them
            result |= {"content": [], "tools": []}
        elif "content" in result or "structuredContent" in result:
            mend_content(result)
        elif "tools" in result:
            self._mend_tools(result)

    def _mend_tools(self, result: dict[str, Any]) -> None:
        """Takes out of a list of tools those that are not as the protocol has them, and of each what is null or not
        used here, such as the schema of what it gives: a result that does not fit it is still what the call came to.
        The schema of its arguments is one of an object, whatever else the server calls it; one without takes any."""
        tools = result["tools"] = result["tools"] or []
        if isinstance(cursor := result.get("nextCursor"), int):
            result["nextCursor"] = str(cursor)
        if not isinstance(tools, list):
            return
        for tool in tools:
            if isinstance(tool, dict):
                for name in [name for name in tool if name in UNUSED or tool[name] is None]:
                    del tool[name]
                schema = tool.get("inputSchema")
                tool["inputSchema"] = {**(schema if isinstance(schema, dict) else {}), "type": "object"}
        if self._is_list(result):
            return
        result["tools"] = [tool for tool in tools if self._is_list(result | {"tools": [tool]})]
        log.warning("mcp_tools_invalid", server=self._name, tools=len(tools) - len(result["tools"]))

    def _is_list(self, result: dict[str, Any]) -> bool:
        try:
            with suppress(KeyError):  # of a version that the library checks no further
                methods.validate_server_result("tools/list", self.client.protocol_version, result)
            types.ListToolsResult.model_validate(result, by_name=False)
        except ValueError:
            return False
        return True

    async def _answered(self, response: httpx2.Response) -> None:
        """Bounds what is read of an answer. 404 to a request that names its session says that the server has forgotten
        the session; some servers use another status with words, which may also be about something else in a tool. A
        server that never had a stream for GET answers 404 to it for that reason, which says nothing about the
        session."""
        if response.request.method == "GET":
            due = max(self._stream_due, now := asyncio.get_running_loop().time())
            self._stream_due = due + STREAM_SECONDS
            await asyncio.sleep(due - now)
        kind = response.headers.get("content-type", "").lower()
        body = response.stream = Bounded(response, events=kind.startswith("text/event-stream"))
        asked = _asked(response.request)
        if asked is not None and response.is_error:
            self.refusal = self._refusals[asked] = _refusal(response.status_code)
        elif asked is not None and (kind.startswith(UNTYPED) or not kind or "json" in kind):
            response.headers["content-type"] = "application/json"
            response.stream = Mended(body, asked)
        elif asked is not None and kind.startswith("text/event-stream"):
            response.stream = MendedEvents(body, asked)
        if SESSION not in response.request.headers:
            return
        self._has_session = True
        self._listens = self._listens or (response.request.method == "GET" and response.is_success)
        posted = response.request.method == "POST"
        if response.status_code in GONE and (posted or self._listens):
            self._session_gone()
        elif response.status_code in REFUSED and posted:
            with suppress(httpx2.HTTPError, httpx2.StreamError, TimeoutError):
                async with asyncio.timeout(self._settings.connect_timeout):
                    told = (await response.aread()).decode(errors="replace")
                if LOST_SESSION.search(told):
                    self._refused(response.request)

    def _refused(self, request: httpx2.Request) -> None:
        """The server answered a request with words that may mean its session."""
        if json.loads(request.content).get("method") == "tools/call":
            self._doubted = True
        else:
            self._session_gone()

    def _session_gone(self) -> None:
        log.info("mcp_session_gone", server=self._name)
        self.end()


class _Watched:
    """A stream of the server's output that reports its end: nothing else shows that an idle process has died.
    `mend` is called with each message before the library has it."""

    def __init__(self, stream: Any, ended: Callable[[], None], mend: Callable[[object], None]) -> None:
        self._stream = stream
        self._ended = ended
        self._mend = mend

    @property
    def last_context(self) -> Any:
        return getattr(self._stream, "last_context", None)

    async def receive(self) -> Any:
        return await self._stream.receive()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            said = await self._stream.__anext__()
            self._mend(said)
            return said
        except StopAsyncIteration:
            self._ended()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _asked(request: httpx2.Request) -> int | str | None:
    """The id of what the server is asked, if it is asked something."""
    asked = json.loads(request.content or b"{}") if request.method == "POST" else {}
    asked_id: int | str | None = asked.get("id") if "method" in asked else None
    return asked_id


def _refusal(status: int) -> str:
    """What an error status says of a server."""
    wrong = "; check the `headers` in its settings" if status in {401, 403} else ""
    return f"{ANSWERED} {status}{wrong}"


def _errors_of(settings: McpServerSettings) -> TextIO:
    return open(settings.stderr or os.devnull, "a", encoding="utf-8")


def _is_lost(error: MCPError, connection: _Connection) -> bool:
    """Whether the library reports that the answer was lost, and not the server another error."""
    return error.code == types.CONNECTION_CLOSED and (connection.over or error.message.startswith(LOST))


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for held in error.exceptions for leaf in _leaves(held)]
    return [error]


def _outcome(result: types.CallToolResult) -> Outcome:
    """Of structured content where there is no other: most servers give the same as text. Raises ValueError when none of
    the content can be read."""
    parts = [part for block in result.content if (part := _readable(block)) is not None]
    if result.content and not parts:
        raise ValueError("content that is not as it says")
    unread = len(result.content) - len(parts)
    if all(part.HasField("text") and not part.text.strip() for part in parts):
        structured = result.structured_content
        parts = parts if structured is None else [v1.Part(text=json.dumps(structured, ensure_ascii=False))]
    parts += [v1.Part(text=f"[{unread} more that cannot be read]")] if unread else []
    parts = parts or [v1.Part(text="")]
    if result.is_error:
        return failed("\n".join(part.text for part in parts if part.text))
    return succeeded(parts)


def _readable(block: types.ContentBlock) -> v1.Part | None:
    try:
        return _part(block)
    except ValueError:
        return None


def _part(block: types.ContentBlock) -> v1.Part:
    match block:
        case types.TextContent():
            return v1.Part(text=block.text)
        case types.ImageContent() | types.AudioContent():
            return _data(block.data, block.mime_type)
        case types.EmbeddedResource(resource=types.TextResourceContents() as held):
            return v1.Part(text=held.text)
        case types.EmbeddedResource(resource=types.BlobResourceContents() as held):
            return _data(held.blob, held.mime_type or "application/octet-stream", held.uri.rpartition("/")[2])
        case types.ResourceLink():
            return _link(block)
    raise ValueError("content of an unknown kind")


def _data(text: str, media_type: str, filename: str = "") -> v1.Part:
    text = "".join(text.split())
    if text.startswith("data:"):
        text = text.partition(",")[2]
    text = text.replace("-", "+").replace("_", "/")
    data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    return v1.Part(data=v1.InlineData(data=data, media_type=media_type, filename=filename))


def _link(link: types.ResourceLink) -> v1.Part:
    """A file where a model's provider can fetch it, which is images on the web; otherwise words that name it."""
    media_type = link.mime_type or ""
    if link.uri.startswith(("https://", "http://")) and media_type.startswith("image/"):
        return v1.Part(file=v1.FileUri(uri=link.uri, media_type=media_type, filename=link.name))
    told = [f"{link.title or link.name}: {link.uri}", link.description or ""]
    return v1.Part(text="\n".join(filter(None, told)))
