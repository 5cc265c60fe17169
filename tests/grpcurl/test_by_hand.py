"""What a person at a terminal has with grpcurl and no files: descriptions, health, a conversation on one stream, and
errors that say what to do. That each call of docs/calls.md prints what it says is tests/test_docs.py's."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from google.protobuf import json_format
from notecase import v1

from tests.support.server import Running, running
from tests.support.values import KEYS, VALUES, exactly, nested

Json = dict[str, Any]

NOTECASE = {
    f"notecase.v1.{name}Service"
    for name in ("Agent", "Audit", "Blob", "Key", "Message", "Run", "Server", "Session", "State", "Tenant")
}
OPERATIONS = {
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
}


class Stream:
    """A call whose frames are typed one by one, as a person would."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.events: list[Json] = []
        """All that have been read, in their order."""

    def type(self, frame: Json) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(frame).encode() + b"\n")

    def done(self) -> None:
        """Ctrl-D: no more frames."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    async def until(self, kind: str) -> Json:
        """Reads up to the next frame of that kind, and returns what is in it."""
        while frame := await self._frame():
            if kind in frame:
                found: Json = frame[kind]
                return found
        raise AssertionError(f"the stream ended before a frame {kind}")

    async def end(self) -> None:
        """Reads up to the end of the call."""
        while await self._frame():
            pass

    async def _frame(self) -> Json:
        """What is printed next; empty at the end."""
        assert self._process.stdout is not None
        lines = []
        while line := await self._process.stdout.readline():
            lines.append(line)
            if line == b"}\n":
                frame: Json = json.loads(b"".join(lines))
                self.events += frame.get("batch", {}).get("events", [])
                return frame
        assert [] == lines
        return {}


class Terminal:
    """grpcurl against one server."""

    def __init__(self, grpcurl: str, address: str) -> None:
        self._grpcurl = grpcurl
        self._address = address

    async def print(self, *words: str, flags: tuple[str, ...] = ()) -> str:
        """What `grpcurl -plaintext FLAGS ADDRESS WORDS` prints; it must succeed."""
        code, out, errors = await self._run(flags, words)
        assert (0, "") == (code, errors)
        return out

    async def call(self, method: str, request: Json) -> Json:
        """The answer of a unary call."""
        answer: Json = json.loads(await self.print(f"notecase.v1.{method}", flags=("-d", json.dumps(request))))
        return answer

    async def refused(self, method: str, request: Json | str, *flags: str) -> tuple[int, str]:
        """The exit code, and what is printed, of a call that fails."""
        data = request if isinstance(request, str) else json.dumps(request)
        code, out, errors = await self._run(("-d", data, *flags), (f"notecase.v1.{method}",))
        assert out == ""
        return code, errors

    @asynccontextmanager
    async def stream(self, method: str) -> AsyncIterator[Stream]:
        process = await asyncio.create_subprocess_exec(
            *(self._grpcurl, "-plaintext", "-d", "@", self._address, f"notecase.v1.{method}"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            yield Stream(process)
        except BaseException:
            with suppress(ProcessLookupError):  # It may have ended by itself.
                process.kill()
            raise
        finally:
            await process.communicate()
        assert process.returncode == 0

    async def _run(self, flags: tuple[str, ...], words: tuple[str, ...]) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(self._grpcurl, "-plaintext", *flags, self._address, *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, errors = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), errors.decode()


@pytest.fixture
async def served() -> AsyncIterator[Running]:
    async with running("memory:") as server:
        yield server


@pytest.fixture
def terminal(grpcurl: str, served: Running) -> Terminal:
    return Terminal(grpcurl, served.address)


@pytest.fixture
async def session(terminal: Terminal) -> str:
    """A session with an agent on the offline model."""
    agent = {"agent_id": "clerk", "agent": {"llm": {"provider": "offline", "instruction": "Be brief."}}}
    await terminal.call("AgentService/CreateAgent", agent)
    session = {"session_id": "case", "session": {"agent": "agents/clerk"}}
    return str((await terminal.call("SessionService/CreateSession", session))["name"])


def said(text: str) -> list[Json]:
    return [{"parts": [{"text": text}]}]


async def test_the_services_are_listed(terminal: Terminal) -> None:
    assert NOTECASE | OPERATIONS == set((await terminal.print("list")).split())


async def test_methods_and_messages_are_described(terminal: Terminal) -> None:
    """In the protos' own names, by which a request is written."""
    assert await terminal.print("describe", "notecase.v1.StateService") == (
        "notecase.v1.StateService is a service:\n"
        "service StateService {\n"
        "  rpc GetState ( .notecase.v1.GetStateRequest ) returns ( .notecase.v1.GetStateResponse ) {\n"
        "    option idempotency_level = NO_SIDE_EFFECTS;\n"
        "  }\n"
        "  rpc PutState ( .notecase.v1.PutStateRequest ) returns ( .notecase.v1.StateEntry );\n"
        "  rpc UpdateState ( .notecase.v1.UpdateStateRequest ) returns ( .notecase.v1.State );\n"
        "}\n"
    )
    assert await terminal.print("describe", "notecase.v1.AttachRun") == (
        "notecase.v1.AttachRun is a message:\n"
        "message AttachRun {\n"
        "  string name = 1;\n"
        "  optional int64 after_sequence = 2;\n"
        "  .notecase.v1.WatchOptions options = 3;\n"
        "  string if_session_uid = 4;\n"
        "}\n"
    )


async def test_all_that_is_listed_can_be_described(terminal: Terminal) -> None:
    for service in (await terminal.print("list")).split():
        assert (await terminal.print("describe", service)).startswith(f"{service} is a service:\n")


@pytest.mark.parametrize(
    ("symbol", "kind"),
    [
        ("notecase.v1.RunService.Run", "a method"),
        ("notecase.v1.Run", "a message"),
        ("notecase.v1.Session.display_name", "a field"),
        ("notecase.v1.Session.LabelsEntry", "the entry type for a map field"),
        ("notecase.v1.Event.payload", "a one-of"),
        ("notecase.v1.Run.State", "an enum"),
        ("notecase.v1.Run.STATE_RUNNING", "an enum value"),
        ("grpc.health.v1.Health.Watch", "a method"),
        ("grpc.reflection.v1.ServerReflectionRequest", "a message"),
        ("google.rpc.ErrorInfo", "a message"),
        ("google.protobuf.Timestamp", "a message"),
    ],
)
async def test_every_kind_of_symbol_can_be_described(terminal: Terminal, symbol: str, kind: str) -> None:
    assert f" is {kind}:" in (await terminal.print("describe", symbol)).splitlines()[0]


async def test_health_is_reported_for_the_server_and_each_service(terminal: Terminal) -> None:
    for service in ["", *sorted(NOTECASE)]:
        flags = ("-d", json.dumps({"service": service}))
        assert json.loads(await terminal.print("grpc.health.v1.Health/Check", flags=flags)) == {"status": "SERVING"}


async def test_a_run_is_driven_by_typing(terminal: Terminal, session: str) -> None:
    """Frames are answered as they are typed: the start by where the stream is, a refused command by a result after
    which the stream goes on, the cancel by the run's end; then the call ends well."""
    async with terminal.stream("RunService/Run") as run:
        state = {"mood": {"string_value": "calm"}}
        run.type({"start": {"session": session, "state": state, "messages": said("/pause 10000 /say Never.")}})
        attached = await run.until("attached")
        assert (session, "STATE_RUNNING") == (attached["session"], attached["run"]["state"])
        run.type({"command_id": "more", "update_state": {"ops": [{"key": "mood", "increment": 1}]}})
        refused = await run.until("result")
        assert ("more", "DISPOSITION_REFUSED") == (refused["command_id"], refused["disposition"])
        assert refused["error"]["reason"] == "ERROR_REASON_STATE_TYPE_MISMATCH"
        run.type({"command_id": "stop", "cancel": {"reason": "I have heard enough."}})
        applied = await run.until("result")
        assert ("stop", "DISPOSITION_APPLIED") == (applied["command_id"], applied["disposition"])
        run.done()
        await run.end()
    assert run.events[-1]["run_state_changed"] == {"state": "STATE_CANCELLED", "reason": "I have heard enough."}


async def test_one_terminal_watches_what_another_does(terminal: Terminal, session: str) -> None:
    """And its call ends by itself with the run."""
    start = {"session": session, "run_id": "slow", "messages": said("/pause 10000 /say Never.")}
    run = await terminal.call("RunService/CreateRun", {"start": start})
    async with terminal.stream("RunService/WatchEvents") as watch:
        watch.type({"name": run["name"]})
        watch.done()
        batch = await watch.until("batch")
        assert ["1", "2"] == [event["sequence"] for event in batch["events"]]
        assert batch["caught_up"] is True
        await terminal.call("RunService/CancelRun", {"name": run["name"]})
        await watch.end()
    assert watch.events[-1]["run_state_changed"] == {"state": "STATE_CANCELLED"}


async def test_an_error_can_be_read(terminal: Terminal) -> None:
    """All mistakes at once, each field with its rule. grpcurl adds the code to 64."""
    agent = {"agent_id": "No Way", "agent": {"llm": {"max_model_calls": -1}}}
    code, told = await terminal.refused("AgentService/CreateAgent", agent)
    assert (64 + 3, ["ERROR:", "  Code: InvalidArgument"]) == (code, told.splitlines()[:2])
    name, calls = "must be 1 to 63 lower-case letters, digits and inner '.', '_' or '-'", "must be 0 (for 10) to 1000"
    assert told.splitlines()[2] == f"  Message: agent_id: {name}; agent.llm.max_model_calls: {calls}."
    for line in ('"reason": "INVALID_FIELD"', f'"description": "{name}"', f'"description": "{calls}"'):
        assert line in told


async def test_an_error_can_be_read_by_a_script(terminal: Terminal) -> None:
    """Of a stream, too."""
    start = {"start": {"session": "sessions/nobody", "messages": said("Hello?")}}
    code, told = await terminal.refused("RunService/Run", start, "-format-error")
    assert code == 64 + 5
    assert json.loads(told) == {
        "code": 5,
        "message": "There is no session 'sessions/nobody'.",
        "details": [
            {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "domain": "notecase.dev",
                "reason": "SESSION_NOT_FOUND",
            },
            {
                "@type": "type.googleapis.com/google.rpc.ResourceInfo",
                "resource_name": "sessions/nobody",
                "resource_type": "notecase.v1.Session",
            },
        ],
    }


async def test_every_value_of_state_survives_go_s_json(terminal: Terminal, served: Running) -> None:
    """As protobuf writes it here grpcurl reads it, and as grpcurl prints it protobuf reads it here: to the bit. But
    grpcurl needs a null by its name, and Python's JSON reads the -0 that Go writes as an integer."""
    ops = [v1.StateOp(key=key, set=value) for key, value in VALUES.items()]
    ops += [v1.StateOp(key=key, set=v1.Value(string_value=key)) for key in KEYS]
    request = v1.UpdateStateRequest(name="app/state", ops=ops)
    written = json_format.MessageToJson(request).replace('"nullValue": null', '"nullValue": "NULL_VALUE"')
    await terminal.call("StateService/UpdateState", json.loads(written))
    state = await served.state.GetState(v1.GetStateRequest(name="app/state", page_size=1000))
    assert {op.key: exactly(op.set) for op in ops} == {key: exactly(held.value) for key, held in state.entries.items()}
    flags = ("-d", '{"name": "app/state", "page_size": 1000}')
    text = await terminal.print("notecase.v1.StateService/GetState", flags=flags)
    printed = json.loads(text, parse_int=lambda digits: -0.0 if digits == "-0" else int(digits))
    assert exactly(state) == exactly(json_format.ParseDict(printed, v1.State()))
    assert {"int_value": "9007199254740993"} == printed["entries"]["beyond 2^53"]["value"]
    assert {"map_value": {}} == printed["entries"]["empty map"]["value"]
    assert "absent" not in printed["entries"]


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("k", {"double_value": "NaN"}, "value"),
        ("k", {"map_value": {"values": {"x": {"double_value": "-Infinity"}}}}, "value['x']"),
        ("k" * (64 << 10), {"int_value": 1}, "key"),
        ("k", json_format.MessageToDict(nested(18)), "value" + "['k'][0]" * 8),
        ("k", {"list_value": {"values": []}}, "endless"),
    ],
    ids=["NaN", "infinity", "a key of 64 KiB", "17 levels", "thousands of levels"],
)
async def test_what_state_cannot_hold_is_refused_by_the_name_of_its_field(
    terminal: Terminal, key: str, value: Json, field: str
) -> None:
    request = json.dumps({"name": "app/state", "key": key, "value": value})
    if field == "endless":
        field, levels = "request", 3_000  # of which each is three of JSON, and grpcurl itself reads 10,000
        inner = '{"list_value": {"values": ['
        request = request.replace(json.dumps(value), inner * levels + '{"int_value": 1}' + "]}}" * levels)
    code, told = await terminal.refused("StateService/PutState", request, "-format-error")
    assert 64 + 3 == code
    error = json.loads(told)
    assert 3 == error["code"]
    violations = [detail for detail in error["details"] if "fieldViolations" in detail or "field_violations" in detail]
    assert [field] == [one["field"] for found in violations for one in found["field_violations"]]
    assert {} == (await terminal.call("StateService/GetState", {"name": "app/state"})).get("entries", {})
