"""Agents as a program declares them, and replies of the types that it requests, over a real connection."""

import asyncio
import re
from dataclasses import dataclass
from typing import Any, TypedDict, assert_type

import grpc
import pytest
from notecase import Client, NotecaseError, Reply, Retry, RunWaiting, Tool, sync, v1
from pydantic import BaseModel

from tests.client.conftest import QUICK
from tests.support.openai_server import OpenAIServer, chunk, reply, stream, tool_calls
from tests.support.server import Running


@dataclass
class Report:
    suspect: str
    score: float = 0.5


class Note(TypedDict):
    suspect: str


class Model(BaseModel):
    suspect: str


FOUND = '{"suspect": "the butler"}'


def search(what: str) -> list[str]:
    """Searches yesterday's papers."""
    return [f"{what} was seen at the harbour"]


async def test_an_agent_is_put_and_answers_in_one_line_each(client: Client, model: OpenAIServer) -> None:
    model.script(tool_calls(("search", '{"what": "violin"}')), reply("At the harbour."), reply("Yes."))
    put = await client.put_agent("finder", "You find things.", tools=[search], generation={"temperature": 0.5})
    assert ("agents/finder", 1) == (put.name, put.revision)
    answer = await client.invoke("Where is it?", agent="finder")
    assert ("At the harbour.", "At the harbour.", None) == (answer.text, str(answer), answer.parsed)
    assert "violin was seen at the harbour" in model.requests[1]["messages"][-1]["content"]
    assert (0.5, "You find things.") == (
        model.requests[0]["temperature"],
        model.requests[0]["messages"][0]["content"],
    )
    assert "Yes." == (await client.invoke("Sure?", session=answer.session)).text
    assert 5 == len([message async for message in client.list_messages(answer.session)])


async def test_a_revision_is_asked_with_functions_that_it_does_not_have(client: Client, model: OpenAIServer) -> None:
    """The run declares what that revision does not; another program's counts as this program's newest."""
    await client.put_agent("finder", "You find things.")
    for instruction in ("You find things.", "You find all things."):
        await client.put_agent("finder", instruction, tools=[search])
    async with Client(client.address) as other:
        assert 4 == (await other.put_agent("finder", "You find nothing.", tools=[search])).revision
    call = tool_calls(("search", '{"what": "violin"}'))
    model.script(*(call, reply("At the harbour.")) * 5)
    for agent in ("finder", *(f"finder@{revision}" for revision in range(1, 5))):
        assert "At the harbour." == (await client.invoke("Where is it?", agent=agent, tools=[search])).text


async def test_a_run_that_another_process_repeats_in_a_session_is_the_same(
    client: Client, session: str, served: Running, model: OpenAIServer
) -> None:
    """Without a session each start is a run in a new session: other users may have chosen the same run_id."""
    model.script(reply("Once."), *[reply("Apart.")] * 2)
    async with Client(served.address) as other:
        once, again = [await one.invoke("Work", session=session, run_id="job-42") for one in (client, other)]
        assert (once.run.name, 1) == (again.run.name, len(model.requests))
        with pytest.raises(NotecaseError, match="REQUEST_ID_REUSED"):
            await other.invoke("Play", session=session, run_id="job-42")
        apart = [await one.invoke("Work", agent="detective", run_id="job-42") for one in (client, other)]
    assert 3 == len({session, *(one.session for one in apart)})


async def test_an_agent_that_is_put_again_as_it_is_stays_as_it_is(client: Client) -> None:
    """And what is left out the second time is gone."""
    await client.put_agent("finder", "You find things.", tools=[search], output_key="found")
    assert 1 == (await client.put_agent("finder", "You find things.", tools=[search], output_key="found")).revision
    put = await client.put_agent("finder", "You find things.")
    assert (2, "", 0) == (put.revision, put.output_key, len(put.llm.tools))


@pytest.mark.parametrize(
    ("output", "expected"),
    [(Report, Report("the butler")), (Note, {"suspect": "the butler"}), (Model, Model(suspect="the butler"))],
    ids=["dataclass", "TypedDict", "pydantic"],
)
async def test_a_reply_is_read_as_the_given_type(
    client: Client, model: OpenAIServer, output: Any, expected: Any
) -> None:
    """By this client's own `put_agent`, and by a client that knows the type otherwise; without it as dicts."""
    model.script(*[reply(FOUND)] * 4)
    await client.put_agent("reporter", "You report.", output=output)
    assert expected == (await client.invoke("Who?", agent="reporter")).parsed
    async with client.run("Who?", agent="agents/reporter@1") as run:
        assert FOUND == "".join([text async for text in run.text()])
    assert expected == run.parsed
    async with Client(client.address, retry=QUICK) as other:
        assert expected == (await other.invoke("Who?", agent="reporter", output=output)).parsed
        assert {"suspect": "the butler"} == (await other.invoke("Who?", agent="reporter")).parsed
        async with other.attach(run.name, output=output) as again:
            async for _ in again:
                pass
    assert expected == again.parsed
    told = model.requests[0]["response_format"]["json_schema"]["schema"]
    assert ("object", ["suspect"]) == (told["type"], told["required"])


async def test_type_checkers_know_what_a_reply_is_read_as(served: Running, model: OpenAIServer) -> None:
    """Of a call and of a stream, with asyncio and without; mypy looks at these."""
    model.script(*(reply(FOUND) for _ in range(4)))
    expected = Report("the butler")
    async with Client(served.address) as client:
        await client.put_agent("reporter", "You report.", output=Report)
        assert expected == assert_type((await client.invoke("Who?", agent="reporter", output=Report)).parsed, Report)
        async with client.run("Who?", agent="reporter", output=Report) as run:
            assert [] != [event async for event in run]
        assert expected == assert_type(run.reply.parsed, Report) == assert_type(run.parsed, Report)

    def ask() -> None:
        with sync.Client(served.address) as client:
            found = client.invoke("Who?", agent="reporter", output=Report)
            assert expected == assert_type(found.parsed, Report)
            assert_type(client.invoke("Who?", agent="reporter").parsed, Any)

    await asyncio.to_thread(ask)


async def test_the_error_of_a_reply_that_is_not_a_report_says_why(client: Client, model: OpenAIServer) -> None:
    model.script(stream(chunk({"refusal": "I would rather not."})), reply(FOUND))
    await client.put_agent("reporter", "You report.", output=Report)
    refused = await client.invoke("Who?", agent="reporter")
    with pytest.raises(ValueError, match=r"the reply is not JSON: 'I would rather not\.'"):
        _ = refused.parsed
    odd = await client.invoke("Who?", session=refused.session, output=Odd)
    with pytest.raises(ValueError, match='suspect must be an integer, not "the butler"'):
        _ = odd.parsed


@dataclass
class Odd:
    suspect: int


async def test_a_run_that_has_not_succeeded_has_no_reply(client: Client, model: OpenAIServer) -> None:
    held = asyncio.Event()
    model.script(reply("Never.").held(held, 0))
    async with client.run("Speak", agent="detective") as run:
        with pytest.raises(RuntimeError, match="not ended yet"):
            _ = run.parsed
        await run.cancel("enough")
        async for _ in run:
            pass
    with pytest.raises(NotecaseError, match="was cancelled"):
        _ = run.reply


async def test_functions_of_an_agent_run_where_its_runs_were_started(client: Client, model: OpenAIServer) -> None:
    """And nowhere else: who only attaches runs what he was handed for that."""
    model.script(tool_calls(("search", '{"what": "bow"}')), reply("Found."))
    await client.put_agent("finder", "You find things.", tools=[search])
    async with Client(client.address, retry=QUICK) as other:
        cure = r"'search', which this client does not have: pass tools=\[Tool\(search, declare=False\)\]$"
        with pytest.raises(RunWaiting, match=cure) as waiting:
            await other.invoke("Find it", agent="finder", run_id="r1")
        run = waiting.value.run
        assert ["search"] == [call.tool for call in run.pending_calls]
        assert [run.name] == [found.name async for found in other.waiting()]
        async with client.attach(run, options=v1.WatchOptions(keep_open=True)) as watching:
            await client.put_state(watching.session, "looked", True)
            while not (await anext(watching)).HasField("state_changed"):
                pass
            found = await client.runs.GetRun(v1.GetRunRequest(name=run.name))
            assert run.pending_calls == found.pending_calls
        async with other.attach(run, tools=[search]) as served:
            async for _ in served:
                pass
    assert "Found." == served.reply.text


async def test_a_function_that_the_agent_declares_is_not_declared_again(client: Client, model: OpenAIServer) -> None:
    model.script(tool_calls(("search", '{"what": "bow"}')), reply("Found."))
    await client.put_agent("finder", "You find things.", tools=[search, v1.Tool(name="ask", client=v1.ClientTool())])
    assert "Found." == (await client.invoke("Find it", agent="finder", tools=[search])).text
    assert ["search", "ask"] == [tool["function"]["name"] for tool in model.requests[0]["tools"]]


async def test_a_run_may_differ_from_its_agent(client: Client, model: OpenAIServer) -> None:
    """In its model, its instruction and how the model writes; what is empty is meant, too."""
    model.script(reply("Ahoy."), reply("Ahoy."))
    options: dict[str, Any] = {"model": "stub-2", "instruction": "", "generation": {"max_output_tokens": 7}}
    answer = await client.invoke("Hello", agent="detective", **options)
    asked = model.requests[0]
    assert ("stub-2", ["user"]) == (asked["model"], [one["role"] for one in asked["messages"]])
    assert 7 in (asked.get("max_completion_tokens"), asked.get("max_tokens"))
    async with client.run("Hello", session=answer.session, instruction="You are a pirate.") as run:
        async for _ in run:
            pass
    assert ("stub-1", "You are a pirate.") == (
        model.requests[1]["model"],
        model.requests[1]["messages"][0]["content"],
    )


async def test_choices_are_words(client: Client, session: str, model: OpenAIServer) -> None:
    """The error for a wrong one lists the valid ones, and nothing is sent."""
    release = asyncio.Event()
    model.script(reply("One.").held(release, 0), reply("More."), reply("Two."))
    async with client.run("One", session=session) as run:
        queued = client.run("Two", session=session, on_busy="queue")
        async with queued as second:
            await client.say(session, "And more", when="follow_up")
            release.set()
            async for _ in run:
                pass
            async for _ in second:
                pass
    assert ("More.", "Two.") == (run.reply.text, second.reply.text)
    with pytest.raises(ValueError, match="'later' is not one of 'reject', 'queue', 'interrupt', 'rollback'"):
        client.run("Three", session=session, on_busy="later")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'once', 'run', 'session'"):
        await client.approve(run.name, "i1", remember="always")  # type: ignore[arg-type]
    assert v1.Tool.APPROVER_ADMIN == Tool(search, approver="admin").definition.approver


async def test_a_queued_run_has_the_functions_of_the_sessions_agent(client: Client, model: OpenAIServer) -> None:
    """The caller did not name the agent; the service does when the stream attaches."""
    release = asyncio.Event()
    model.script(reply("One.").held(release, 0), tool_calls(("search", '{"what": "bow"}')), reply("Found."))
    session = await client.create_session(await client.put_agent("finder", "You find things.", tools=[search]))
    async with client.run("One", session=session) as first:
        second = asyncio.create_task(client.invoke("Find it", session=session, on_busy="queue"))
        while not (await anext(first)).HasField("command_queued"):
            pass
        release.set()
        assert "Found." == (await second).text


async def test_a_run_without_agent_and_session_is_refused(client: Client) -> None:
    """A run that names neither agent nor session is refused before anything is sent."""
    with pytest.raises(ValueError, match="Name an agent, a session, or both"):
        await client.invoke("Hello?")


async def test_resources_are_named_by_id_name_or_themselves(client: Client, model: OpenAIServer) -> None:
    model.script(reply("One."), reply("Two."), reply("Three."))
    session = await client.create_session("detective", session_id="violin", user="ada")
    assert ("sessions/violin", "agents/detective", "users/ada") == (session.name, session.agent, session.user)
    for named in ("violin", "sessions/violin", session):
        await client.invoke("Well?", session=named)
    await client.put_state(session, "seen", "quay")
    assert {"seen": "quay"} == await client.get_state(session, "seen") == await client.get_state("violin")
    with pytest.raises(NotecaseError, match="SESSION_NOT_FOUND: There is no session 'sessions/nobody'"):
        await client.get_state("nobody")
    assert {} == await client.get_state("app") == await client.get_state("users/ada")
    assert (await client.fork(session)).agent == session.agent


async def test_state_that_was_changed_meanwhile_is_not_overwritten(client: Client) -> None:
    """By the version that came with the value; a miss says which version there is."""
    session = await client.create_session("detective", state={"visits": 1})
    entry = (await client.get_state_entries(session, "visits", "missing"))["visits"]
    put = await client.put_state(session, "visits", entry.value + 1, if_version=entry.version)
    with pytest.raises(NotecaseError, match="STATE_VERSION_MISMATCH") as late:
        await client.put_state(session, "visits", entry.value + 1, if_version=entry.version)
    assert str(put.version) == late.value.metadata["version"]
    assert {"visits": (2, put.version)} == await client.get_state_entries(session)


async def test_lists_go_on_over_their_pages(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("notecase.pages.PAGE", 2)
    await client.put_agent("other", "Else.")
    names = [(await client.create_session("detective", user="ada", session_id=f"s{n}")).name for n in range(5)]
    await client.create_session("other", session_id="t", user="bo")
    assert {*names, "sessions/t"} == {one.name async for one in client.list_sessions()}
    assert set(names) == {one.name async for one in client.list_sessions(agent="detective")}
    assert ["sessions/t"] == [one.name async for one in client.list_sessions('agent != ""', user="bo")]
    for user in ('ada" OR user = "users/bo', 'bo\\" OR user != "'):
        assert [] == [one.name async for one in client.list_sessions(user=user)]
    assert ["agents/detective", "agents/other"] == [one.name async for one in client.list_agents()]
    assert [] == [one async for one in client.list_runs("s1")]
    with pytest.raises(NotecaseError, match="SESSION_NOT_FOUND"):
        _ = [one async for one in client.list_messages("nowhere")]


async def test_fields_are_named_as_the_caller_wrote_them(client: Client) -> None:
    """Their paths within the request are hidden from the caller."""
    with pytest.raises(NotecaseError) as put:
        await client.put_agent("A b", "{{", max_model_calls=-1)
    with pytest.raises(NotecaseError) as created:
        await client.create_session("A b", user="a b")
    with pytest.raises(NotecaseError) as run:
        await client.invoke("Hello", agent="A b", limits={"max_model_calls": -1})
    told = [[violation.field for violation in error.value.violations] for error in (put, created, run)]
    assert [["name", "instruction", "max_model_calls"], ["agent", "user"]] == [sorted(told[0], key=len), told[1]]
    assert {"agent", "limits.max_model_calls"} == set(told[2])
    for error, fields in zip((put, created, run), told, strict=True):
        assert "INVALID_FIELD" == error.value.reason
        assert fields == re.findall(r"(?:^|; )([a-z_.]+): ", error.value.message)
        assert isinstance(error.value.__cause__, grpc.RpcError)


async def test_an_output_or_a_function_without_a_schema_is_refused_at_once(served: Running) -> None:
    async with Client(served.address, retry=Retry(tries=0)) as client:
        with pytest.raises(TypeError, match="is not an object in JSON"):
            await client.put_agent("finder", output=list[str])
        with pytest.raises(TypeError, match="is not an object in JSON"):
            client.run("Hello", agent="finder", output=str)
        with pytest.raises(TypeError, match="needs a name"):
            await client.put_agent("finder", tools=[lambda: None])
        assert [] == [one.name async for one in client.list_agents()]


async def test_a_tool_of_the_server_may_be_given_by_its_fields(client: Client) -> None:
    """As other messages may be; a field that does not exist is refused with those that do."""
    put = await client.put_agent("asker", tools=[search, {"name": "ask", "server": {"function": "ask_user"}}])
    assert ["search", "ask"] == [tool.name for tool in put.llm.tools]
    assert "ask_user" == put.llm.tools[1].server.function
    with pytest.raises(ValueError, match="Tool has no field 'function'; it has name, description"):
        await client.put_agent("asker", tools=[{"name": "ask", "function": "ask_user"}])
    with pytest.raises(ValueError, match=r"Generation has no field 'temprature'; it has .*temperature"):
        client.run("Hello", agent="asker", generation={"temprature": 0})
    with pytest.raises(ValueError, match=r"Limits has no field 'calls'; it has .*max_model_calls"):
        client.run("Hello", agent="asker", limits={"calls": 1})


def test_a_refusal_is_shown() -> None:
    """It is not a text of the reply, which is empty then."""
    run = v1.Run(
        name="sessions/s/runs/r",
        state=v1.Run.STATE_SUCCEEDED,
        reply=v1.Message(parts=[v1.Part(refusal="I will "), v1.Part(refusal="not.")]),
    )
    refused = Reply(run)
    assert ("", "I will not.") == (refused.text, refused.refusal)
    assert "Reply('', refusal='I will not.', run='sessions/s/runs/r')" == repr(refused)
