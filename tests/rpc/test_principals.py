"""Principals: every event that a caller caused names its principal, and other events name none."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
from notecase import v1
from notecase_server.auth.principal import Role
from notecase_server.engine import transfer
from notecase_server.serve import now
from notecase_server.serve_stores import open_store
from notecase_server.store.contract import Store

from tests.e2e.driving import durable, kinds, reason_of, said
from tests.support.callers import ByWord, Words, who, word
from tests.support.server import Running, running

ADMIN = word(who(Role.ADMIN))
DEVELOPER = word(who(Role.DEVELOPER))
CLERK, BOSS = word(who(Role.USER, subject="clerk")), word(who(Role.USER, subject="boss"))
ADA = word(who(Role.USER, subject="ada-phone", user="ada"))
EVE = word(who(Role.USER, subject="eve-phone", user="eve"))
CASE = "sessions/case"


@pytest.fixture(params=["memory", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory:" if request.param == "memory" else f"sqlite:{tmp_path / 'notecase.db'}"


@pytest.fixture
async def served(url: str) -> AsyncIterator[Running]:
    """With an agent that asks before it pays, and a session of the clerk's."""
    async with running(url, authenticators=[ByWord()]) as made:
        tools = [v1.Tool(name="pay", client=v1.ClientTool(), requires_approval=True)]
        agent = v1.CreateAgentRequest(agent_id="payer", agent=v1.Agent(llm=v1.LlmAgent(tools=tools)))
        await made.agents.CreateAgent(agent, metadata=ADMIN)
        await begin(made, CLERK, "case")
        yield made


async def begin(served: Running, by: Words, session_id: str) -> None:
    request = v1.CreateSessionRequest(session_id=session_id, session=v1.Session(agent="agents/payer"))
    request.state["note"].string_value = "first"
    await served.sessions.CreateSession(request, metadata=by)


async def run(served: Running, by: Words, text: str, run_id: str = "", **fields: Any) -> v1.Run:
    start = v1.StartRun(session=CASE, run_id=run_id, messages=[said(text)], **fields)
    return await served.runs.CreateRun(v1.CreateRunRequest(start=start), metadata=by)


async def rests(served: Running, made: v1.Run) -> v1.Run:
    return await served.runs.WaitRun(v1.WaitRunRequest(name=made.name), metadata=ADMIN)


async def send(served: Running, by: Words, **command: Any) -> v1.CommandResult:
    request = v1.SendCommandRequest(session=CASE, command=v1.RunRequest(**command))
    return (await served.runs.SendCommand(request, metadata=by)).result


async def log(served: Running, session: str = CASE) -> list[v1.Event]:
    watch = v1.WatchEventsRequest(name=session, after_sequence=0)
    return durable([frame async for frame in served.runs.WatchEvents(watch, metadata=ADMIN)])


async def name(served: Running, event: v1.Event, by: Words = DEVELOPER) -> v1.Principal:
    return await served.audit.GetPrincipal(v1.GetPrincipalRequest(name=event.principal), metadata=by)


async def told(served: Running, events: list[v1.Event]) -> list[tuple[str, str]]:
    """Each event's kind, with the subject that caused it."""
    subjects = [(await name(served, event)).subject if event.principal else "" for event in events]
    return list(zip(kinds(events), subjects, strict=True))


async def refusal(call: Awaitable[Any]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return reason_of(refused.value)


async def test_the_log_says_who_asked_and_who_approved(served: Running) -> None:
    waiting = await rests(served, await run(served, CLERK, "/call pay {}"))
    (asked,) = waiting.pending_inputs
    response = v1.InputResponse(input_id=asked.input_id, decision=v1.InputResponse.DECISION_APPROVE)
    await send(served, BOSS, input_response=response)
    result = v1.ToolResult(call_id=asked.call.call_id, result=[v1.Part(text="paid")])
    await send(served, CLERK, tool_result=result)
    await rests(served, waiting)
    assert [
        ("state_changed", "clerk"),
        ("run_started", "clerk"),
        ("message_added", "clerk"),
        ("message_added", ""),
        ("usage", ""),
        ("input_requested", ""),
        ("run_state_changed", ""),
        ("input_resolved", "boss"),
        ("tool_started", "boss"),
        ("tool_finished", "clerk"),
        ("run_state_changed", "clerk"),
        ("message_added", ""),
        ("usage", ""),
        ("run_state_changed", ""),
    ] == await told(served, await log(served))


async def test_every_way_to_write_a_log_names_its_caller(served: Running) -> None:
    add = v1.AppendMessagesRequest(parent=CASE, messages=[said("By the way.")])
    await served.messages.AppendMessages(add, metadata=BOSS)
    op = v1.StateOp(key="note", set=v1.Value(string_value="changed"))
    await served.state.UpdateState(v1.UpdateStateRequest(name=f"{CASE}/state", ops=[op]), metadata=BOSS)
    await send(served, BOSS, update_state=v1.StateUpdate(ops=[op]))
    rewind = v1.RewindSessionRequest(name=CASE, to_sequence=2)
    await served.sessions.RewindSession(rewind, metadata=CLERK)
    start = v1.StartRun(session=CASE, run_id="never", messages=[said("Hi.")])
    cancel = v1.CancelRunRequest(name=f"{CASE}/runs/never", allow_missing=True)
    await served.runs.CancelRun(cancel, metadata=BOSS)
    assert "RUN_CANCELLED_BEFORE_START" == await refusal(
        served.runs.CreateRun(v1.CreateRunRequest(start=start), metadata=CLERK)
    )
    for text in ("/say one", "/say two", "/say three"):
        await rests(served, await run(served, CLERK, text))
    compact = v1.CompactSessionRequest(name=CASE, keep_recent=1)
    await served.sessions.CompactSession(compact, metadata=BOSS)
    written = await told(served, await log(served))
    assert [
        ("state_changed", "clerk"),
        ("message_added", "boss"),
        ("state_changed", "boss"),
        ("state_changed", "boss"),
        ("rewound", "clerk"),
        ("state_changed", "clerk"),
        ("run_state_changed", "boss"),
    ] == written[:7]
    assert ("summarized", "boss") in written


async def test_the_events_name_who_stops_a_run_and_who_starts_the_next(served: Running) -> None:
    await rests(served, await run(served, CLERK, "/call pay {}", "first"))
    await rests(served, await run(served, BOSS, "/call pay {}", "second", on_busy=v1.StartRun.ON_BUSY_INTERRUPT))
    await send(served, CLERK, cancel=v1.CancelCommand(reason="Enough."))
    events = await told(served, await log(served))
    ends = [subject for kind, subject in events if kind == "tool_finished"]
    assert ["boss", "clerk"] == ends
    assert ["clerk", "boss"] == [subject for kind, subject in events if kind == "run_started"]


async def test_what_was_queued_names_its_caller_when_it_is_taken_up(served: Running) -> None:
    """Who lets it go on is another."""
    first = await rests(served, await run(served, CLERK, "/call pay {}", "first"))
    (asked,) = first.pending_inputs
    queued = await run(served, BOSS, "/say next", "second", on_busy=v1.StartRun.ON_BUSY_QUEUE)
    response = v1.InputResponse(input_id=asked.input_id, decision=v1.InputResponse.DECISION_APPROVE)
    await send(served, CLERK, input_response=response)
    steer = v1.UserInput(when=v1.UserInput.WHEN_STEER, messages=[said("Hurry.")])
    assert v1.CommandResult.DISPOSITION_QUEUED == (await send(served, BOSS, input=steer)).disposition
    result = v1.ToolResult(call_id=asked.call.call_id, result=[v1.Part(text="paid")])
    await send(served, CLERK, tool_result=result)
    await rests(served, queued)
    events = await log(served)
    named = dict[str, str]()
    for event, (kind, subject) in zip(events, await told(served, events), strict=True):
        if kind == "message_added" and event.message_added.role == v1.Message.ROLE_USER:
            named[event.message_added.parts[0].text] = subject
        elif kind == "run_started":
            named[event.run.rpartition("/")[2]] = subject
    assert {"/call pay {}": "clerk", "Hurry.": "boss", "/say next": "boss", "first": "clerk", "second": "boss"} == named


async def test_a_deadline_has_no_principal(served: Running) -> None:
    limits = v1.Limits()
    limits.input_timeout.FromMilliseconds(1)
    made = await run(served, CLERK, "/call pay {}", limits=limits)
    watch = v1.WatchEventsRequest(name=made.name, after_sequence=0)
    async for frame in served.runs.WatchEvents(watch, metadata=ADMIN):
        if any(event.HasField("input_resolved") for event in frame.batch.events):
            break
    assert [""] == [event.principal for event in await log(served) if event.HasField("input_resolved")]


async def test_a_fork_keeps_principals_and_an_exported_file_has_none(served: Running) -> None:
    await rests(served, await run(served, CLERK, "/say done"))
    events = await log(served)
    await served.sessions.ForkSession(v1.ForkSessionRequest(name=CASE, session_id="fork"), metadata=BOSS)
    assert [event.principal for event in events] == [event.principal for event in await log(served, "sessions/fork")]
    export = served.sessions.ExportSession(v1.ExportSessionRequest(name=CASE), metadata=DEVELOPER)
    file = b"".join([response.chunk async for response in export])
    assert b"principals/" not in file
    frames = [
        v1.ImportSessionRequest(header=v1.ImportHeader(session_id="copy")),
        v1.ImportSessionRequest(chunk=file),
    ]
    await served.sessions.ImportSession(iter(frames), metadata=DEVELOPER)
    copied = await log(served, "sessions/copy")
    assert (len(events), {""}) == (len(copied), {event.principal for event in copied})


async def test_a_file_that_tells_who_did_it_is_not_believed(served: Running) -> None:
    op = v1.StateOp(key="note", set=v1.Value(string_value="first"))
    change = v1.StateChanged(ops=[op], version=1)
    event = v1.Event(sequence=1, principal="principals/forged", state_changed=change)
    event.create_time.GetCurrentTime()
    records = [v1.ExportRecord(header=v1.ExportHeader()), v1.ExportRecord(event=event)]
    body = transfer.MAGIC + bytes([transfer.VERSION]) + b"".join(map(transfer._framed, records)) + b"\0"
    frames = [
        v1.ImportSessionRequest(header=v1.ImportHeader(session_id="forged")),
        v1.ImportSessionRequest(chunk=body + hashlib.sha256(body).digest()),
    ]
    await served.sessions.ImportSession(iter(frames), metadata=DEVELOPER)
    assert [("state_changed", "")] == await told(served, await log(served, "sessions/forged"))


async def test_a_fork_that_cancels_calls_says_who_forked(served: Running) -> None:
    await rests(served, await run(served, CLERK, "/call pay {}"))
    await served.sessions.ForkSession(v1.ForkSessionRequest(name=CASE, session_id="fork"), metadata=BOSS)
    told_of = await told(served, await log(served, "sessions/fork"))
    assert ("tool_finished", "boss") in told_of


async def test_a_callers_row_says_whose_credential_it_was(served: Running) -> None:
    (event,) = await log(served)
    found = await name(served, event)
    assert event.principal == found.name
    assert ("clerk", v1.Key.ROLE_USER, "") == (found.subject, found.role, found.user)
    assert found.HasField("create_time")
    other = word(who(Role.ADMIN, tenant="other"))
    assert "PRINCIPAL_NOT_FOUND" == await refusal(name(served, event, other))
    assert "ROLE_MISSING" == await refusal(name(served, event, CLERK))


async def test_a_bound_caller_finds_its_own_principals_only(served: Running) -> None:
    await begin(served, ADA, "hers")
    (hers,), (others,) = await log(served, "sessions/hers"), await log(served)
    found = await name(served, hers, ADA)
    assert ("ada-phone", "users/ada") == (found.subject, found.user)
    assert "PRINCIPAL_NOT_FOUND" == await refusal(name(served, others, ADA))
    assert "PRINCIPAL_NOT_FOUND" == await refusal(name(served, hers, EVE))


async def test_erasing_a_user_leaves_an_id_that_leads_to_nothing(served: Running) -> None:
    """What the user did in sessions of others stays, without a name. Who calls again is another principal."""
    await begin(served, ADA, "hers")
    (before,) = await log(served, "sessions/hers")
    await served.sessions.EraseUser(v1.EraseUserRequest(name="users/ada"), metadata=ADMIN)
    assert "PRINCIPAL_NOT_FOUND" == await refusal(name(served, before))
    await begin(served, ADA, "hers")
    (after,) = await log(served, "sessions/hers")
    assert before.principal != after.principal
    assert "ada-phone" == (await name(served, after)).subject
    assert "clerk" == (await name(served, (await log(served))[0])).subject


async def test_a_caller_without_credentials_has_no_principal(url: str) -> None:
    async with running(url, authenticators=()) as served:
        request = v1.CreateSessionRequest(session_id="case")
        request.state["note"].string_value = "first"
        await served.sessions.CreateSession(request)
        watch = served.runs.WatchEvents(v1.WatchEventsRequest(name=CASE, after_sequence=0))
        assert [""] == [event.principal for event in durable([frame async for frame in watch])]


async def test_a_principal_costs_the_store_one_write(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await open_store(url, now)
    made = list[str]()
    know = store.know_principal

    async def counted(tenant: str, principal: v1.Principal) -> v1.Principal:
        made.append(principal.subject)
        return await know(tenant, principal)

    monkeypatch.setattr(store, "know_principal", counted)
    async with running(store, authenticators=[ByWord()]) as served:
        for number in range(3):
            request = v1.CreateSessionRequest(session_id=f"case-{number}")
            await served.sessions.CreateSession(request, metadata=CLERK)
        look = v1.ListSessionsRequest()
        await served.sessions.ListSessions(look, metadata=BOSS)
    assert ["clerk"] == made


async def test_the_same_caller_is_one_principal_however_often_it_begins(url: str) -> None:
    store: Store = await open_store(url, now)
    async with running(store, authenticators=[ByWord()]) as served:
        new = [v1.CreateSessionRequest(session_id=f"case-{number}") for number in range(20)]
        for request in new:
            request.state["note"].string_value = "first"
        await asyncio.gather(*(served.sessions.CreateSession(request, metadata=CLERK) for request in new))
        logs = [await log(served, f"sessions/{request.session_id}") for request in new]
        assert 1 == len({event.principal for events in logs for event in events})
