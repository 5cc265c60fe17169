"""The log of a run: each commit is decided on what is known, made once, and followed by what it leads to."""

import asyncio

import pytest
from notecase import from_value, v1
from notecase_server.engine import ledger
from notecase_server.engine.run_log import RUNNING, WAITING, RunLog, taken
from notecase_server.engine.session import ASKS
from notecase_server.store.contract import SessionKey, Store
from notecase_server.tools.contract import Outcome

from tests.engine.rooms import House, client_tool, house, kinds
from tests.store.build import ManualClock, increment, refused
from tests.support.failing import Failing, Mode
from tests.support.work import instructions


async def called(rooms: House) -> tuple[SessionKey, RunLog, v1.ToolCall]:
    """A run that waits for its caller."""
    (key,) = await rooms.prepare(tools=[client_tool("look")])
    log = await rooms.run_log(key)
    (call,) = await rooms.call(log, "look")
    return key, log, call


def found(call: v1.ToolCall) -> v1.Event:
    return ledger.finished(call, Outcome([v1.Part(text="Found.")]))


async def test_a_run_waits_and_goes_on_in_the_commit_that_makes_it_so(store: Store, clock: ManualClock) -> None:
    async with house(store, clock) as rooms:
        key, log, call = await called(rooms)
        assert WAITING == log.run.state
        assert ["message_added", "tool_started", "run_state_changed"] == kinds(await rooms.log(key))[-3:]
        committed = await log.command([found(call)])
        assert ["tool_finished", "run_state_changed"] == kinds(committed.events)
        assert (RUNNING, []) == (log.run.state, log.open)


async def test_what_many_decide_at_once_is_decided_one_after_the_other(store: Store, clock: ManualClock) -> None:
    async with house(store, clock) as rooms:
        key, log, _ = await called(rooms)
        made = await asyncio.gather(*(log.durably(lambda: [found(call) for call in log.open]) for _ in range(5)))
        assert 4 == made.count(None)
        assert 1 == kinds(await rooms.log(key)).count("tool_finished")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("mode", [Mode.PASSING, Mode.AFTER])
async def test_a_commit_of_a_store_that_is_away_is_made_once(store: Store, clock: ManualClock, mode: Mode) -> None:
    """Whether it was made before the store went away or not; meanwhile it cannot say."""
    silent = Failing(store, "find_commit", Mode.PASSING, times=2 * ASKS)
    failing = Failing(silent.store, "commit", mode, counts=lambda commit: "state_changed" in kinds(commit.events))
    async with asyncio.timeout(60), house(failing.store, clock) as rooms:
        (key,) = await rooms.prepare()
        log = await rooms.run_log(key)
        await log.durably(lambda: [v1.Event(state_changed=v1.StateChanged(ops=[increment("n", 1)]))])
        assert 1 == from_value((await store.get_state(key.state, ["n"])).entries["n"].value)
        assert log.session.last_sequence == len(await rooms.log(key))


async def test_a_run_of_another_owner_is_left_alone(store: Store, clock: ManualClock) -> None:
    async with house(store, clock) as rooms:
        key, log, call = await called(rooms)
        before = await rooms.log(key)
        await store.claim(key, log.epoch)
        with refused("OWNER_LOST"):
            await log.durably(lambda: [found(call)])
        assert before == await rooms.log(key)


async def test_what_users_said_is_taken_up_in_order_or_named_at_the_end(store: Store, clock: ManualClock) -> None:
    async with house(store, clock) as rooms:
        (key,) = await rooms.prepare()
        log = await rooms.run_log(key)
        for name, when in (("a", v1.UserInput.WHEN_FOLLOW_UP), ("b", v1.UserInput.WHEN_STEER)):
            event = v1.Event(cause_id=name)
            event.command_queued.input.when = when
            event.command_queued.input.messages.add(name=f"m-{name}", role=v1.Message.ROLE_USER)
            await log.command([event])
        assert ["b"] == [event.cause_id for event in log.queued(v1.UserInput.WHEN_STEER)]
        assert ["a", "b"] == [event.cause_id for event in log.queued(v1.UserInput.WHEN_FOLLOW_UP)]
        await log.durably(lambda: taken(log.queued(v1.UserInput.WHEN_STEER)))
        await log.durably(lambda: [log.ending(v1.Run.STATE_CANCELLED)])
        assert ["a"] == (await rooms.log(key))[-1].run_state_changed.dropped_commands
        assert log.ended


async def test_a_thousand_approvals_are_denied_in_time_that_grows_with_their_number(
    store: Store, clock: ManualClock
) -> None:
    """Nobody else is served while it is found out whether the run then goes on."""
    async with house(store, clock) as rooms:
        (key,) = await rooms.prepare()
        log = await rooms.run_log(key)

        def taken(number: int) -> int:
            log.message = v1.Message()
            del log.run.pending_inputs[:]
            for n in range(number):
                call = v1.ToolCall(call_id=f"c{n}", outcome=v1.ToolCall.OUTCOME_PENDING)
                log.message.parts.add(tool_call=call)
                log.run.pending_inputs.add(input_id=f"i{n}", kind=v1.InputRequest.KIND_APPROVAL, call=call)
            denied = ledger.withdrawn(log.run, log.message, "No.", deny=True)
            return instructions(lambda: log.consequence(denied))

        assert taken(160) < 6 * taken(40)
