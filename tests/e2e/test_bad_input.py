"""Bad input ends as a clear typed error with every field named, and nothing is lost or changed by it."""

import asyncio
import math
from typing import Any

import grpc
import pytest
from google.protobuf import struct_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from notecase import v1

from tests.e2e.driving import durable, fields_of, log_of, reason_of, said
from tests.support.openai_server import OpenAIServer, reply
from tests.support.server import Running, running

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


def deep(levels: int) -> v1.Value:
    value = v1.Value(int_value=1)
    for _ in range(levels):
        value = v1.Value(list_value=v1.ValueList(values=[value]))
    return value


def put(value: v1.Value, key: str = "k") -> tuple[str, Message]:
    return "StateService/PutState", v1.PutStateRequest(name="sessions/case/state", key=key, value=value)


def llm(instruction: str) -> tuple[str, Message]:
    agent = v1.Agent(llm=v1.LlmAgent(instruction=instruction))
    return "AgentService/CreateAgent", v1.CreateAgentRequest(agent=agent)


def invoke(**fields: object) -> tuple[str, Message]:
    return "RunService/Invoke", v1.InvokeRequest(start=v1.StartRun(**fields))  # type: ignore[arg-type]


def create(session_id: str) -> tuple[str, Message]:
    return "SessionService/CreateSession", v1.CreateSessionRequest(session_id=session_id)


CASES: dict[str, tuple[tuple[str, Message], grpc.StatusCode, str, set[str]]] = {
    "unknown agent": (
        invoke(session="sessions/case", agent="agents/nobody", messages=[said("x")]),
        NOT_FOUND,
        "AGENT_NOT_FOUND",
        set(),
    ),
    "unknown revision": (
        ("AgentService/GetAgent", v1.GetAgentRequest(name="agents/clerk@9")),
        NOT_FOUND,
        "AGENT_NOT_FOUND",
        set(),
    ),
    "unknown session": (invoke(session="sessions/none", messages=[said("x")]), NOT_FOUND, "SESSION_NOT_FOUND", set()),
    "unknown run": (
        ("RunService/GetRun", v1.GetRunRequest(name="sessions/case/runs/r")),
        NOT_FOUND,
        "RUN_NOT_FOUND",
        set(),
    ),
    "unknown message": (
        ("MessageService/GetMessage", v1.GetMessageRequest(name="sessions/case/messages/m")),
        NOT_FOUND,
        "MESSAGE_NOT_FOUND",
        set(),
    ),
    "session of an unknown agent": (
        ("SessionService/CreateSession", v1.CreateSessionRequest(session=v1.Session(agent="agents/nobody"))),
        NOT_FOUND,
        "AGENT_NOT_FOUND",
        set(),
    ),
    "id with a slash": (create("a/b"), INVALID, "INVALID_FIELD", {"session_id"}),
    "id with a space": (create("a b"), INVALID, "INVALID_FIELD", {"session_id"}),
    "id of 10,000 characters": (create("a" * 10_000), INVALID, "INVALID_FIELD", {"session_id"}),
    "name of 10,000 characters": (
        ("SessionService/GetSession", v1.GetSessionRequest(name="sessions/" + "a" * 10_000)),
        INVALID,
        "INVALID_FIELD",
        {"name"},
    ),
    "no name": (("SessionService/GetSession", v1.GetSessionRequest()), INVALID, "INVALID_FIELD", {"name"}),
    "message without parts": (
        invoke(session="sessions/case", messages=[v1.Message()]),
        INVALID,
        "INVALID_FIELD",
        {"start.messages[0].parts"},
    ),
    "empty text": (
        invoke(session="sessions/case", messages=[said("")]),
        INVALID,
        "INVALID_FIELD",
        {"start.messages[0].parts[0].text"},
    ),
    "nothing to answer": (invoke(session="sessions/case"), INVALID, "INVALID_FIELD", {"start.messages"}),
    "no agent anywhere": (
        invoke(new_session=v1.Session(), messages=[said("x")]),
        INVALID,
        "INVALID_FIELD",
        {"start.agent"},
    ),
    "the model's parts": (
        invoke(session="sessions/case", messages=[v1.Message(parts=[v1.Part(refusal="no")])]),
        INVALID,
        "INVALID_FIELD",
        {"start.messages[0].parts[0]"},
    ),
    "NaN": (put(v1.Value(double_value=math.nan)), INVALID, "INVALID_FIELD", {"value"}),
    "infinity inside": (
        put(v1.Value(map_value=v1.ValueMap(values={"x": v1.Value(double_value=-math.inf)}))),
        INVALID,
        "INVALID_FIELD",
        {"value['x']"},
    ),
    "no value": (put(v1.Value()), INVALID, "INVALID_FIELD", {"value"}),
    "17 levels": (put(deep(17)), INVALID, "INVALID_FIELD", {"value" + "[0]" * 16}),
    "key of 257 bytes": (put(v1.Value(int_value=1), "ü" * 128 + "x"), INVALID, "INVALID_FIELD", {"key"}),
    "key of 64 KiB": (put(v1.Value(int_value=1), "k" * (64 << 10)), INVALID, "INVALID_FIELD", {"key"}),
    "key user": (put(v1.Value(int_value=1), "user"), INVALID, "INVALID_FIELD", {"key"}),
    "unknown state": (("StateService/GetState", v1.GetStateRequest(name="state")), INVALID, "INVALID_FIELD", {"name"}),
    "template that does not parse": (llm("{% if %}"), INVALID, "TEMPLATE_ERROR", {"agent.llm.instruction"}),
    "template with an include": (llm("{% include 'x' %}"), INVALID, "TEMPLATE_ERROR", {"agent.llm.instruction"}),
    "unknown provider": (
        ("AgentService/CreateAgent", v1.CreateAgentRequest(agent=v1.Agent(llm=v1.LlmAgent(provider="acme")))),
        INVALID,
        "INVALID_FIELD",
        {"agent.llm.provider"},
    ),
    "edited page token": (
        ("SessionService/ListSessions", v1.ListSessionsRequest(page_token="WzFd.AAAA")),
        INVALID,
        "PAGE_TOKEN_INVALID",
        {"page_token"},
    ),
    "filter on an unknown field": (
        ("SessionService/ListSessions", v1.ListSessionsRequest(filter='colour = "red"')),
        INVALID,
        "INVALID_FIELD",
        {"filter"},
    ),
    "page of 1001": (
        ("SessionService/ListSessions", v1.ListSessionsRequest(page_size=1001)),
        INVALID,
        "INVALID_FIELD",
        {"page_size"},
    ),
    "unknown mask": (
        (
            "SessionService/UpdateSession",
            v1.UpdateSessionRequest(session=v1.Session(name="sessions/case"), update_mask=FieldMask(paths=["user"])),
        ),
        INVALID,
        "INVALID_FIELD",
        {"update_mask"},
    ),
    "part of a field in a mask": (
        (
            "SessionService/UpdateSession",
            v1.UpdateSessionRequest(
                session=v1.Session(name="sessions/case", ttl=Duration(seconds=60)),
                update_mask=FieldMask(paths=["display_name", "ttl.seconds"]),
            ),
        ),
        INVALID,
        "INVALID_FIELD",
        {"update_mask"},
    ),
    "increment of a string": (
        (
            "StateService/UpdateState",
            v1.UpdateStateRequest(name="sessions/case/state", ops=[v1.StateOp(key="word", increment=1)]),
        ),
        grpc.StatusCode.FAILED_PRECONDITION,
        "STATE_TYPE_MISMATCH",
        set(),
    ),
    "a key twice in a batch": (
        (
            "StateService/UpdateState",
            v1.UpdateStateRequest(
                name="sessions/case/state",
                ops=[v1.StateOp(key="n", increment=1), v1.StateOp(key="n", increment=1)],
            ),
        ),
        INVALID,
        "INVALID_FIELD",
        {"ops[1].key"},
    ),
    "a 5 MB message": (
        invoke(session="sessions/case", messages=[said("x" * 5_000_000)]),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "PAYLOAD_TOO_LARGE",
        set(),
    ),
    "a message of a whole page": (
        invoke(session="sessions/case", messages=[v1.Message(parts=[v1.Part(text="x" * 200_000)] * 5)]),
        INVALID,
        "INVALID_FIELD",
        {"start.messages[0]"},
    ),
}


async def call(served: Running, method: str, request: Message) -> bytes:
    """By bytes, as a client of any language would."""
    channel: Any = served.channel
    return bytes(await channel.unary_unary(f"/notecase.v1.{method}")(request.SerializeToString()))


@pytest.mark.parametrize("case", CASES)
async def test_bad_input(served: Running, session: str, case: str) -> None:
    """The code, the reason and all the fields; the log does not move and the server goes on."""
    (method, request), code, reason, fields = CASES[case]
    word = v1.PutStateRequest(name=f"{session}/state", key="word", value=v1.Value(string_value="x"))
    await served.state.PutState(word)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(served, method, request)
    assert (refused.value.code(), reason_of(refused.value)) == (code, reason)
    assert refused.value.details()
    if fields:
        assert fields_of(refused.value) == fields
    assert len(await log_of(served, session)) == 1


async def test_all_mistakes_are_reported_at_once(served: Running) -> None:
    request = v1.CreateSessionRequest(
        session_id="A B",
        session=v1.Session(agent="nobody", user="users/"),
        state={"user": v1.Value(), "": v1.Value(int_value=1)},
        request_id="x" * 200,
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.sessions.CreateSession(request)
    wrong = {"session_id", "session.agent", "session.user", "state['user']", "state['']", "request_id"}
    assert fields_of(refused.value) == wrong


async def test_a_thousand_violations_still_fit_into_a_trailer(served: Running, session: str) -> None:
    ops = [v1.StateOp(key="k" * 300 + str(index)) for index in range(1000)]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.state.UpdateState(v1.UpdateStateRequest(name=f"{session}/state", ops=ops))
    assert reason_of(refused.value) == "INVALID_FIELD"
    assert 2 < len(fields_of(refused.value)) < 1000


async def test_a_20_mb_message_is_refused_by_the_transport(served: Running, session: str) -> None:
    """Beyond 16 MiB nothing is read at all: the code is right, there are no details."""
    start = v1.StartRun(session=session, messages=[said("x" * 20_000_000)])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.runs.Invoke(v1.InvokeRequest(start=start))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("frame", [b"\x0a\x03\xff\xfe\xfd", b"\xff\xff\xff"], ids=["not UTF-8", "garbage"])
async def test_what_does_not_decode_is_an_invalid_argument_in_every_shape_of_call(
    served: Running, frame: bytes
) -> None:
    channel: Any = served.channel
    unary = channel.unary_unary("/notecase.v1.SessionService/GetSession")(frame)
    watching = channel.unary_stream("/notecase.v1.RunService/WatchEvents")(frame)
    running_ = channel.stream_stream("/notecase.v1.RunService/Run")(iter([frame]))
    for attempt in (unary, watching.read(), running_.read()):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await attempt
        assert (refused.value.code(), reason_of(refused.value)) == (INVALID, "INVALID_FIELD")


@pytest.mark.parametrize(
    "first",
    [v1.RunRequest(), v1.RunRequest(cancel=v1.CancelCommand()), None],
    ids=["empty", "cancel", "no frame at all"],
)
async def test_a_first_frame_that_is_not_start_or_attach_ends_the_stream(
    served: Running, first: v1.RunRequest | None
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.runs.Run(iter([first] if first is not None else [])).read()
    assert (refused.value.code(), fields_of(refused.value)) == (INVALID, {"command"})


async def test_a_refused_command_is_a_result_and_the_stream_lives(
    served: Running, session: str, model: OpenAIServer
) -> None:
    go_on = asyncio.Event()
    model.script(reply("Fine.").held(go_on))
    call_ = served.runs.Run()
    await call_.write(v1.RunRequest(start=v1.StartRun(session=session, messages=[said("Go")])))
    bad = [
        v1.RunRequest(command_id="a", attach=v1.AttachRun(name=session)),
        v1.RunRequest(command_id="b"),
        v1.RunRequest(command_id="c", start=v1.StartRun(session="sessions/other", messages=[said("x")])),
        v1.RunRequest(command_id="d", start=v1.StartRun(session=session, messages=[said("x")])),
        v1.RunRequest(command_id="e", update_state=v1.StateUpdate(name="users/bob/state", ops=[v1.StateOp(key="k")])),
    ]
    for frame in bad:
        await call_.write(frame)
    frames = []
    async for frame_ in call_:
        frames.append(frame_)
        if sum(f.HasField("result") for f in frames) == len(bad):
            go_on.set()
    results = [frame_.result for frame_ in frames if frame_.HasField("result")]
    assert [(result.command_id, result.disposition) for result in results] == [
        (frame.command_id, v1.CommandResult.DISPOSITION_REFUSED) for frame in bad
    ]
    reasons = [v1.ErrorReason.Name(result.error.reason).removeprefix("ERROR_REASON_") for result in results]
    assert reasons == ["INVALID_FIELD", "INVALID_FIELD", "INVALID_FIELD", "RUN_ACTIVE", "INVALID_FIELD"]
    assert all(result.error.message for result in results)
    assert durable(frames)[-1].run_state_changed.state == v1.Run.STATE_SUCCEEDED


async def test_a_command_for_a_run_that_ended_is_refused(served: Running, session: str, model: OpenAIServer) -> None:
    model.script(reply("Done."))
    start = v1.StartRun(session=session, run_id="r1", messages=[said("Go")])
    await served.runs.Invoke(v1.InvokeRequest(start=start))
    command = v1.RunRequest(cancel=v1.CancelCommand())
    attempts = (
        served.runs.CancelRun(v1.CancelRunRequest(name=f"{session}/runs/r1")),
        served.runs.SendCommand(v1.SendCommandRequest(session=session, command=command, run=f"{session}/runs/r1")),
    )
    for attempt in attempts:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await attempt
        assert (refused.value.code(), reason_of(refused.value)) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "RUN_ENDED",
        )


async def test_above_the_cap_a_start_is_refused_with_when_to_try_again(store_url: str) -> None:
    async with running(store_url, max_runs=1) as served:
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="a", agent=v1.Agent(llm=v1.LlmAgent())))
        slow = v1.StartRun(new_session=v1.Session(agent="agents/a"), messages=[said("/pause 10000\n/say never")])
        first = await served.runs.CreateRun(v1.CreateRunRequest(start=slow))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.runs.CreateRun(v1.CreateRunRequest(start=slow))
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_of(refused.value) == "RATE_LIMITED"
        await served.runs.CancelRun(v1.CancelRunRequest(name=first.name))
        again = await served.runs.CreateRun(v1.CreateRunRequest(start=slow))
        await served.runs.CancelRun(v1.CancelRunRequest(name=again.name))


async def test_a_template_over_its_limits_fails_the_run_and_not_the_server(store_url: str) -> None:
    """What only the state makes too large is found when it is rendered: a failed run."""
    async with running(store_url) as served:
        doubling = "{% assign s = seed %}" + "{% assign s = s | append: s %}" * 40 + "{{ s }}"
        looping = "{% for a in (1..1000000000) %}{{ a }}{% endfor %}"
        for name, source in (("doubling", doubling), ("looping", looping)):
            agent = v1.Agent(llm=v1.LlmAgent(instruction=source))
            await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id=name, agent=agent))
            start = v1.StartRun(
                new_session=v1.Session(agent=f"agents/{name}"),
                state={"seed": v1.Value(string_value="x" * 100)},
                messages=[said("Go")],
            )
            failed = await served.runs.Invoke(v1.InvokeRequest(start=start))
            assert failed.run.error.reason == v1.ERROR_REASON_TEMPLATE_ERROR
        assert (await served.info.GetServerInfo(v1.GetServerInfoRequest())).store in {"memory", "sqlite"}


async def test_null_is_a_value(served: Running, session: str) -> None:
    null = v1.Value(null_value=struct_pb2.NULL_VALUE)
    await served.state.PutState(v1.PutStateRequest(name=f"{session}/state", key="k", value=null))
    state = await served.state.GetState(v1.GetStateRequest(name=f"{session}/state"))
    assert state.entries["k"].value == null
