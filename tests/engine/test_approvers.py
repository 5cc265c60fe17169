"""Approvals that a run requests during or after input from a caller who may not answer them."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from notecase import v1
from notecase_server.engine import ledger
from notecase_server.engine.caused import Caused
from notecase_server.engine.halt import Halt
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import Call, Delta, Finish, ModelRequest
from notecase_server.store.contract import Store

from tests.engine.rooms import Model, client_tool, house, new_id
from tests.store.build import ManualClock

USER, ANYBODY, DEVELOPER, ADMIN = (
    v1.Tool.APPROVER_USER,
    v1.Tool.APPROVER_UNSPECIFIED,
    v1.Tool.APPROVER_DEVELOPER,
    v1.Tool.APPROVER_ADMIN,
)
WAITING, SUCCEEDED = v1.Run.STATE_WAITING, v1.Run.STATE_SUCCEEDED
APPROVE, DENY = v1.InputResponse.DECISION_APPROVE, v1.InputResponse.DECISION_DENY
HEARD = v1.UserInput(messages=[v1.Message(parts=[v1.Part(text="Heard?")])])


class Pays(Model):
    """Calls pay once it is let, and then says something."""

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        if self.asked:
            async for delta in super().stream(request):
                yield delta
            return
        self.asked.append("first")
        self.arrived.release()
        await self.let.wait()
        yield Call(0, "pay", "{}")
        yield Finish("tool_calls", v1.Usage())


@pytest.mark.parametrize("sender", [USER, ADMIN])
async def test_what_was_said_during_a_reply_denies_what_its_sender_may_answer(
    store: Store, clock: ManualClock, sender: v1.Tool.Approver.ValueType
) -> None:
    """And waits behind what it may not answer."""
    model = Pays()
    async with asyncio.timeout(60), house(store, clock, model) as rooms:
        (key,) = await rooms.prepare(tools=[client_tool("pay", requires_approval=True)])
        await rooms.start(key, "Go")
        await model.arrived.acquire()
        await rooms.runs.commands.say(key, "r", HEARD, Caused("said"), sender)
        model.let.set()
        if sender == USER:
            run = await rooms.rests(key)
            assert WAITING == run.state
            response = v1.InputResponse(input_id=run.pending_inputs[0].input_id, decision=APPROVE)
            await rooms.runs.commands.respond(key, "r", response, Caused(), ANYBODY)
            result = v1.ToolResult(call_id=run.pending_inputs[0].call.call_id)
            await rooms.runs.commands.tool_result(key, "r", result, Caused())
        assert SUCCEEDED == (await rooms.ended(key)).state
        resolved = [event.input_resolved for event in await rooms.log(key) if event.HasField("input_resolved")]
        assert [APPROVE if sender == USER else DENY] == [each.response.decision for each in resolved]
        assert ["first", "Heard?"] == model.asked


@pytest.mark.parametrize("queued", [False, True])
async def test_the_reason_for_a_denial_is_how_the_message_begins(
    store: Store, clock: ManualClock, queued: bool
) -> None:
    """Whether it was said while the run waited for people alone, or for a client's tool too."""
    long = v1.UserInput(messages=[v1.Message(parts=[v1.Part(text="ä" * 100_000)] * 4)])
    async with asyncio.timeout(60), house(store, clock, Model()) as rooms:
        (key,) = await rooms.prepare(tools=[client_tool("pay", requires_approval=True), client_tool("look")])
        await rooms.start(key, "call pay pay pay" + (" look" if queued else ""))
        run = await rooms.rests(key)
        await rooms.runs.commands.say(key, "r", long, Caused(), ADMIN)
        for call in run.pending_calls:
            await rooms.runs.commands.tool_result(key, "r", v1.ToolResult(call_id=call.call_id), Caused())
        assert SUCCEEDED == (await rooms.ended(key)).state
        log = await rooms.log(key)
        denied = [event.tool_finished for event in log if event.tool_finished.outcome == v1.ToolCall.OUTCOME_DENIED]
        reasons = [call.error for call in denied]
        reasons += [event.input_resolved.response.reason for event in log if event.HasField("input_resolved")]
        assert 6 == len(reasons)
        assert {"ä" * 510 + "…"} == set(reasons)


def test_the_reason_of_each_call_is_bounded_however_it_ends() -> None:
    long, call = "ä" * 2000, v1.ToolCall(call_id="c", outcome=v1.ToolCall.OUTCOME_PENDING)
    approval, lost = v1.InputRequest.KIND_APPROVAL, v1.InputRequest.KIND_INTERRUPTED_CALL
    said_no = v1.InputResponse(decision=DENY, reason=long)
    message = v1.Message(parts=[v1.Part(tool_call=call)])
    for run in (v1.Run(), v1.Run(pending_inputs=[v1.InputRequest(kind=approval, call=call)])):
        for events in (ledger.sealed(run, message, long), ledger.dropped(run, call, long)):
            assert all(len(event.input_resolved.response.reason.encode()) <= 1024 for event in events)
            assert 1023 == len(events[-1].tool_finished.error.encode())
    for kind in (approval, lost):
        resolved, ended = ledger.answered(v1.InputRequest(kind=kind, call=call), said_no, call)
        assert long == resolved.input_resolved.response.reason, "the person's own words are on record"
        assert 1023 == len(ended.tool_finished.error.encode())
    assert "x" * 1024 == ledger.brief("x" * 1024)


async def test_an_interrupt_does_not_withdraw_an_approval_that_was_requested_meanwhile(
    store: Store, clock: ManualClock
) -> None:
    """As when the reply that asks is committed between the command and its effect."""
    async with asyncio.timeout(60), house(store, clock) as rooms:
        (key,) = await rooms.prepare(tools=[client_tool("pay", requires_approval=True)])
        await rooms.start(key, "/call pay")
        run = await rooms.rests(key)
        async with rooms.runs.roster.worker(key, "r", Caused()) as worker:
            message = v1.Message(name=new_id(), role=v1.Message.ROLE_USER, parts=HEARD.messages[0].parts)
            halt = Halt(said=[v1.Event(message_added=message)], by=USER)
            rooms.runs.roster.halt(worker, halt)
        with pytest.raises(NotecaseError) as refused:
            await halt.done
        assert v1.ERROR_REASON_ROLE_MISSING == refused.value.reason
        assert run == await rooms.rests(key)


def test_an_interrupted_call_is_asked_about_as_its_tool_names_an_approver() -> None:
    call = v1.ToolCall(call_id="c", tool="pay")
    for approver in (USER, ANYBODY, DEVELOPER, ADMIN):
        tool = v1.Tool(name="pay", approver=approver)
        (event,) = ledger.interrupted([call], lambda _, tool=tool: tool, new_id, lambda _: None)  # type: ignore[misc]
        asked = event.input_requested
        assert (v1.InputRequest.KIND_INTERRUPTED_CALL, approver) == (asked.kind, asked.approver)
        refused = ledger.refusal([asked], USER, "input_response.input_id")
        assert (refused is None) == (approver == USER)
