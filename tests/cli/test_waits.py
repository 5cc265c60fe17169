"""Approvals, questions and calls that a run waits for are shown and answered: in a conversation at a terminal, and by
separate commands."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from notecase import Client, v1
from notecase.commands import Commands
from notecase_server.auth import rights
from notecase_server.auth.principal import AuthContext, Metadata, Principal, Role
from notecase_server.cli import answering, approvals, follow, keyboard
from notecase_server.cli.waits import APPROVAL, INTERRUPTED, QUESTION, Wait, caller_of, may_answer
from notecase_server.engine import ledger
from notecase_server.tools.contract import CallContext
from notecase_server.tools.functions import tool
from notecase_server.tools.toolbox import make_toolbox

from tests.cli.command import Terminal, notecase, terminal
from tests.support.crashing import EFFECTS, GATE, TOOLS, Gate
from tests.support.server import Running, Spawned, running


@pytest.fixture
async def clerk(served: Running) -> v1.Agent:
    return await make_clerk(served)


async def make_clerk(served: Running) -> v1.Agent:
    """An agent that asks people, pays when it may, and has a caller's tool."""
    tools = [
        v1.Tool(name="ask_user", server=v1.ServerTool(function="ask_user")),
        v1.Tool(name="search", client=v1.ClientTool()),
        v1.Tool(name="pay", client=v1.ClientTool(), requires_approval=True),
    ]
    agent = v1.Agent(llm=v1.LlmAgent(instruction="", tools=tools))
    async with served.client() as client:
        return await client.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))


async def start(served: Running, session: str, *said: str) -> None:
    """A session whose run waits."""
    async with served.client() as client:
        await client.create_session("agents/clerk", session_id=session)
        message = v1.Message(parts=[v1.Part(text=text) for text in said])
        run = await client.runs.CreateRun(
            v1.CreateRunRequest(start=v1.StartRun(session=f"sessions/{session}", messages=[message]))
        )
        await client.runs.WaitRun(v1.WaitRunRequest(name=run.name))


async def calls(served: Running, session: str) -> list[v1.ToolCall]:
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=f"sessions/{session}"))
    return [part.tool_call for message in listed.messages for part in message.parts if part.HasField("tool_call")]


async def test_a_question_an_approval_and_a_callers_tool_are_answered_in_the_chat(
    served: Running, clerk: v1.Agent
) -> None:
    """One after the other, at a terminal; what is to be approved is shown whole."""
    long = "x" * 150
    async with terminal("chat", "--new", "--session", "case", "--server", served.address) as screen:
        await screen.until("> ")
        await screen.type('/call ask_user {"question": "Which city?"}\rand then\rI')  # some of it too early
        await screen.until("Which city?")
        await screen.until("answer> ")
        await screen.type("Vienna\r")
        await screen.until("succeeded: Vienna")
        await screen.until("The tools are done.")
        await screen.until("> ")
        await screen.type(f'/call pay {{"to": "{long}", "sum": 5}}\r')
        await screen.until("Approve this call?")
        await screen.until(long[:90])
        await screen.until('"sum": 5')
        await screen.until("5. Leave it waiting")
        await screen.type("1\r")
        await screen.until("The agent called this tool of a client program")
        await screen.until("1. Give its result")
        await screen.type("1\r")
        await screen.until("result> ")
        await screen.type("paid\r")
        await screen.until("pay gave: paid")
        await screen.until("> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    assert [("ask_user", "Vienna"), ("pay", "paid")] == [
        (call.tool, call.result[0].text) for call in await calls(served, "case")
    ]


async def test_letters_and_enter_alone_approve_nothing(served: Running, clerk: v1.Agent) -> None:
    """Somebody who goes on typing at the menu leaves the run waiting."""
    async with terminal("chat", "--new", "--session", "case", "--server", served.address) as screen:
        await screen.until("> ")
        await screen.type("/call pay {}\r")
        await screen.until(">  5. Leave it waiting")
        await screen.type("what about a jackal kept\r")
        await screen.until("The run waits for your approval: pay({}). Use `notecase approve case`")
        await screen.until("> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    assert [v1.ToolCall.OUTCOME_PENDING] == [call.outcome for call in await calls(served, "case")]


async def test_arguments_are_edited_and_a_call_is_denied_with_a_reason(served: Running, clerk: v1.Agent) -> None:
    """What is not JSON is edited further, as it was typed."""
    async with terminal("chat", "--new", "--session", "case", "--server", served.address) as screen:
        await screen.until("> ")
        await screen.type('/call pay {"sum": 5}\r')
        await screen.until("3. Edit")
        await screen.type("3\r")
        await screen.until('arguments> {"sum": 5}')
        await screen.type("\x7f\x7f7\r")
        await screen.until("This is not JSON")
        await screen.until('arguments> {"sum": 7')
        await screen.type("}\r")
        await screen.until("2. It failed")
        await screen.type("2\r")
        await screen.until("what went wrong> ")
        await screen.type("no money\r")
        await screen.until("failed: no money")
        await screen.until("The tools are done.")
        await screen.until("> ")
        await screen.type('/call pay {"sum": 9}\r')
        await screen.until("4. Deny")
        await screen.type("4\r")
        await screen.until("no reason)> ")
        await screen.type("too much\r")
        await screen.until("denied: too much")
        await screen.until("The tools are done.")
        await screen.until("> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    assert [('{"sum": 7}', "no money"), ('{"sum": 9}', "too much")] == [
        (call.arguments, call.error) for call in await calls(served, "case")
    ]


async def test_a_run_is_left_waiting_and_found_again(served: Running, clerk: v1.Agent) -> None:
    """Ctrl-C at a question leaves it open; the command that answers it is printed, and the next chat asks it again."""
    async with terminal("chat", "--new", "--session", "case", "--server", served.address) as screen:
        await screen.until("> ")
        await screen.type('/call ask_user {"question": "Which city?"}\r')
        await screen.until("answer> ")
        await screen.type("\x03")
        await screen.until("Answer with `notecase answer case TEXT`.")
        await screen.until("> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    async with terminal("chat", "--server", served.address) as screen:
        await screen.until("2. case")
        await screen.until("waits")
        await screen.type("2\r")
        await screen.until("answer> ")
        await screen.type("Rome\r")
        await screen.until("succeeded: Rome")
        await screen.until("The tools are done.")
        await screen.until("> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()


async def test_an_enter_alone_answers_nothing(served: Running, clerk: v1.Agent) -> None:
    """It is asked again; a question without words says that it has none."""
    async with terminal("chat", "--new", "--session", "case", "--server", served.address) as screen:
        await screen.until("> ")
        await screen.type("/call ask_user {}\r")
        await screen.until("The model asks a question without text.")
        for _ in range(2):
            await screen.until("answer> ")
            await screen.type("\r")
            await screen.until("Nothing was typed; Ctrl-C leaves it waiting.")
        await screen.until("answer> ")
        await screen.type("Vienna\r")
        await screen.until("The tools are done.")
        await screen.until("> ")
        await screen.type("/call search {}\r")
        await screen.until("none has answered. You can give its result:")
        await screen.until("1. Give its result")
        await screen.type("1\r")
        await screen.until("result> ")
        await screen.type("\r")
        await screen.until("Nothing was typed")
        await screen.until("result> ")
        await screen.type("\x03")
        await screen.until("The run waits for a client tool: search({}).")
        await screen.until("> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    answered, waits = await calls(served, "case")
    assert ("Vienna", v1.ToolCall.OUTCOME_RUNNING) == (answered.result[0].text, waits.outcome)


async def test_of_several_that_wait_each_may_be_left(served: Running, clerk: v1.Agent) -> None:
    """The user is still asked about the others; the commands list what is left, unshortened even in a narrow
    terminal."""
    there = {"NOTECASE_ADDRESS": served.address}
    async with terminal("chat", "--new", "--session", "case", env=there, columns=60) as screen:
        await screen.until("> ")
        await screen.type('\x1b[200~/call pay {"sum": 1}\n/call pay {"sum": 2}\n/call pay {"sum": 3}\x1b[201~\r')
        for number, way in ((1, "\r"), (2, "4\r"), (3, "\r")):
            await screen.until(f'"sum": {number}')
            await screen.until(">  5. Leave it waiting")
            await screen.type(way)
            if way == "4\r":
                await screen.until("no reason)> ")
                await screen.type("no\r")
        await screen.until("2 things wait; `notecase inbox case` lists them.")
        await screen.until("> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    assert 1 == screen.screen.count("denied: no")
    (run,) = json.loads((await notecase("inbox", "case", "-o", "json", env=there)).out)
    left = [one["input_id"] for one in run["pending_inputs"]]
    assert 2 == len(left)
    for one in left:
        assert any(one in line for line in screen.paper)
        assert f"notecase approve case --id {one}" in " ".join(" ".join(screen.paper).split())
    done = await notecase("approve", "case", "--id", left[0], env=there)
    assert (0, "") == (done.code, done.err)


async def test_what_happens_in_a_run_that_was_left_waiting_is_shown_at_the_prompt(
    served: Running, clerk: v1.Agent
) -> None:
    """As soon as another user has answered; the text being typed is kept."""
    async with terminal("chat", "--new", "--session", "case", "--server", served.address) as screen:
        await screen.until("> ")
        await screen.type("/call pay {}\r")
        await screen.until("5. Leave it waiting")
        await screen.type("\r")
        await screen.until("The run waits for your approval")
        await screen.until("\n> ")
        await screen.type("/say Good")
        await screen.until("Good")
        assert 0 == (await notecase("deny", "case", "--reason", "closed", "--server", served.address)).code
        await screen.until("denied: closed")
        await screen.until("The tools are done.")
        await screen.until("> /say Good")
        await screen.type("bye\r")
        await screen.until("Goodbye")
        await screen.until("\n> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()


async def pay(screen: Terminal, way: str) -> None:
    """Answers the question for approval in that way."""
    await screen.type("/call pay {}\r")
    await screen.until("5. Leave it waiting")
    await screen.type(f"{way}\r")
    await screen.until("1. Give its result")
    await screen.type("1\r")
    await screen.until("result> ")
    await screen.type("paid\r")
    await screen.until("The tools are done.")
    await screen.until("\n> ")


async def test_an_answer_that_holds_for_further_calls_is_shown_and_taken_back(served: Running, clerk: v1.Agent) -> None:
    """From then on a person is asked again."""
    async with terminal("chat", "--new", "--session", "case", "--server", served.address) as screen:
        await screen.until("> ")
        await screen.type("/approvals\r")
        await screen.until("No answer to an approval holds for further calls in this session.")
        await pay(screen, "2")
        await screen.type("/approvals\r")
        await screen.until("1. Ask again: pay of clerk runs without being asked for")
        await screen.until(">  2. Leave it so")
        await screen.type("1\r")
        await screen.until("pay asks again from now on.")
        await screen.until("\n> ")
        await pay(screen, "1")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    session = await served.sessions.GetSession(v1.GetSessionRequest(name="sessions/case"))
    assert {} == dict(session.remembered)
    piped = await notecase("chat", "--session", "case", said="/approvals\n", env={"NOTECASE_ADDRESS": served.address})
    assert (0, "") == (piped.code, piped.out)


async def test_a_question_that_another_user_answers_is_not_asked_any_more(served: Running, clerk: v1.Agent) -> None:
    async with terminal("chat", "--new", "--session", "case", "--server", served.address) as screen:
        await screen.until("> ")
        await screen.type('/call pay {"sum": 5}\r')
        await screen.until("5. Leave it waiting")
        assert 0 == (await notecase("deny", "case", "--server", served.address)).code
        await screen.until("The run no longer waits for this.")
        await screen.until("denied")
        await screen.until("The tools are done.")
        await screen.until("> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()


async def test_a_question_whose_run_ends_before_the_menu_is_gone_says_so_too(
    served: Running, clerk: v1.Agent, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end of the run used to end the question without a word, when it arrived together with the answer."""

    async def answer(commands: Commands, wait: Wait, sending: Callable[[bool], None]) -> bool:
        try:
            await commands.deny(wait.run, wait.id)
            return await asyncio.Event().wait()
        finally:
            await asyncio.Event().wait()  # the menu takes until after the end of the run to go

    monkeypatch.setattr(answering, "answer", answer)
    monkeypatch.setattr(keyboard, "hushed", lambda asks: nullcontext())
    async with served.client() as client:
        follower = follow.Follower(client, client.run("/call pay {}", agent="clerk"), patience=0)
        follower._asks = True
        assert await follower.follow()
    assert 1 == capsys.readouterr().err.count("The run no longer waits for this.")


async def test_a_program_with_the_tool_answers_and_no_user_is_asked(served: Running, clerk: v1.Agent) -> None:
    def search() -> str:
        return "found"

    async with (
        terminal("chat", "--new", "--session", "case", "--wait", "200", "--server", served.address) as screen,
        served.client() as client,
    ):
        await screen.until("> ")
        await screen.type("/say Hello\r")
        await screen.until("Hello")
        await screen.until("> ")
        async with client.attach("sessions/case", tools=[search], options=v1.WatchOptions(keep_open=True)) as stream:
            await screen.type("/call search {}\r")
            async for event in stream:
                if event.HasField("tool_finished"):
                    break
            await screen.until("succeeded: found")
            await screen.until("> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    assert "Give its result" not in screen.screen


async def test_in_a_pipe_a_run_that_waits_ends_the_command(served: Running, clerk: v1.Agent) -> None:
    """The exit code is 3, and the command that answers is printed."""
    for said, told in (
        ('/call ask_user {"question": "Which city?"}', "Which city? Answer with `notecase answer"),
        ("/call pay {}", "`notecase approve"),
        ("/call search {}", "TEXT`."),
    ):
        for command in ("chat", "run"):
            done = await notecase(command, "--wait", "0", "--server", served.address, said=f"{said}\n")
            assert (3, "") == (done.code, done.out)
            assert told in done.err
    done = await notecase("run", "--wait", "0", "/call pay {}\n/call pay {}", "--server", served.address)
    assert 3 == done.code
    assert 4 == done.err.count(" --id ")
    assert done.err.rstrip().endswith("lists them.")


async def test_what_is_answered_while_the_caller_is_looked_up_is_not_left_waiting(
    served: Running, clerk: v1.Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command used to end with code 3 and no words."""
    gone = asyncio.Event()

    class Watched(follow.Follower):
        def _take(self, event: v1.Event) -> None:
            super()._take(event)
            if not self._waits():
                gone.set()

    async def answered(client: Client) -> v1.ServerInfo.Caller | None:
        gone.clear()
        (call,) = (await client.runs.GetRun(v1.GetRunRequest(name=stream.name))).pending_calls
        await client.give_result(stream.name, call.call_id, "found")
        await gone.wait()
        return await caller_of(client)

    monkeypatch.setattr(follow, "caller_of", answered)
    async with served.client() as client:
        stream = client.run("/call search {}", agent="clerk")
        assert await Watched(client, stream, patience=0).follow()


async def test_an_answer_remembered_while_the_menu_is_open_is_kept(
    served: Running, clerk: v1.Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only answers about the tool that was chosen are taken back."""
    async with served.client() as client:
        tools = [v1.Tool(name=name, client=v1.ClientTool(), requires_approval=True) for name in ("pay", "send")]
        await client.agents.CreateAgent(
            v1.CreateAgentRequest(agent_id="bank", agent=v1.Agent(llm=v1.LlmAgent(instruction="", tools=tools)))
        )
        await client.create_session("bank", session_id="case")

        async def remember(name: str) -> None:
            async with client.run(f"/call {name} {{}}", session="case") as stream:
                async for event in stream:
                    if event.HasField("input_requested"):
                        await client.approve(stream.name, event.input_requested.input_id, remember="session")
                        break
                await stream.cancel()

        async def chosen(*_: object, **__: object) -> int:
            await remember("send")
            return 0

        await remember("pay")
        monkeypatch.setattr("notecase_server.cli.terminal.choose", chosen)
        for standard in ("sys.stdin", "sys.stdout"):
            monkeypatch.setattr(f"{standard}.isatty", lambda: True)
        await approvals.review(client, "sessions/case")
        session = await client.sessions.GetSession(v1.GetSessionRequest(name="sessions/case"))
        assert ["send"] == [one.tool for one in session.remembered.values()]


async def test_an_inbox_lists_what_is_waited_for_and_commands_answer_it(served: Running, clerk: v1.Agent) -> None:
    await start(served, "one", '/call ask_user {"question": "Which city?"}')
    await start(served, "two", '/call pay {"sum": 5}')
    await start(served, "three", "/call search {}")
    there = {"NOTECASE_ADDRESS": served.address}
    done = await notecase("inbox", env=there)
    rows = {line.split()[0]: line for line in done.out.splitlines()[1:]}
    assert {"one", "two", "three"} == set(rows)
    assert "question" in rows["one"]
    assert "Which city?" in rows["one"]
    assert "approval" in rows["two"]
    assert 'pay({"sum": 5})' in rows["two"]
    assert "tool" in rows["three"]
    assert "search({})" in rows["three"]
    done = await notecase("inbox", "two", "-o", "json", env=there)
    (run,) = json.loads(done.out)
    assert "KIND_APPROVAL" == run["pending_inputs"][0]["kind"]
    wrong = await notecase("approve", "one", env=there)
    assert (1, True) == (wrong.code, "Error: sessions/one/runs/" in wrong.err)
    assert " waits for a question; use `notecase answer`." in wrong.err
    for session, what in (("one", "a question"), ("three", "a caller's tool")):
        wrong = await notecase("deny", session, "--remember", "session", env=there)
        assert (2, True) == (
            wrong.code,
            f"--remember works only for approvals, and the run waits for {what}" in wrong.err,
        )
    wrong = await notecase("run", "--session", "two", "Hello", env=there)
    assert (1, True) == (wrong.code, "The session is busy with sessions/two/runs/" in wrong.err)
    for way in ("`notecase inbox`", "`notecase approve`", "`notecase answer`", "`notecase runs cancel two/"):
        assert way in wrong.err
    assert (0, "", "") == await notecase("answer", "one", "-", said="Rome", env=there)
    wrong = await notecase("answer", "two", "yes", env=there)
    assert 1 == wrong.code
    assert "Error: sessions/two/runs/" in wrong.err
    assert " waits for an approval; use `notecase approve` or `notecase deny`." in wrong.err
    assert (0, "", "") == await notecase("approve", "two", "--arguments", '{"sum": 4}', env=there)
    assert (0, "", "") == await notecase("answer", "two", "paid", env=there)
    assert (0, "", "") == await notecase("deny", "three", "--reason", "closed", env=there)
    (asked,) = await calls(served, "one")
    (paid,) = await calls(served, "two")
    (searched,) = await calls(served, "three")
    assert ("Rome", '{"sum": 4}', "paid", "closed") == (
        asked.result[0].text,
        paid.arguments,
        paid.result[0].text,
        searched.error,
    )


async def test_of_several_that_wait_one_is_chosen_by_its_id(served: Running, clerk: v1.Agent) -> None:
    await start(served, "case", '/call pay {"sum": 1}\n/call pay {"sum": 2}')
    there = {"NOTECASE_ADDRESS": served.address}
    done = await notecase("approve", "case", env=there)
    assert 2 == done.code
    wanted = next(line.split()[0] for line in done.err.splitlines() if '{"sum": 2}' in line)
    shared = next(wanted[:cut] for cut in range(len(wanted), 0, -1) if done.err.count(f"  {wanted[:cut]}") > 1)
    assert 2 == (await notecase("approve", "case", "--id", shared, env=there)).code
    edited = ("--id", wanted[: len(shared) + 1], "--arguments", '{"sum": 3}')
    assert 0 == (await notecase("approve", "case", *edited, env=there)).code
    assert 'approve with edited arguments {"sum": 3}' in (await notecase("logs", "case", env=there)).out
    done = await notecase("approve", "case", "--id", wanted, env=there)
    assert (1, True) == (done.code, "Nothing waits with the id" in done.err)


BOOKING = {
    "type": "object",
    "properties": {
        "seat": {"enum": ["window", "aisle"]},
        "bags": {"type": "integer", "title": "How many bags?"},
        "meal": {"type": "boolean"},
        "note": {"type": "string"},
    },
    "required": ["seat", "bags", "meal"],
}


@tool
async def book(context: CallContext, nested: bool = False) -> str:
    """Asks its caller's user how to book."""
    schema = {"type": "object", "properties": {"a": {"type": "object"}}} if nested else BOOKING
    got = await context.ask("Which seat?", schema)
    return f"{v1.InputResponse.Decision.Name(got.decision)} {got.answer}"


async def test_a_tools_question_is_a_form() -> None:
    """Its members are asked for one by one; an invalid answer is reported and asked for again; the question can be
    declined and dismissed."""
    async with running(toolbox=make_toolbox((__name__,), {})) as served:
        booking = v1.Tool(name="book", server=v1.ServerTool(function="book"))
        agent = v1.Agent(llm=v1.LlmAgent(tools=[booking]))
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
        async with terminal("chat", "--new", "--server", served.address) as screen:
            await screen.until("> ")
            await screen.type("/call book {}\r")
            await screen.until("4. Leave it waiting")
            for bags in ("two", "2"):
                await screen.type("1\r")
                await screen.until("2. aisle")
                await screen.type("2\r")
                await screen.until("How many bags?")
                await screen.until("bags> ")
                await screen.type(f"{bags}\r")
                if bags == "two":
                    await screen.until("bags must be a number.")
                    await screen.until("4. Leave it waiting")
            await screen.until("1. Yes")
            await screen.type("1\r")
            await screen.until("note (may be empty)> ")
            await screen.type("\r")
            await screen.until('DECISION_ANSWER {"seat": "aisle", "bags": 2, "meal": true}')
            await screen.until("\n> ")
            await screen.type('/call book {"nested": true}\r')
            for way, told in (("1", "Answer with JSON that matches"), ("2", "no reason)> ")):
                await screen.until("4. Leave it waiting")
                await screen.type(f"{way}\r")
                await screen.until(told)
                if way == "1":
                    await screen.until("answer> ")
                    await screen.type('{"a": 1}\r')
            await screen.type("\r")
            await screen.until("DECISION_DENY")
            await screen.until("\n> ")
            await screen.type("/call book {}\r")
            await screen.until("4. Leave it waiting")
            await screen.type("3\r")
            await screen.until("DECISION_CANCEL")
            await screen.until("\n> ")
            await screen.type("\x04")
            assert 0 == await screen.ended()


async def test_a_call_that_its_servers_end_cut_off_is_asked_about(tmp_path: Path) -> None:
    async with Gate() as gate:
        env = {EFFECTS: str(tmp_path / "effects"), GATE: str(gate.port)}
        store, log = f"sqlite:{tmp_path / 'store.db'}", tmp_path / "log"
        server = await Spawned.start(store, log, "--tools", TOOLS, env=env, forked=True)
        async with Client(server.address) as client:
            agent = v1.Agent(llm=v1.LlmAgent(tools=[v1.Tool(name="linger", server=v1.ServerTool(function="linger"))]))
            await client.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
            await client.create_session("agents/clerk", session_id="case")
            said = v1.Message(parts=[v1.Part(text="/call linger {}")])
            start = v1.StartRun(session="sessions/case", messages=[said])
            await client.runs.CreateRun(v1.CreateRunRequest(start=start))
            await gate.arrival()
        await server.kill()
        server = await Spawned.start(store, log, "--tools", TOOLS, env=env, forked=True)
        there = {"NOTECASE_ADDRESS": server.address}
        async with terminal("chat", "--session", "case", env=there) as screen:
            await screen.until("This call was running when its server stopped.")
            assert "interrupted call" in (await notecase("inbox", env=there)).out
            await screen.until("1. Run it again")
            await screen.until("4. Leave it waiting")
            await screen.type("3\r")
            await screen.until("result> ")
            await screen.type("by hand\r")
            await screen.until("linger gave: by hand")
            await screen.until("> ")
            await screen.type("\x04")
            assert 0 == await screen.ended()
        assert 0 == await server.stop()


class ByToken:
    """Takes the token as the name of a role."""

    async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal | None:
        word = str(metadata.get("authorization", "")).removeprefix("Bearer ")
        return Principal("default", word, Role[word.upper()]) if word else None


@pytest.fixture
async def guarded() -> AsyncIterator[str]:
    """A server with roles, and a session that waits for an admin's approval."""
    async with running(authenticators=[ByToken()]) as served:
        admin = {"NOTECASE_ADDRESS": served.address, "NOTECASE_TOKEN": "admin"}
        declared = """
            name: clerk
            llm: {tools: [{name: pay, client: {}, requires_approval: true, approver: APPROVER_ADMIN}]}
        """
        assert 0 == (await notecase("agents", "apply", "-f", "-", said=declared, env=admin)).code
        yield served.address


@pytest.mark.parametrize("role", [Role.USER, Role.DEVELOPER, Role.ADMIN])
@pytest.mark.parametrize("user", ["", "ada"])
def test_who_may_answer_is_who_the_server_lets(role: Role, user: str) -> None:
    """For each kind of wait and each approver."""
    principal = Principal("acme", "one", role, user)
    caller = v1.ServerInfo.Caller(role=v1.Key.Role.Value(f"ROLE_{role.name}"), user=user)
    for approver in v1.Tool.Approver.values():
        for kind in (APPROVAL, INTERRUPTED, QUESTION):
            asked = v1.InputRequest(kind=kind, approver=approver)
            refused = ledger.refusal([asked], rights.approver(principal), "input_response.input_id")
            assert (refused is None) == may_answer(caller, Wait("r", asked, asked.call))
            assert may_answer(None, Wait("r", asked, asked.call))


async def test_a_user_who_may_not_approve_sees_who_may_and_is_not_asked(guarded: str) -> None:
    """The chat continues when a user who may answer has done so."""
    user, admin = ({"NOTECASE_ADDRESS": guarded, "NOTECASE_TOKEN": role} for role in ("user", "admin"))
    async with terminal("chat", "--new", "--session", "case", env=user) as screen:
        await screen.until("> ")
        await screen.type("/call pay {}\r")
        await screen.until("This waits for an admin: pay(")
        done = await notecase("inbox", env=user)
        assert "an admin" in done.out
        done = await notecase("approve", "case", env=user)
        assert (1, True) == (done.code, "This waits for an admin" in done.err)
        done = await notecase("inbox", env=admin)
        assert "you" in done.out.split()
        assert (0, "", "") == await notecase("approve", "case", env=admin)
        await screen.until("1. Give its result")
        await screen.type("1\r")
        await screen.until("result> ")
        await screen.type("paid\r")
        await screen.until("pay gave: paid")
        await screen.until("> ")
        await screen.type("/call pay {}\r")
        await screen.until("Ctrl-C leaves it waiting.")
        await screen.type("\x03")
        await screen.until("The run waits for an admin to approve: pay({}).")
        await screen.until("> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    assert "Approve this call?" not in screen.screen
    assert "STATE_WAITING" in (await notecase("runs", "show", "case", "-o", "yaml", env=user)).out
