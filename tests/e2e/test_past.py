"""Rewinds, forks, and state as it was: through a real channel, over every store."""

import asyncio
from typing import Any

import grpc
import pytest
from notecase import NotecaseError, SessionView, v1

from tests.e2e.driving import fields_of, kinds, log_of, metadata_of, reason_of, said
from tests.e2e.test_tools import client_tool, result, results_of, start_with
from tests.support.openai_server import OpenAIServer, reply, tool_calls
from tests.support.server import Running

SUPERSEDED, COMPLETED = v1.Message.STATUS_SUPERSEDED, v1.Message.STATUS_COMPLETED


async def turn(served: Running, session: str, text: str = "", **fields: Any) -> v1.InvokeResponse:
    messages = [said(text)] if text else []
    start = v1.StartRun(session=session, messages=messages, **fields)
    return await served.runs.Invoke(v1.InvokeRequest(start=start))


async def texts(served: Running, session: str, superseded: bool = False) -> list[str]:
    request = v1.ListMessagesRequest(parent=session, show_superseded=superseded)
    return [message.parts[0].text for message in (await served.messages.ListMessages(request)).messages]


async def put(served: Running, session: str, key: str, value: int) -> None:
    request = v1.PutStateRequest(name=f"{session}/state", key=key, value=v1.Value(int_value=value))
    await served.state.PutState(request)


async def numbers(served: Running, session: str, at: int = 0) -> dict[str, int]:
    state = await served.state.GetState(v1.GetStateRequest(name=f"{session}/state", at_sequence=at))
    return {key: entry.value.int_value for key, entry in state.entries.items()}


async def rewind(served: Running, session: str, to: int, **fields: Any) -> v1.Session:
    return await served.sessions.RewindSession(v1.RewindSessionRequest(name=session, to_sequence=to, **fields))


async def fork(served: Running, source: str, /, at: int | None = None, **fields: Any) -> v1.Session:
    return await served.sessions.ForkSession(v1.ForkSessionRequest(name=source, at_sequence=at, **fields))


async def view_of(served: Running, session: str) -> SessionView:
    view = SessionView()
    for event in await log_of(served, session):
        assert view.apply(event)
    return view


async def agree(served: Running, session: str) -> SessionView:
    """A view of the log holds what the service answers."""
    view = await view_of(served, session)
    shown = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session, show_superseded=True))
    assert list(shown.messages) == list(view.messages.values())
    runs = (await served.runs.ListRuns(v1.ListRunsRequest(parent=session))).runs
    assert {run.name: run for run in runs} == view.runs
    state = await served.state.GetState(v1.GetStateRequest(name=f"{session}/state"))
    assert {key: entry.value for key, entry in state.entries.items()} == view.state
    return view


async def test_a_rewind_supersedes_messages_and_puts_the_state_back(served: Running, model: OpenAIServer) -> None:
    """In one commit; the first notes, which are event 1, survive a rewind to 1 and not one to 0."""
    first = {"n": v1.Value(int_value=1)}
    session = (await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="s", state=first))).name
    for text in ("one", "two"):
        request = v1.AppendMessagesRequest(parent=session, messages=[said(text)])
        await served.messages.AppendMessages(request)
    await put(served, session, "n", 2)
    await put(served, session, "m", 3)
    rewound = await rewind(served, session, 2, request_id="back")
    assert (await texts(served, session), await texts(served, session, True)) == (["one"], ["one", "two"])
    assert await numbers(served, session) == {"n": 1}
    log = await log_of(served, session)
    assert kinds(log[5:]) == ["rewound", "state_changed"]
    assert {event.cause_id for event in log[5:]} == {"back"}
    assert rewound.last_sequence == log[-1].sequence == 7
    assert await rewind(served, session, 2, request_id="back") == rewound, "a repeat returns the first answer"
    await rewind(served, session, 1)
    assert (await texts(served, session), await numbers(served, session)) == ([], {"n": 1})
    await rewind(served, session, 0)
    assert await numbers(served, session) == {}
    await agree(served, session)


async def test_a_rewind_into_what_was_left_behind_is_refused(served: Running, session: str) -> None:
    for text in ("one", "two", "three"):
        await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=session, messages=[said(text)]))
    await rewind(served, session, 1)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await rewind(served, session, 2)
    assert (reason_of(refused.value), fields_of(refused.value)) == ("INVALID_FIELD", {"to_sequence"})
    assert "fork at it instead" in str(refused.value.details())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await turn(served, session, rewind_to_sequence=3)
    assert fields_of(refused.value) == {"start.rewind_to_sequence"}
    assert await texts(served, (await fork(served, session, 2)).name) == ["one", "two"]
    assert (await rewind(served, session, 4)).last_sequence == 5, "the mark itself is part of the conversation"
    assert (await rewind(served, session, 1)).last_sequence == 6


async def test_a_rewind_needs_a_session_without_an_active_run_and_the_given_head(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(tool_calls(("weigh", "{}")), reply("Light."))
    waiting = (await served.runs.Invoke(v1.InvokeRequest(start=start_with(session, client_tool("weigh"))))).run
    for attempt in (rewind(served, session, 0), turn(served, session, "Anew", rewind_to_sequence=0)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await attempt
        assert (reason_of(refused.value), metadata_of(refused.value)["run"]) == ("RUN_ACTIVE", waiting.name)
    await served.runs.CancelRun(v1.CancelRunRequest(name=waiting.name))
    head = (await served.sessions.GetSession(v1.GetSessionRequest(name=session))).last_sequence
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await rewind(served, session, 0, if_last_sequence=head - 1)
    assert reason_of(refused.value) == "SEQUENCE_MISMATCH"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await rewind(served, session, head + 1)
    assert (reason_of(refused.value), refused.value.code()) == ("SEQUENCE_AHEAD", grpc.StatusCode.OUT_OF_RANGE)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.sessions.RewindSession(v1.RewindSessionRequest(name=session))
    assert fields_of(refused.value) == {"to_sequence"}
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await rewind(served, "sessions/none", 0)
    assert reason_of(refused.value) == "SESSION_NOT_FOUND"
    assert (await log_of(served, session))[-1].sequence == head, "nothing was written"
    assert (await rewind(served, session, 0, if_last_sequence=head)).last_sequence == head + 1


async def test_calls_that_were_open_there_are_cancelled(served: Running, session: str, model: OpenAIServer) -> None:
    """Whatever became of them since; the next request is well formed, and a watcher's view is the service's."""
    model.script(tool_calls(("weigh", "{}"), ("weigh", "{}")), reply("Light."), reply("Unknown."))
    await served.runs.Invoke(v1.InvokeRequest(start=start_with(session, client_tool("weigh"), run_id="r1")))
    calls = (await served.runs.GetRun(v1.GetRunRequest(name=f"{session}/runs/r1"))).pending_calls
    for call in calls:
        command = v1.SendCommandRequest(session=session, command=result(call.call_id, "heavy"))
        await served.runs.SendCommand(command)
    await served.runs.WaitRun(v1.WaitRunRequest(name=f"{session}/runs/r1", after_sequence=100))
    log = await log_of(served, session)
    one_answered = next(event.sequence for event in log if event.HasField("tool_finished"))
    await rewind(served, session, one_answered)
    view = await agree(served, session)
    asked = [message for message in view.messages.values() if message.status == COMPLETED][-1]
    outcomes = [part.tool_call.outcome for part in asked.parts]
    assert outcomes == [v1.ToolCall.OUTCOME_SUCCEEDED, v1.ToolCall.OUTCOME_CANCELLED]
    assert kinds(await log_of(served, session))[-2:] == ["rewound", "tool_finished"]
    assert (await turn(served, session)).reply.parts[0].text == "Unknown."
    answers = results_of(model.requests[2])
    assert answers[0] == "heavy"
    assert "rewound" in answers[1]
    await agree(served, session)


async def test_a_reply_is_generated_again_or_the_question_edited(
    served: Running, session: str, model: OpenAIServer
) -> None:
    """Rewind and start are one commit, and the model is shown what is left."""
    model.script(reply("Once."), reply("Twice."), reply("Thrice."))
    await turn(served, session, "Hello", state={"n": v1.Value(int_value=5)})
    again = await turn(served, session, rewind_to_sequence=3)
    assert again.reply.parts[0].text == "Twice."
    assert model.requests[1]["messages"] == model.requests[0]["messages"]
    log = await log_of(served, session)
    mark = next(event for event in log if event.HasField("rewound"))
    assert [event.create_time for event in log].count(mark.create_time) == 2, "the mark and the start are one commit"
    await turn(served, session, "Good bye", rewind_to_sequence=0)
    assert [message["content"] for message in model.requests[2]["messages"][1:]] == ["Good bye"]
    assert await texts(served, session) == ["Good bye", "Thrice."]
    assert await numbers(served, session) == {}
    for to in (0, 4):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await turn(served, (await fork(served, session, 6)).name, rewind_to_sequence=to)
        assert fields_of(refused.value) == {"start.messages"}, "nothing is left to answer"
    await agree(served, session)


async def test_rewinding_goes_with_no_place_in_a_queue(served: Running, session: str) -> None:
    for wrong in (
        {"session": session, "on_busy": v1.StartRun.ON_BUSY_QUEUE},
        {"session": session, "on_busy": v1.StartRun.ON_BUSY_ROLLBACK},
        {"new_session": v1.Session(agent="agents/clerk")},
    ):
        start = v1.StartRun(messages=[said("Hello")], rewind_to_sequence=0, **wrong)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.runs.CreateRun(v1.CreateRunRequest(start=start))
        assert fields_of(refused.value) == {"start.rewind_to_sequence"}


async def test_an_interrupting_start_rewinds_once_the_run_before_it_has_ended(
    served: Running, session: str, model: OpenAIServer
) -> None:
    model.script(reply("Never.").held(asyncio.Event()), reply("Done."))
    await served.runs.CreateRun(v1.CreateRunRequest(start=start_with(session)))
    await model.request(0)
    interrupts = v1.StartRun.ON_BUSY_INTERRUPT
    assert (await turn(served, session, "Other", on_busy=interrupts, rewind_to_sequence=0)).reply.parts[
        0
    ].text == "Done."
    assert await texts(served, session) == ["Other", "Done."]


async def test_a_rewind_takes_what_others_write_meanwhile(served: Running, session: str) -> None:
    """Unless the caller says what the head is to be, the rewind happens, and everything before its mark is gone."""

    async def write(number: int) -> None:
        await put(served, session, f"k{number}", number)

    await asyncio.gather(*(write(number) for number in range(20)), rewind(served, session, 0))
    log = await log_of(served, session)
    mark = next(event.sequence for event in log if event.HasField("rewound"))
    set_since = {op.key for event in log[mark:] for op in event.state_changed.ops if op.HasField("set")}
    assert (await numbers(served, session)).keys() == set_since
    assert [event.sequence for event in log] == list(range(1, len(log) + 1))


async def test_state_is_read_as_it_was(served: Running, session: str) -> None:
    """With the versions and times of then, in pages whose tokens are good for that sequence only."""
    name = f"{session}/state"
    seen = []
    for number in range(1, 6):
        await put(served, session, f"k{number % 3}", number)
        seen.append(await served.state.GetState(v1.GetStateRequest(name=name)))
    await rewind(served, session, 0)
    for number, expected in enumerate(seen, 1):
        assert await served.state.GetState(v1.GetStateRequest(name=name, at_sequence=number)) == expected
    some = v1.GetStateRequest(name=name, at_sequence=2, keys=["k1", "k0"])
    assert dict((await served.state.GetState(some)).entries) == {"k1": seen[1].entries["k1"]}
    page = await served.state.GetState(v1.GetStateRequest(name=name, at_sequence=5, page_size=2))
    assert sorted(page.entries) == ["k0", "k1"]
    rest = v1.GetStateRequest(name=name, at_sequence=5, page_size=2, page_token=page.next_page_token)
    assert list((await served.state.GetState(rest)).entries) == ["k2"]
    rest.at_sequence = 4
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.state.GetState(rest)
    assert reason_of(refused.value) == "PAGE_TOKEN_INVALID"


async def test_only_a_sessions_state_has_a_past(served: Running, session: str) -> None:
    for name in ("users/ada/state", "app/state"):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.state.GetState(v1.GetStateRequest(name=name, at_sequence=1))
        assert fields_of(refused.value) == {"at_sequence"}
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.state.GetState(v1.GetStateRequest(name=f"{session}/state", at_sequence=1))
    assert (reason_of(refused.value), metadata_of(refused.value)["last_sequence"]) == ("SEQUENCE_AHEAD", "0")


async def test_a_fork_goes_on_by_itself(served: Running, session: str, model: OpenAIServer) -> None:
    """Same sequences, message ids and runs; usage starts at 0; deleting the source does not change it."""
    model.script(reply("Once."), reply("Elsewhere."), reply("Here."))
    await turn(served, session, "Hello", run_id="r1", state={"n": v1.Value(int_value=5)})
    made_of = v1.Session(display_name="Branch")
    made = await fork(served, session, session_id="branch", request_id="f", session=made_of)
    assert (made.parent_session, made.fork_sequence, made.last_sequence) == (session, 6, 6)
    assert (made.display_name, made.agent, made.user) == ("Branch", "agents/clerk", "users/ada")
    assert not made.HasField("usage")
    assert (await served.sessions.GetSession(v1.GetSessionRequest(name=session))).usage.model_calls == 1
    same = v1.ForkSessionRequest(name=session, session_id="branch", request_id="f", session=made_of)
    assert made == await served.sessions.ForkSession(same), "a repeat returns the first answer"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await fork(served, session, session_id="branch")
    assert reason_of(refused.value) == "ALREADY_EXISTS"
    await turn(served, made.name, "More")
    await put(served, session, "n", 6)
    assert [message["content"] for message in model.requests[1]["messages"][1:]] == ["Hello", "Once.", "More"]
    own = await log_of(served, session)
    copied = await log_of(served, made.name)
    assert [_relative(event) for event in copied[:6]] == [_relative(event) for event in own[:6]]
    run = await served.runs.GetRun(v1.GetRunRequest(name="sessions/branch/runs/r1"))
    assert (run.state, run.last_sequence) == (v1.Run.STATE_SUCCEEDED, 6)
    await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=session))
    await agree(served, made.name)
    assert await numbers(served, made.name) == {"n": 5}
    again = await fork(served, made.name, 6)
    await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=made.name))
    assert await texts(served, again.name) == ["Hello", "Once."]


def _relative(event: v1.Event) -> str:
    return str(event).replace("sessions/branch", "").replace("sessions/case", "")


async def test_what_was_under_way_is_ended_in_the_fork(served: Running, session: str, model: OpenAIServer) -> None:
    """Calls sealed, runs cancelled, what was queued dropped; in the source it all goes on."""
    model.script(tool_calls(("weigh", "{}")), reply("Light."), reply("Next."), reply("In the fork."))
    waiting = (await served.runs.Invoke(v1.InvokeRequest(start=start_with(session, client_tool("weigh"))))).run
    more = v1.RunRequest(command_id="more", input=v1.UserInput(messages=[said("And this.")]))
    await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=more))
    queued = v1.CreateRunRequest(start=start_with(session, run_id="later", on_busy=v1.StartRun.ON_BUSY_QUEUE))
    await served.runs.CreateRun(queued)
    made = await fork(served, session)
    assert (made.activity, made.active_run, list(made.queued_commands)) == (v1.Session.ACTIVITY_IDLE, "", [])
    view = await agree(served, made.name)
    assert [run.state for run in view.runs.values()] == [v1.Run.STATE_CANCELLED] * 2
    own = (await log_of(served, made.name))[made.fork_sequence :]
    assert kinds(own) == ["tool_finished", "run_state_changed", "run_state_changed"]
    assert list(own[1].run_state_changed.dropped_commands) == ["more"]
    source = await served.sessions.GetSession(v1.GetSessionRequest(name=session))
    assert (source.active_run, len(source.queued_commands)) == (waiting.name, 2)
    call = waiting.pending_calls[0].call_id
    await served.runs.SendCommand(v1.SendCommandRequest(session=session, command=result(call, "12 g")))
    await served.runs.WaitRun(v1.WaitRunRequest(name=f"{session}/runs/later", after_sequence=1000))
    assert (await turn(served, made.name, "Well?")).reply.parts[0].text == "In the fork."
    then = await fork(served, session, made.fork_sequence)
    later = (await log_of(served, then.name))[then.fork_sequence :]
    assert kinds(later) == kinds(own), "a fork made when all of it had ended is the same"
    assert await agree(served, then.name)


async def test_a_fork_shows_what_was_rewound_later_as_it_was(served: Running, session: str) -> None:
    for text in ("one", "two", "three"):
        await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=session, messages=[said(text)]))
    await rewind(served, session, 1)
    made = await fork(served, session, 3)
    assert await texts(served, made.name) == ["one", "two", "three"]
    await agree(served, made.name)
    assert await texts(served, (await fork(served, session)).name) == ["one"]
    assert (await fork(served, session, 0)).last_sequence == 0


async def test_a_fork_refuses_what_it_cannot_be(served: Running, session: str) -> None:
    for reason, request in (
        ("SEQUENCE_AHEAD", v1.ForkSessionRequest(name=session, at_sequence=1)),
        ("SESSION_NOT_FOUND", v1.ForkSessionRequest(name="sessions/none")),
        ("AGENT_NOT_FOUND", v1.ForkSessionRequest(name=session, session=v1.Session(agent="agents/none"))),
        ("INVALID_FIELD", v1.ForkSessionRequest(name=session, session=v1.Session(user="users/bob"))),
        ("INVALID_FIELD", v1.ForkSessionRequest(name=session, at_sequence=-1)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.sessions.ForkSession(request)
        assert reason_of(refused.value) == reason


async def test_a_watcher_sees_a_rewind(served: Running, session: str) -> None:
    """Live and from the log: a watcher's view equals that of a later reader."""
    options = v1.WatchOptions(keep_open=True)
    watch = served.runs.WatchEvents(v1.WatchEventsRequest(name=session, after_sequence=0, options=options))
    view = SessionView()
    await put(served, session, "n", 1)
    await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=session, messages=[said("one")]))
    head = (await rewind(served, session, 1)).last_sequence
    async for frame in watch:
        for event in frame.batch.events:
            view.apply(event)
        if view.last_sequence == head:
            break
    assert view == await view_of(served, session)


async def test_the_client_goes_back_and_branches_off(served: Running, session: str, model: OpenAIServer) -> None:
    model.script(reply("Once."), reply("Twice."))
    async with served.client() as client:
        await client.invoke("Hello", session=session, state={"n": 1})
        assert (await client.invoke(session=session, rewind_to=3)).text == "Twice."
        branch = await client.fork(session, 3, session_id="branch")
        assert (branch.name, branch.fork_sequence) == ("sessions/branch", 3)
        await client.rewind(session, 0)
        assert await client.get_state(session) == {}
        assert await client.get_state(session, at_sequence=3) == {"n": 1}
        with pytest.raises(NotecaseError, match="fork at it instead"):
            await client.rewind(session, 3)
