"""`notecase sessions` and `notecase agents`: tables for people, and everything for programs."""

import re

import pytest
from notecase import v1

from tests.cli.command import missing, notecase, terminal
from tests.support.server import Running

CHINESE = re.compile("[\u4e00-\u9fff]")

NOBODY = "127.0.0.1:1"
"""An address where nothing listens."""


@pytest.fixture
async def case(served: Running, agent: v1.Agent) -> v1.Session:
    """A session with one turn."""
    async with served.client() as client:
        session = await client.create_session(
            agent.name, session_id="case", display_name="The violin", user="users/ada"
        )
        await client.invoke("/reason Hm. /say Good evening.\n/call weather {}", session=session.name)
    return session


async def test_sessions_are_a_table(served: Running, case: v1.Session) -> None:
    await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="longer-id"))
    done = await notecase("sessions", "list", "--server", served.address)
    assert (0, "") == (done.code, done.err)
    header, first, second = done.out.splitlines()
    assert ["SESSION", "AGENT", "ACTIVITY", "EVENTS", "UPDATED", "DISPLAY", "NAME"] == header.split()
    assert ["longer-id", "idle", "0"] == first.split()[:3]
    assert ["case", "detective", "idle", "8"] == second.split()[:4]
    assert second.endswith("The violin")
    assert 1 == len({line.index(word) for line, word in ((header, "ACTIVITY"), (first, "idle"), (second, "idle"))})


async def test_a_table_fits_a_narrow_terminal_and_nothing_is_cut(served: Running) -> None:
    """Wide characters count twice; in a pipe a row is a line."""
    name = "小提琴失踪案" * 4
    session = v1.Session(display_name=name)
    await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case", session=session))
    async with terminal("sessions", "list", "--server", served.address, columns=60) as screen:
        assert 0 == await screen.ended()
    assert "…" not in screen.screen
    assert name == "".join(CHINESE.findall("".join(screen.window)))
    done = await notecase("sessions", "list", "--server", served.address)
    assert 2 == len(done.out.splitlines())


async def test_sessions_are_filtered_and_limited(served: Running, case: v1.Session) -> None:
    await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="other"))
    done = await notecase("sessions", "list", "--filter", 'agent = "agents/detective"', "--server", served.address)
    assert ["SESSION", "case"] == [line.split()[0] for line in done.out.splitlines()]
    done = await notecase("sessions", "list", "--limit", "1", "--server", served.address)
    assert ["SESSION", "other"] == [line.split()[0] for line in done.out.splitlines()]
    assert "There are more" in done.err
    done = await notecase("sessions", "list", "--filter", "colour = red", "--server", served.address)
    assert 1 == done.code
    assert done.err.startswith("Error: filter: unknown field")


async def test_a_session_is_shown_as_a_conversation(served: Running, case: v1.Session) -> None:
    done = await notecase("sessions", "show", "case", "--server", served.address)
    assert (0, "") == (done.code, done.err)
    blocks = done.out.split("\n\n")
    assert blocks[0].splitlines()[0] == "sessions/case The violin"
    assert [
        ["users/ada", "> /reason Hm. /say Good evening.", "  /call weather {}"],
        ["agents/detective", "Hm.", "Good evening.", "→ weather({}) failed: There is no tool 'weather'."],
        ["agents/detective", "The tools are done.", "weather failed: There is no tool 'weather'."],
    ] == [[head.split()[0], *lines] for head, *lines in map(str.splitlines, blocks[1:])]
    assert done == await notecase("sessions", "show", case.name, "--server", served.address)


async def test_a_long_session_is_shown_whole(served: Running, agent: v1.Agent) -> None:
    """Longer than one page of messages, in its order."""
    session = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent=agent.name)))
    for start in (0, 75):
        said = [v1.Message(parts=[v1.Part(text=f"line {n}")]) for n in range(start, start + 75)]
        await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=session.name, messages=said))
    done = await notecase("sessions", "show", session.name, "--server", served.address)
    assert [f"> line {n}" for n in range(150)] == [line for line in done.out.splitlines() if line.startswith("> ")]


async def test_agents_are_a_table_and_one_is_shown_with_its_instruction(served: Running, agent: v1.Agent) -> None:
    llm = v1.LlmAgent(provider="offline", model="clever-1", instruction="Be brief.\nBe kind.")
    llm.generation.temperature = 0.5
    clerk = v1.Agent(display_name="Clerk", llm=llm, output_key="draft", labels={"team": "night"})
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=clerk))
    done = await notecase("agents", "list", "--server", served.address)
    assert [
        ["AGENT", "REVISION", "MODEL", "DISPLAY", "NAME"],
        ["clerk", "1", "offline/clever-1", "Clerk"],
        ["detective", "1", "default", "Detective"],
    ] == [line.split() for line in done.out.splitlines()]
    done = await notecase("agents", "show", "clerk", "--server", served.address)
    settings, _, instruction = done.out.partition("\n\n")
    assert "agents/clerk Clerk" == settings.splitlines()[0]
    shown = dict(line.split("  ", 1) for line in settings.splitlines()[1:])
    shown = {name: value.strip() for name, value in shown.items()}
    assert shown.pop("revision").startswith("1 of ")
    assert {
        "model": "offline/clever-1",
        "generation": "temperature: 0.5",
        "output key": "draft",
        "labels": "team=night",
    } == shown
    assert "Be brief.\nBe kind.\n" == instruction


@pytest.mark.parametrize("command", [["sessions", "list"], ["logs", "s"], ["agents", "show", "a"]])
async def test_a_server_that_cannot_be_reached_is_reported_in_a_sentence(command: list[str]) -> None:
    done = await notecase(*command, env={"NOTECASE_ADDRESS": NOBODY})
    assert (4, "") == (done.code, done.out)
    assert done.err.startswith(f"Error: No server can be reached at {NOBODY}: ")


async def test_the_service_s_error_for_a_missing_resource_is_printed(served: Running) -> None:
    done = await notecase("sessions", "show", "none", "--server", served.address)
    assert (1, f"Error: {missing('sessions/none')}\n") == (done.code, done.err)
    done = await notecase("agents", "show", "none@2", "--server", served.address)
    assert (1, f"Error: {missing('agents/none@2')}\n") == (done.code, done.err)


async def test_names_and_messages_cannot_command_the_terminal(served: Running, agent: v1.Agent) -> None:
    """A display name that clears the screen, and a message that sets the window's title."""
    wicked = v1.Session(agent=agent.name, display_name="\x1b[2Jnice")
    await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="wicked", session=wicked))
    said = v1.Message(parts=[v1.Part(text="\x1b]0;title\x07\x9b31mred\r\nnext")])
    await served.messages.AppendMessages(v1.AppendMessagesRequest(parent="sessions/wicked", messages=[said]))
    done = await notecase("sessions", "list", "--server", served.address)
    assert "\ufffd[2Jnice" in done.out
    done = await notecase("sessions", "show", "wicked", "--server", served.address)
    assert "> \ufffd]0;title\ufffd\ufffd31mred\n  next\n" in done.out
