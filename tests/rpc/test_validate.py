"""What a request may cost before it is refused, counted; and that no time comes in of which no deadline can be made."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import NULL_VALUE
from notecase import v1
from notecase.v1 import agent_pb2, blob_pb2, message_pb2, run_pb2, server_pb2, session_pb2, state_pb2
from notecase_server.errors import NotecaseError
from notecase_server.rpc import validate
from notecase_server.rpc.check import LIST_PRICE, MAX_VALUES, MAX_VIOLATIONS, Check
from notecase_server.rpc.validate import MAX_PARTS
from notecase_server.tools.mcp_settings import McpServerSettings
from notecase_server.tools.toolbox import make_toolbox

from tests.e2e.driving import fields_of, reason_of
from tests.support.server import running

EMPTY = v1.Value()
NOTHING = v1.Value(null_value=NULL_VALUE)
NO_TOOLS: Any = None


def values(one: v1.Value, number: int) -> v1.Value:
    return v1.Value(list_value=v1.ValueList(values=[one] * number))


def told(check: Check, look: Any) -> list[str]:
    """Returns the fields in the error."""
    try:
        look()
        check.done()
    except NotecaseError as refused:
        return [violation.field for violation in refused.violations]
    return []


async def test_what_the_server_does_not_have_is_named_with_what_it_has() -> None:
    toolbox = make_toolbox([], {"files": McpServerSettings(command="files-mcp")})
    tools = [
        v1.Tool(name="a", server=v1.ServerTool(function="ask_usr")),
        v1.Tool(mcp=v1.McpTool(server="flies")),
        v1.Tool(name="b", server=v1.ServerTool()),
    ]
    llm = v1.LlmAgent(provider="opnai", tools=tools, fallbacks=[v1.Fallback(provider="ofline")])
    check = Check()
    validate.agent(check, v1.Agent(llm=llm), ["offline"], toolbox)
    at = "agent.llm"
    assert [
        (f"{at}.provider", "there is no provider 'opnai'; this server has offline"),
        (f"{at}.fallbacks[0].provider", "there is no provider 'ofline'; this server has offline"),
        (f"{at}.tools[0].server.function", "there is no function 'ask_usr'; this server has ask_user"),
        (f"{at}.tools[1].mcp.server", "there is no MCP server 'flies'; this server has files"),
        (f"{at}.tools[2].server.function", "is missing; this server has ask_user"),
    ] == check.violations
    none = Check()
    validate.agent(none, v1.Agent(llm=v1.LlmAgent(tools=tools[1:2])), ["offline"], make_toolbox([], {}))
    assert ["there is no MCP server 'flies'; this server has none"] == [found.description for found in none.violations]


FLOODS = {
    "a list of nothing": lambda check: check.value("value", values(EMPTY, 9000)),
    "a map of nothing": lambda check: check.value(
        "value", v1.Value(map_value=v1.ValueMap(values={f"{n}": EMPTY for n in range(9000)}))
    ),
    "lists of nothing in a list": lambda check: check.value("value", values(values(EMPTY, 50), 200)),
    "operations without keys": lambda check: validate.ops(check, "ops", [v1.StateOp()] * 1000, session=True),
    "state under bad keys": lambda check: validate.first_state(
        check, "state", {"x" * 300 + str(n): EMPTY for n in range(1000)}
    ),
    "empty parts": lambda check: validate.messages(
        check, "m", [v1.Message(parts=[v1.Part()] * 1000)] * 2, [v1.Message.ROLE_USER]
    ),
    "messages without parts or role": lambda check: validate.messages(
        check, "m", [v1.Message(role=v1.Message.ROLE_ASSISTANT)] * 100, [v1.Message.ROLE_USER]
    ),
    "tools without anything": lambda check: validate.tools(check, "tools", [v1.Tool()] * 128),
    "the result of a tool": lambda check: validate.command(
        check, v1.RunRequest(tool_result=v1.ToolResult(call_id="c", result=[v1.Part()] * 1000))
    ),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_the_look_ends_at_the_budget(flood: Any) -> None:
    check = Check()
    assert MAX_VIOLATIONS == len(told(check, lambda: flood(check)))
    assert check.visited <= 3 * MAX_VIOLATIONS


TOO_MANY = {
    "operations": (lambda check: validate.ops(check, "ops", [v1.StateOp()] * 1001, session=True), "ops"),
    "bytes of operations": (
        lambda check: validate.ops(check, "ops", [v1.StateOp(key="", set=values(EMPTY, 300_000))] * 2, session=True),
        "ops",
    ),
    "keys of first state": (
        lambda check: validate.first_state(check, "state", {str(n): EMPTY for n in range(1001)}),
        "state",
    ),
    "bytes of first state": (lambda check: validate.first_state(check, "state", {"": values(EMPTY, 600_000)}), "state"),
    "messages": (lambda check: validate.messages(check, "m", [v1.Message()] * 101, []), "m"),
    "parts of a message": (
        lambda check: validate.messages(check, "m", [v1.Message(parts=[v1.Part()] * (MAX_PARTS + 1))], []),
        "m[0].parts",
    ),
    "parts of a result": (
        lambda check: validate.command(
            check, v1.RunRequest(tool_result=v1.ToolResult(call_id="c", result=[v1.Part()] * (MAX_PARTS + 1)))
        ),
        "tool_result.result",
    ),
    "tools": (lambda check: validate.tools(check, "tools", [v1.Tool()] * 129), "tools"),
    "names of MCP servers' tools": (
        lambda check: validate.tools(
            check,
            "tools",
            [v1.Tool(name=f"p{n}", mcp=v1.McpTool(server="s", tools=map(str, range(126)))) for n in range(8)],
        ),
        "tools",
    ),
    "bytes of an agent": (
        lambda check: validate.agent(
            check, v1.Agent(llm=v1.LlmAgent(instruction="{%" * 600_000, tools=[v1.Tool()])), [], NO_TOOLS
        ),
        "agent",
    ),
    "values": (lambda check: check.value("value", values(NOTHING, MAX_VALUES)), "value"),
    "values within values": (lambda check: check.value("value", values(values(NOTHING, 198), 200)), "value[49]"),
    "values of a map": (
        lambda check: check.value(
            "value", v1.Value(map_value=v1.ValueMap(values={str(n): NOTHING for n in range(MAX_VALUES)}))
        ),
        "value",
    ),
}


@pytest.mark.parametrize(("look", "field"), TOO_MANY.values(), ids=TOO_MANY)
def test_what_has_the_wrong_size_is_not_looked_into(look: Any, field: str) -> None:
    check = Check()
    found = told(check, lambda: look(check))
    assert field == found[0]
    assert {field} == set(found[:1])
    assert not [deeper for deeper in found if deeper.startswith((f"{field}.", f"{field}["))]
    assert check.visited <= MAX_VALUES + LIST_PRICE, "the list at which it ends is counted"


def test_as_many_values_as_are_allowed_are_fine() -> None:
    check = Check()
    assert not told(check, lambda: check.value("value", values(NOTHING, MAX_VALUES - 2)))
    assert MAX_VALUES == check.visited


async def test_a_flood_is_refused_for_its_size_alone() -> None:
    async with running() as served:
        request = v1.PutStateRequest(name="app/state", key="k", value=values(EMPTY, 524_300))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.state.PutState(request)
        assert ("INVALID_FIELD", {"value"}) == (reason_of(refused.value), fields_of(refused.value))


async def test_masks_and_keys_are_counted_first() -> None:
    async with running() as served:
        masked = v1.UpdateSessionRequest(session=v1.Session(name="sessions/s"))
        masked.update_mask.paths.extend(["nothing"] * 100_000)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.sessions.UpdateSession(masked)
        assert {"update_mask"} == fields_of(refused.value)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.state.GetState(v1.GetStateRequest(name="app/state", keys=["k"] * 100_000))
        assert {"keys"} == fields_of(refused.value)


class TimeField(NamedTuple):
    """A Duration or Timestamp somewhere in a request."""

    method: str
    request: type[Message]
    streams: tuple[bool, bool]
    path: tuple[FieldDescriptor, ...]

    def __str__(self) -> str:
        return f"{self.method.rpartition('/')[2]}:{self.name}"

    @property
    def name(self) -> str:
        """The path as violations name it."""
        return ".".join(field.name + ("[0]" if field.is_repeated else "") for field in self.path)

    def filled(self, seconds: int, nanos: int) -> Message:
        request = at = self.request()
        for field in self.path:
            inner = getattr(at, field.name)
            at = inner.add() if field.is_repeated else inner
        at.seconds, at.nanos = seconds, nanos  # type: ignore[attr-defined]
        return request


TIMES = {"google.protobuf.Duration", "google.protobuf.Timestamp"}


def time_fields() -> Iterator[TimeField]:
    for file in (agent_pb2, blob_pb2, message_pb2, run_pb2, server_pb2, session_pb2, state_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                request = message_factory.GetMessageClass(method.input_type)
                streams = (method.client_streaming, method.server_streaming)
                for path in paths(method.input_type, ()):
                    yield TimeField(f"/{service.full_name}/{method.name}", request, streams, path)


def paths(descriptor: Any, above: tuple[FieldDescriptor, ...]) -> Iterator[tuple[FieldDescriptor, ...]]:
    for field in descriptor.fields:
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry or inner in [other.message_type for other in above]:
            continue
        if inner.full_name in TIMES:
            yield (*above, field)
        else:
            yield from paths(inner, (*above, field))


FIELDS = list(time_fields())

MADE_HERE = {"create_time", "update_time", "start_time", "elapsed"}
"""What the server writes: it leaves out what a request says there, or refuses what holds it."""

BAD = {
    "far": (10**12, 0),
    "negative": (-1, 0),
    "negative nanos": (0, -1),
    "too many nanos": (0, 1_000_000_000),
    "the largest": (2**63 - 1, 2**31 - 1),
    "the smallest": (-(2**63), -(2**31)),
}


def test_the_fields_are_found() -> None:
    names = {str(field) for field in FIELDS}
    assert {"CreateRun:start.limits.input_timeout", "CreateAgent:agent.llm.tools[0].timeout"} <= names
    assert {"WaitRun:timeout", "UpdateSession:session.idle_ttl", "Run:attach.options.max_batch_delay"} <= names


SHAPES = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


@pytest.mark.parametrize("method", sorted({field.method for field in FIELDS}))
async def test_a_time_that_is_out_of_range_is_refused_where_it_comes_in(method: str) -> None:
    async with running() as served:
        for field in FIELDS:
            if field.method == method:
                for bad in BAD.values():
                    await refused_or_left_out(served.channel, field, *bad)


async def refused_or_left_out(channel: grpc.aio.Channel, field: TimeField, seconds: int, nanos: int) -> None:
    call = getattr(channel, SHAPES[field.streams])(field.method)
    frame = field.filled(seconds, nanos).SerializeToString()
    answer = call(iter([frame]) if field.streams[0] else frame)
    try:
        await (answer.read() if field.streams[1] else answer)
    except grpc.aio.AioRpcError as refused:
        assert reason_of(refused) != "INTERNAL", field
        if field.path[-1].name not in MADE_HERE:
            assert reason_of(refused) == "INVALID_FIELD", field
            assert {field.name.removeprefix("command."), "command"} & fields_of(refused)
    else:
        assert field.path[-1].name in MADE_HERE, field


def test_the_error_of_an_invalid_name_says_what_ids_consist_of() -> None:
    check = Check()
    check.key_name("name", "keys/wrong-id")
    check.run("run", "sessions/case/runs/First")
    check.user("user", "ada")
    with pytest.raises(NotecaseError) as refused:
        check.done()
    ids = "1 to 63 lower-case letters, digits and inner '.', '_' or '-'"
    assert [
        "must be keys/{key}, where {key} is a UUID in lower case, not 'keys/wrong-id'",
        f"must be sessions/{{session}}/runs/{{run}}, where each id is {ids}, not 'sessions/case/runs/First'",
        "must be users/{user}, where {user} is 1 to 128 letters, digits and . _ ~ @ | : + = -, not 'ada'",
    ] == [violation.description for violation in refused.value.violations]
