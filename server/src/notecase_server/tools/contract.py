"""The contract between the engine and tools that run in the server: each has a schema, can be called and may fail.
Tools that run in the caller's process are not covered: the engine only waits for their results.
"""

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import notecase
from google.protobuf.empty_pb2 import Empty
from notecase import Plain, from_value, to_value, v1

from notecase_server.errors import NotecaseError

ASK_USER = "ask_user"
"""The function that every server has: the engine answers it by asking a person."""


class ToolSettingsError(Exception):
    """The tools cannot be made from the settings; the text is a sentence for the operator."""


@dataclass(slots=True, kw_only=True)
class CallContext(notecase.CallContext):
    """What a call knows of where it is made, and how it changes state.

    Values are Python's own, as `notecase.to_value` takes them: it raises TypeError or OverflowError for what state
    cannot hold. What was changed here is read back only once the call has succeeded."""

    get_state: Callable[..., Awaitable[Mapping[str, v1.Value]]]
    """`await get_state("key", …)`: the session's own state as it is, those of the keys that exist."""
    pose: Callable[[str, str], Awaitable[v1.InputResponse]]
    """`await pose(question, schema)`: see `ask`; the schema as JSON text, or empty."""
    ops: list[v1.StateOp] = field(default_factory=list)
    """Operations on the session's state: they commit with the call's result, all or none; a failed call's are
    dropped."""

    async def read(self, *keys: str) -> dict[str, Any]:
        """Returns the session's current state: those of the keys that exist. A function that is not async cannot await
        it, so it takes what it needs as arguments."""
        return {key: from_value(value) for key, value in (await self.get_state(*keys)).items()}

    async def ask(self, question: str, schema: Mapping[str, Any] | None = None) -> v1.InputResponse:
        """Asks the user, and returns the answer when it is given, which may take days. It is text, or with a
        JSON Schema of an object JSON text that fits it. A call asks one question after the other.

        The decision is DECISION_ANSWER with `answer`; DECISION_DENY with a `reason`; DECISION_CANCEL when the time for
        an answer passed or a user dismissed the question; or unspecified when it was withdrawn, because the call or the
        run stops. The call's time-out is paused meanwhile. When the process is lost, the call and its question are
        lost, too. Raises NotecaseError TOOL_ERROR for a question that is too large or one too many, or an invalid
        schema; a tool that does not catch it fails."""
        return await self.pose(question, "" if schema is None else json.dumps(schema, ensure_ascii=False))

    def put(self, key: str, value: Plain) -> None:
        self.ops.append(v1.StateOp(key=key, set=to_value(value)))

    def remove(self, key: str) -> None:
        """Of a missing key: nothing, and no error."""
        self.ops.append(v1.StateOp(key=key, remove=Empty()))

    def increment(self, key: str, by: int = 1) -> None:
        """Of an integer; a missing key counts as 0."""
        self.ops.append(v1.StateOp(key=key, increment=by))

    def append(self, key: str, value: Plain) -> None:
        """To a list; a missing key counts as the empty list."""
        self.ops.append(v1.StateOp(key=key, append=to_value(value)))


class Outcome(NamedTuple):
    """What became of a call: `parts` (text, file, data), or `error`, a sentence for the model."""

    parts: Sequence[v1.Part] = ()
    error: str = ""


class Function(NamedTuple):
    """One tool, as the model gets it, and its implementation."""

    name: str
    description: str
    parameters: str
    """JSON Schema text of an object."""
    implementation: v1.ToolBinding
    """The function, or the MCP server and its own name of the tool, by which `Toolbox.call` finds it again: after a
    restart too, and whatever the name comes to mean meanwhile. Nothing else of it is set."""


class Incomplete(NotecaseError):
    """TOOL_ERROR for some of the tools of an MCP server."""

    def __init__(self, message: str, functions: Sequence[Function]) -> None:
        """`functions` are the other ones, which can be used."""
        super().__init__(v1.ERROR_REASON_TOOL_ERROR, message)
        self.functions = functions


class Toolbox(Protocol):
    """The tools of one server, as its operator configured them."""

    @property
    def functions(self) -> Sequence[str]:
        """For ServerTool.function, ASK_USER among them."""
        ...

    @property
    def mcp_servers(self) -> Sequence[str]:
        """For McpTool.server."""
        ...

    def changes(self, servers: Iterable[str]) -> int:
        """Returns how often these MCP servers have said that their tools have changed."""
        ...

    async def resolve(self, tool: v1.Tool) -> Sequence[Function]:
        """The functions behind a `server` or `mcp` tool, under the names the model is to use: the tool's own for a
        function, and for MCP the server's names, filtered, behind the tool's name as a prefix (`{name}_{theirs}`) when
        it has one, and changed where a model's API does not take them (see `naming.offered`). `description` and
        `parameters` of the tool, where set, win for a function.

        Raises NotecaseError TOOL_ERROR when a function or MCP server is not there or cannot be reached, and Incomplete
        when an MCP server does not have all of the tools."""
        ...

    async def call(self, binding: v1.ToolBinding, arguments: Mapping[str, Any], context: CallContext) -> Outcome:
        """Calls the function or MCP tool that a call was bound to, with the arguments as decoded JSON. Cancelling it
        cancels the tool. Raises NotecaseError TOOL_ERROR when the function or MCP server does not exist any more. Any
        other exception is a defect of the tool: it is logged, and the model gets only the information that the tool
        failed."""
        ...

    async def close(self) -> None:
        """Ends connections and processes. Idempotent."""
        ...
