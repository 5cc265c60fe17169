"""All tools of one server: its functions and its MCP servers, behind one contract."""

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from notecase import v1

from notecase_server import errors
from notecase_server.tools.contract import ASK_USER, CallContext, Function, Outcome, Toolbox, ToolSettingsError
from notecase_server.tools.mcp_settings import McpServerSettings

if TYPE_CHECKING:
    from notecase_server.tools.functions import PythonTool
    from notecase_server.tools.mcp import McpServer

ENTRY_POINTS = "notecase.tools"
"""The group by which an installed package brings tools."""

ASK_USER_DESCRIPTION = "Asks the user a question and waits for the answer. For what only a person can know or decide."

ASK_USER_PARAMETERS = json.dumps(
    {
        "type": "object",
        "properties": {"question": {"type": "string", "description": "The question, as the user is to read it."}},
        "required": ["question"],
        "additionalProperties": False,
    }
)


def make_toolbox(modules: Sequence[str], mcp: Mapping[str, McpServerSettings]) -> Toolbox:
    """The functions of these modules and of every installed entry point of ENTRY_POINTS, and these MCP servers by name.
    Connections are made when they are first needed. Raises ToolSettingsError."""
    functions: dict[str, PythonTool] = {}
    servers: dict[str, McpServer] = {}
    entries = entry_points(group=ENTRY_POINTS)
    # What reads the functions' types, and MCP's library, take long to import; a server without tools starts without.
    if modules or entries:
        from notecase_server.tools.functions import load  # noqa: PLC0415

        functions = load(modules, entries)
    if mcp:
        from notecase_server.tools.mcp import McpServer as Server  # noqa: PLC0415

        servers = {name: Server(name, settings) for name, settings in mcp.items()}
    if ASK_USER in functions:
        raise ToolSettingsError(f"The name {ASK_USER!r} is taken: every server has that function.")
    return _Tools(functions, servers)


class _Tools:
    """As Toolbox promises."""

    def __init__(self, functions: Mapping[str, "PythonTool"], servers: Mapping[str, "McpServer"]) -> None:
        self._functions = functions
        self._servers = servers

    @property
    def functions(self) -> Sequence[str]:
        return sorted([ASK_USER, *self._functions])

    @property
    def mcp_servers(self) -> Sequence[str]:
        return sorted(self._servers)

    def changes(self, servers: Iterable[str]) -> int:
        return sum(self._servers[name].changes for name in servers if name in self._servers)

    async def resolve(self, tool: v1.Tool) -> Sequence[Function]:
        match tool.WhichOneof("implementation"):
            case "server":
                return [self._function(tool)]
            case "mcp":
                return await self._server(tool.mcp.server).functions(tool.name, tool.mcp.tools)
            case other:
                raise ValueError(f"a tool with the implementation {other} is not run here")

    def _function(self, tool: v1.Tool) -> Function:
        if tool.server.function == ASK_USER:
            return Function(
                tool.name or ASK_USER,
                tool.description or ASK_USER_DESCRIPTION,
                tool.parameters or ASK_USER_PARAMETERS,
                v1.ToolBinding(function=ASK_USER),
            )
        return self._known(tool.server.function).offered(tool.name, tool.description, tool.parameters)

    async def call(self, binding: v1.ToolBinding, arguments: Mapping[str, Any], context: CallContext) -> Outcome:
        match binding.WhichOneof("implementation"):
            case "function" if binding.function == ASK_USER:
                raise ValueError("a question is answered by a person, not by a call")
            case "function":
                return await self._known(binding.function).call(arguments, context)
            case "mcp":
                return await self._server(binding.mcp.server).call(binding.mcp.tool, arguments, context)
            case _:
                raise ValueError("a tool of the caller is not run here")

    def _known(self, function: str) -> "PythonTool":
        known = self._functions.get(function)
        if known is None:
            raise errors.tool_error(f"This server has no function {function!r}.")
        return known

    def _server(self, name: str) -> "McpServer":
        server = self._servers.get(name)
        if server is None:
            raise errors.tool_error(f"This server has no MCP server {name!r}.")
        return server

    async def close(self) -> None:
        await asyncio.gather(*(server.close() for server in self._servers.values()))
