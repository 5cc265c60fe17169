"""A turn of a model: one reply, left in the draft, within what the run may spend."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from notecase import v1
from notecase_server import errors
from notecase_server.engine.asking import Budget
from notecase_server.engine.context import KEYS_AT_ONCE, _named
from notecase_server.engine.halt import Halt, Halted, Halts
from notecase_server.engine.model_turn import ModelTurn, Tools, bind
from notecase_server.engine.run_log import RunLog
from notecase_server.models.contract import Delta, Finish, ModelRequest, Text
from notecase_server.store.contract import Store
from notecase_server.store.memory import MemoryStore
from notecase_server.tools.contract import Function

from tests.engine.rooms import House, Model, client_tool, house, kinds
from tests.store.build import APP_STATE, ManualClock, put, refused
from tests.support.time import in_no_time


class Broken:
    """Breaks off after the first piece the given number of times, and then replies completely."""

    def __init__(self, breaks: int) -> None:
        self.breaks = breaks
        self.drafts: list[str] = []
        """What the run's draft was called at each request."""
        self.log: RunLog | None = None

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        assert self.log is not None
        assert self.log.draft is not None
        self.drafts.append(self.log.draft.name)
        yield Text("Half")
        if len(self.drafts) <= self.breaks:
            raise errors.model_unavailable("It broke off.")
        yield Text(" and whole.")
        yield Finish("stop", v1.Usage(input_tokens=3, output_tokens=2, model_calls=1))

    async def close(self) -> None:
        pass


async def turn(rooms: House, **llm: object) -> tuple[RunLog, Halts, ModelTurn]:
    (key,) = await rooms.prepare(**llm)
    log = await rooms.run_log(key)
    halts = Halts()
    return log, halts, ModelTurn(log, halts, Budget(log.run, log.agent), await bind(log, halts))


async def test_a_reply_is_left_in_the_draft_for_the_commit_that_keeps_it(store: Store, clock: ManualClock) -> None:
    async with house(store, clock, Model()) as rooms:
        log, _, one = await turn(rooms)
        reply = await one.reply()
        assert ("Done.", v1.Message.STATUS_COMPLETED) == (reply.message.parts[0].text, reply.message.status)
        assert log.draft is not None
        assert reply.message.name == log.draft.name
        assert ["run_started", "message_added"] == kinds(await rooms.log(log.live.key))


def test_a_reply_that_broke_off_is_requested_again_under_another_name() -> None:
    async def twice() -> None:
        clock, model = ManualClock(), Broken(1)
        async with house(MemoryStore(clock), clock, model) as rooms:
            model.log, _, one = await turn(rooms)
            reply = await one.reply()
            assert 2 == len(set(model.drafts))
            assert (model.drafts[1], "Half and whole.") == (reply.message.name, reply.message.parts[0].text)

    in_no_time(twice())


def test_a_model_that_breaks_off_each_time_fails_typed_and_counts_as_asked() -> None:
    async def thrice() -> None:
        clock, model = ManualClock(), Broken(99)
        async with house(MemoryStore(clock), clock, model) as rooms:
            (key,) = await rooms.prepare()
            model.log = await rooms.run_log(key)
            budget = Budget(model.log.run, model.log.agent)
            before = budget.left
            with refused("MODEL_UNAVAILABLE"):
                await ModelTurn(model.log, Halts(), budget, await bind(model.log, Halts())).reply()
            assert (3, 3) == (len(model.drafts), before - budget.left)

    in_no_time(thrice())


async def test_a_halt_cuts_the_model_and_leaves_what_came(store: Store, clock: ManualClock) -> None:
    model = Model()
    async with house(store, clock, model) as rooms:
        (key,) = await rooms.prepare()
        log, halts = await rooms.run_log(key, "r"), Halts()
        event = v1.Event(cause_id="c")
        event.command_queued.input.when = v1.UserInput.WHEN_STEER
        event.command_queued.input.messages.add(name="m", role=v1.Message.ROLE_USER).parts.add(text="hold on")
        await log.command([event])
        asking = asyncio.create_task(ModelTurn(log, halts, Budget(log.run, log.agent), await bind(log, halts)).reply())
        await model.arrived.acquire()
        assert ["hold on"] == model.asked  # what steers is taken up before the model is asked
        halts.add(Halt())
        with pytest.raises(Halted):
            await asking
        assert log.draft is not None


async def test_a_run_makes_no_more_model_calls_than_it_may(store: Store, clock: ManualClock) -> None:
    model = Model()
    async with house(store, clock, model) as rooms:
        log, _, one = await turn(rooms, max_model_calls=1)
        await one.reply()
        log.live.discard(log.step)
        with refused("LIMIT_EXCEEDED"):
            await one.reply()
        assert 1 == len(model.asked)


async def test_what_a_model_may_call_is_what_the_agent_declares(store: Store, clock: ManualClock) -> None:
    """With two of one name, nothing: the one left out may be the one that needs approval."""
    async with house(store, clock, Model()) as rooms:
        (key,) = await rooms.prepare(tools=[client_tool("look")])
        assert ["look"] == list(await bind(await rooms.run_log(key), Halts()))
        log = await rooms.run_log(await rooms.make("t"), client_tools=[client_tool("look")])
        with refused("TOOL_ERROR"):
            await bind(log, Halts())


async def test_the_values_that_an_instruction_names_are_of_one_version(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read a few at a time, and one batch may change them all between two reads."""
    names = [f"k{number:02}" for number in range(KEYS_AT_ONCE + 4)]
    scope, read = APP_STATE, store.get_state
    await store.update_state(scope, [put(name, "old") for name in names], None)
    changed = list[str]()

    async def disturbed(*arguments: Any) -> v1.State:
        found = await read(*arguments)
        if not changed:
            changed.append("new")
            await store.update_state(scope, [put(name, "new") for name in names], None)
        return found

    monkeypatch.setattr(store, "get_state", disturbed)
    state = await _named(store, scope, names)
    assert {"new"} == {entry.value.string_value for entry in state.entries.values()}


async def test_the_values_that_an_instruction_names_are_bounded_together(store: Store, clock: ManualClock) -> None:
    """However little of them it shows: they are all read."""
    names = [f"k{number}" for number in range(KEYS_AT_ONCE + 4)]
    instruction = "".join(f"{{% if {name} == 'x' %}}{name} {{% endif %}}" for name in names)
    large = v1.Value(string_value="x" * 900_000)
    async with house(store, clock, Model()) as rooms:
        log, _, one = await turn(rooms, instruction=instruction)
        for name in names[:-1]:
            await store.update_state(log.live.key.state, [v1.StateOp(key=name, set=large)], None)
        await store.update_state(log.live.key.state, [put(names[-1], "x")], None)
        with refused("TEMPLATE_ERROR"):
            await one.reply()
        for name in names[3:-1]:
            await store.update_state(log.live.key.state, [put(name, "x")], None)
        await one.reply()


async def test_an_mcp_server_that_cannot_be_asked_again_keeps_its_tools() -> None:
    """When another one of the run says that its tools have changed; what is missing is recorded once."""
    recorded: list[v1.Event] = []
    gone = {"down"}

    class Box:
        grown = 0

        def changes(self, servers: Iterable[str]) -> int:
            return self.grown if "grows" in servers else 0

        async def resolve(self, tool: v1.Tool) -> list[Function]:
            name = tool.mcp.server
            if name in gone:
                raise errors.tool_error(f"{name} cannot be reached.")
            names = [name, f"{name}-{self.grown}"] if name == "grows" else [name]
            of = [v1.ToolBinding(mcp=v1.McpBinding(server=name, tool=each)) for each in names]
            return [Function(binding.mcp.tool, "", "{}", binding) for binding in of]

    async def durably(events: Callable[[], list[v1.Event]]) -> None:
        recorded.extend(events())

    async def cut(work: Awaitable[Any]) -> Any:
        return await work

    box = Box()
    servers = [v1.McpTool(server="down"), v1.McpTool(server="grows"), v1.McpTool(server="up", required=True)]
    agent = v1.Agent(llm=v1.LlmAgent(tools=[v1.Tool(mcp=server) for server in servers]))
    run_log: Any = SimpleNamespace(
        services=SimpleNamespace(toolbox=box), agent=agent, run=v1.Run(), durably=durably, log=structlog.get_logger()
    )
    halts: Any = SimpleNamespace(cut=cut)
    tools = Tools(run_log, halts)
    assert ["grows", "grows-0", "up"] == list(await tools.bound())
    gone.add("up")
    box.grown += 1
    assert ["grows", "grows-1", "up"] == list(await tools.bound())
    assert ["down"] == [event.tools_unavailable.server for event in recorded]
