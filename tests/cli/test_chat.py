"""`notecase chat`: through a pipe, where each line is a message, and at a real terminal."""

import asyncio
import signal
from pathlib import Path

from notecase import v1

from tests.cli.command import COMMAND, missing, notecase, spawn, terminal
from tests.client.proxy import Proxy
from tests.support.server import Running


async def messages(served: Running, session: str) -> list[tuple[str, str]]:
    """The role and the text of each message of a session."""
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session, page_size=1000))
    return [
        (v1.Message.Role.Name(message.role)[5:].lower(), "".join(part.text for part in message.parts))
        for message in listed.messages
    ]


async def states(served: Running, session: str) -> list[str]:
    """How the runs of a session ended, the first one first."""
    listed = await served.runs.ListRuns(v1.ListRunsRequest(parent=session))
    return [v1.Run.State.Name(run.state)[6:] for run in reversed(listed.runs)]


async def only_session(served: Running) -> v1.Session:
    (session,) = (await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions
    return session


async def open_case(served: Running, agent: v1.Agent) -> str:
    request = v1.CreateSessionRequest(session_id="case", session=v1.Session(agent=agent.name))
    return (await served.sessions.CreateSession(request)).name


async def test_each_line_of_a_pipe_is_a_message_and_each_reply_goes_to_standard_output(
    served: Running, agent: v1.Agent
) -> None:
    """In one new session, with the only agent there is, named by its first words. Standard error tells which."""
    done = await notecase("chat", "--server", served.address, said="/say Good evening.\n\n/chunks 3\n/say The end.")
    session = await only_session(served)
    assert (0, "Good evening.\n1 2 3\nThe end.\n", f"{session.name} with agents/detective\n") == done
    assert ("agents/detective", "/say Good evening.") == (session.agent, session.display_name)
    assert ["SUCCEEDED"] * 3 == await states(served, session.name)


async def test_content_and_sources_are_named_next_to_the_reply(served: Running, agent: v1.Agent) -> None:
    """On standard error, as each came; nothing in them can command the terminal."""
    await open_case(served, agent)
    directives = "/say Here: /image /cite https://example.org/\x1b[2J\n"
    done = await notecase("chat", "--session", "case", "--server", served.address, said=directives)
    named = ["[1] example.org https://example.org/\ufffd[2J", "[image-1.png, image/png, 69 bytes]"]
    assert (0, "Here:\n", named) == (done.code, done.out, done.err.splitlines())
    done = await notecase("sessions", "show", "case", "--server", served.address)
    assert ["Here:", *named] == done.out.split("\n\n")[-1].splitlines()[1:]


async def test_a_session_is_resumed(served: Running, agent: v1.Agent) -> None:
    """By id or by name, with its history shown to the model and nothing but the reply on standard output."""
    await open_case(served, agent)
    for session in ("case", "sessions/case"):
        done = await notecase("chat", "--session", session, "--server", served.address, said="/say Here.\n")
        assert (0, "Here.\n", "") == done
    done = await notecase("chat", "--session", "case", "--server", served.address, said="And now?\n")
    assert "You said: And now?\nMy instruction is: The case: .\nThis request had 5 messages.\n" == done.out


async def test_a_line_that_is_too_long_for_a_message_ends_the_chat(served: Running, agent: v1.Agent) -> None:
    """It is not read to its end, which may never come."""
    done = await notecase("chat", "--server", served.address, said="x" * ((32 << 20) + 1))
    assert (2, True) == (done.code, "A line of standard input has more than 33554432 characters." in done.err)


async def test_a_session_of_a_chosen_id_is_opened_once(served: Running, agent: v1.Agent) -> None:
    new = ("chat", "--new", "--session", "case", "--server", served.address)
    assert 0 == (await notecase(*new)).code
    assert "sessions/case" == (await only_session(served)).name
    done = await notecase(*new, said="Hello\n")
    assert (1, "", "Error: There is already a session 'sessions/case'; choose another id.\n") == done


async def test_another_agent_answers_in_a_resumed_session(served: Running, agent: v1.Agent) -> None:
    await open_case(served, agent)
    clerk = v1.Agent(llm=v1.LlmAgent(instruction="Be brief."))
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=clerk))
    there = {"NOTECASE_ADDRESS": served.address, "NOTECASE_AGENT": "clerk@1"}
    done = await notecase("chat", "--session", "case", env=there, said="Hello\n")
    assert "My instruction is: Be brief.\n" in done.out
    assert "agents/detective" == (await only_session(served)).agent


async def test_notes_are_put_and_shown(served: Running, agent: v1.Agent) -> None:
    """JSON keeps its type, all else is text, and the next reply knows them."""
    said = '/notes\n/note case the missing violin\n/note seen  3\n/note tags ["a", 1.5]\n/notes\nWell?\n'
    done = await notecase("chat", "--server", served.address, said=said)
    notes, _, reply = done.out.partition('tags = ["a", 1.5]\n')
    assert "case = the missing violin\nseen = 3\n" == notes
    assert "My instruction is: The case: the missing violin.\n" in reply
    assert done.err.startswith("This state has no keys.\n")
    async with served.client() as client:
        held = await client.get_state((await only_session(served)).name)
    assert {"case": "the missing violin", "seen": 3, "tags": ["a", 1.5]} == held


async def test_a_file_goes_with_what_is_said_next(served: Running, agent: v1.Agent, tmp_path: Path) -> None:
    """It is sent once, even if the run fails; a path that is not a file is reported, and nothing is lost."""
    plan = tmp_path / "plan.pdf"
    plan.write_bytes(b"%PDF-1.7")
    (tmp_path / "unknown").write_bytes(b"\xff")
    lines = [
        f"/attach {tmp_path}/missing.pdf",
        f"/attach {tmp_path}/unknown",
        "/attach",
        f"/attach {plan}",
        "Look",
        "So?",
        f"/attach {plan}",
        "/fail error",
        "And now?",
    ]
    done = await notecase("chat", "--server", served.address, "--new", said="\n".join(lines))
    assert "missing.pdf cannot be read: No such file or directory." in done.err
    assert "The media type of" in done.err
    assert "plan.pdf, application/pdf, 8 bytes is attached to your next message." in done.err
    assert "You showed me: application/pdf of 8 B (plan.pdf), which I cannot see" in done.out
    (session,) = (await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session.name))
    asked = [one for one in listed.messages if one.role == v1.Message.ROLE_USER]
    said = [[part.WhichOneof("kind") for part in one.parts] for one in asked]
    assert said == [["text", "blob"], ["text"]] * 2


async def test_notes_are_put_and_shown_at_a_terminal(served: Running, agent: v1.Agent) -> None:
    """And cannot command it."""
    async with terminal("chat", "--server", served.address) as screen:
        await screen.until("> ")
        await screen.type("/note seen 3\r")
        await screen.until("seen = 3")
        await screen.until("> ")
        await screen.type(r'/note title "\u001b]0;x"' + "\r")
        await screen.until("title = \ufffd]0;x")
        await screen.until("> ")
        await screen.type("/notes\r")
        await screen.until("seen = 3\ntitle = \ufffd]0;x\n")
        await screen.until("> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    async with served.client() as client:
        assert {"seen": 3, "title": "\x1b]0;x"} == await client.get_state((await only_session(served)).name)


async def test_a_note_that_cannot_be_stored_is_reported_and_the_conversation_continues(
    served: Running, agent: v1.Agent
) -> None:
    wrong = [str(1 << 63), r'"\ud800"', "[" * 400 + "]" * 400, "[" * 17 + "]" * 17, "1e999"]
    said = [f"/note wrong {value}" for value in wrong]
    done = await notecase(
        *("chat", "--server", served.address), said="\n".join(["/note", "/note novalue", *said, "/say Still here."])
    )
    assert (1, "Still here.\n") == (done.code, done.out)
    assert 2 == done.err.count("Set a note with /note KEY VALUE.\n")
    assert 3 == done.err.count("State cannot hold this value: ")
    async with served.client() as client:
        assert {} == await client.get_state((await only_session(served)).name)


async def test_unknown_slash_words_are_said(served: Running, agent: v1.Agent) -> None:
    """As is a command after a space; /quit leaves what follows unsaid."""
    said = "/unheard of\n /notes\n/quit\n/say Too late.\n"
    done = await notecase("chat", "--server", served.address, said=said)
    session = await only_session(served)
    said_by_user = [text for role, text in await messages(served, session.name) if role == "user"]
    assert ["/unheard of", " /notes"] == said_by_user
    assert 0 == done.code


async def test_a_mistyped_command_is_said_only_if_it_is_meant(served: Running, agent: v1.Agent) -> None:
    """At a terminal, where a user can be asked."""
    async with terminal("chat", "--new", "--server", served.address) as screen:
        await screen.until("> ")
        await screen.type("/quti\r")
        await screen.until("/quti is not a command; /quit is.")
        await screen.until(">  2. Do nothing")
        await screen.type("\r")
        await screen.until("\n> ")
        await screen.type("/hlep\r")
        await screen.until(">  2. Do nothing")
        await screen.type("1\r")
        await screen.until("You said: /hlep")
        await screen.until("\n> ")
        await screen.type("/help\r")
        await screen.until("` /help` asks the model")
        await screen.until("\n> ")
        await screen.type("/quit\r")
        assert 0 == await screen.ended()
    session = await only_session(served)
    assert ["/hlep"] == [text for role, text in await messages(served, session.name) if role == "user"]


async def test_a_failed_run_is_a_sentence_and_the_next_line_is_said(served: Running, agent: v1.Agent) -> None:
    """What had come of the reply stays; the exit code tells that one line had none."""
    said = "/fail error\n/fail midway /chunks 4\n/say Better.\n"
    done = await notecase("chat", "--server", served.address, said=said)
    assert (1, "Better.") == (done.code, done.out.splitlines()[-1])
    assert "The offline model was asked to fail.\n" in done.err
    assert "The offline model was asked to fail midway.\n" in done.err
    assert ["FAILED", "FAILED", "SUCCEEDED"] == await states(served, (await only_session(served)).name)


async def test_only_the_agent_s_words_go_to_standard_output(served: Running, agent: v1.Agent) -> None:
    """A refusal is marked, a tool call goes to standard error with its outcome, reasoning nowhere in a pipe."""
    said = '/reason Hm. /refuse No, thanks.\n/say Let me see. /call weather {"city": "Oslo"}\n'
    done = await notecase("chat", "--server", served.address, said=said)
    outcome = "failed: There is no tool 'weather'."
    assert f"refused: No, thanks.\nLet me see.\nThe tools are done.\nweather {outcome}\n" == done.out
    assert f'→ weather({{"city": "Oslo"}}) {outcome}\n' in done.err


async def test_words_cannot_command_the_terminal(served: Running, agent: v1.Agent) -> None:
    """Nor do bytes that are no text stop anything."""
    process = await spawn(*COMMAND, "chat", "--server", served.address)
    out, _ = await process.communicate(b"/say \x1b]0;title\x07 caf\xc3\xa9 \xff\n")
    assert "\ufffd]0;title\ufffd café \ufffd\n" == out.decode()


async def test_what_is_missing_is_a_sentence_and_exit_code_1(served: Running) -> None:
    there = {"NOTECASE_ADDRESS": served.address}
    assert (1, "", f"Error: {missing('sessions/none')}\n") == await notecase("chat", "--session", "none", env=there)
    assert (1, "", f"Error: {missing('agents/none')}\n") == await notecase("chat", "--agent", "none", env=there)
    done = await notecase("chat", said="Hello\n", env=there)
    assert 1 == done.code
    assert done.err.startswith("Error: There is no agent yet;")
    for name in ("clerk", "tutor"):
        await served.agents.CreateAgent(
            v1.CreateAgentRequest(agent_id=name, agent=v1.Agent(llm=v1.LlmAgent(instruction="")))
        )
    done = await notecase("chat", said="Hello\n", env=there)
    assert 1 == done.code
    assert done.err == "Error: There are several agents (clerk, tutor); choose one with --agent.\n"
    done = await notecase("chat", said="Hello\n", env={"NOTECASE_ADDRESS": "127.0.0.1:1"})
    assert 4 == done.code
    assert done.err.startswith("Error: No server can be reached at 127.0.0.1:1: ")
    assert "refused. Start one with `notecase serve`" in done.err


async def test_a_broken_connection_leaves_no_trace_in_the_reply(served: Running, agent: v1.Agent) -> None:
    async with Proxy(served.address) as proxy:
        process = await spawn(*COMMAND, "chat", "--server", proxy.address)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"/pause 10 /chunks 100\n")
        process.stdin.write_eof()
        shown = await process.stdout.readuntil(b" 9 ")
        proxy.cut()
        rest, err = await process.communicate()
    assert " ".join(map(str, range(1, 101))) + "\n" == (shown + rest).decode()
    assert f"{(await only_session(served)).name} with agents/detective\n" == err.decode()
    assert 0 == process.returncode
    assert proxy.opened >= 2


async def test_an_interrupt_in_a_pipe_cancels_the_reply_and_says_no_more(served: Running, agent: v1.Agent) -> None:
    process = await spawn(*COMMAND, "chat", "--server", served.address)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"/pause 50 /chunks 10000\n/say Too late.\n")
    await process.stdout.readuntil(b" 3 ")
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert 130 == process.returncode
    assert err.decode().endswith("Cancelled: Ctrl-C\n")
    assert ["CANCELLED"] == await states(served, (await only_session(served)).name)


async def test_ctrl_c_cancels_the_reply_and_keeps_the_session(served: Running, agent: v1.Agent) -> None:
    """The log holds what was generated as an incomplete message, and the same session goes on."""
    async with terminal("chat", "--new", "--server", served.address) as screen:
        await screen.until("agents/detective answers.")
        await screen.until("> ")
        await screen.type("/pause 50 /chunks 10000\r")
        await screen.until(" 3 ")
        await screen.type("\x03")
        await screen.until("Cancelled: Ctrl-C")
        await screen.until("> ")
        await screen.type("Are you still there?\r")
        await screen.until("You said: Are you still there?")
        await screen.until("> ")
        await screen.type("\x03")
        assert 0 == await screen.ended()
    session = await only_session(served)
    assert f"`notecase chat --session {session.name[9:]}` continues this conversation." in screen.screen
    assert ["CANCELLED", "SUCCEEDED"] == await states(served, session.name)
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session.name))
    completed, incomplete = v1.Message.STATUS_COMPLETED, v1.Message.STATUS_INCOMPLETE
    assert [completed, incomplete, completed, completed] == [message.status for message in listed.messages]
    assert listed.messages[1].parts[0].text.startswith("1 2 3 ")


async def test_without_an_agent_one_is_made_and_ctrl_d_leaves(served: Running) -> None:
    async with terminal("chat", "--server", served.address) as screen:
        await screen.until("There is no agent yet.")
        await screen.until("> ")
        await screen.type("You are a pirate.\r")
        await screen.until("agents/assistant answers.")
        await screen.until("> ")
        await screen.type("Ahoy\r")
        await screen.until("My instruction is: You are a pirate.")
        await screen.until("> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    assert "agents/assistant" == (await only_session(served)).agent


async def test_looking_in_leaves_no_session(served: Running, agent: v1.Agent) -> None:
    async with terminal("chat", "--server", served.address) as screen:
        await screen.until("/help lists the commands.")
        await screen.until("> ")
        await screen.type("/help\r")
        await screen.until("/note KEY VALUE")
        await screen.until("> ")
        await screen.type("/quit\r")
        assert 0 == await screen.ended()
    assert [] == list((await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions)


async def test_a_session_is_chosen_from_a_list_and_shows_its_last_messages(served: Running, agent: v1.Agent) -> None:
    """Pasted lines stay one message, and the arrow keys recall what was said before."""
    session = await open_case(served, agent)
    said = [v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text=f"line {n}")]) for n in range(10)]
    await served.messages.AppendMessages(v1.AppendMessagesRequest(parent=session, messages=said))
    async with terminal("chat", "--server", served.address) as screen:
        await screen.until("1. A new one")
        await screen.until("2. case")
        await screen.type("2\r")
        await screen.until("sessions/case: agents/detective answers.")
        await screen.until("> line 4")
        await screen.until("> line 9")
        await screen.until("> ")
        await screen.type("\x1b[200~pasted\nlines\x1b[201~\r")
        await screen.until("You said: pasted")
        await screen.until("> ")
        await screen.type("\x1b[A\x1b[A\x1b[A\r")
        await screen.until("You said: line 9")
        await screen.until("> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    assert "line 3" not in screen.screen
    assert ["pasted\nlines", "line 9"] == [text for role, text in await messages(served, session) if role == "user"][
        10:
    ]


async def test_a_resumed_session_shows_the_run_that_is_under_way(served: Running, agent: v1.Agent) -> None:
    """And Ctrl-C cancels that, too."""
    session = await open_case(served, agent)
    start = v1.StartRun(session=session, messages=[v1.Message(parts=[v1.Part(text="/pause 50 /chunks 10000")])])
    await served.runs.CreateRun(v1.CreateRunRequest(start=start))
    async with terminal("chat", "--session", "case", "--server", served.address) as screen:
        await screen.until("> /pause 50 /chunks 10000")
        await screen.until("1 2 3 ")
        await screen.type("\x03")
        await screen.until("Cancelled: Ctrl-C")
        await screen.until("> ")
        await screen.type("\x04")
        assert 0 == await screen.ended()
    assert 1 == screen.screen.count("/pause 50")
    assert ["CANCELLED"] == await states(served, session)


async def test_a_session_that_is_busy_shows_what_with(served: Running, agent: v1.Agent) -> None:
    """Two terminals on one session: the second sees the first one's run, and says its words afterwards."""
    await open_case(served, agent)
    where = ("chat", "--session", "case", "--server", served.address)
    async with terminal(*where) as first, terminal(*where) as second:
        await asyncio.gather(first.until("> "), second.until("> "))
        await first.type("/pause 50 /chunks 10000\r")
        await first.until(" 3 ")
        await second.type("/say Me too.\r")
        await second.until("The session is busy")
        await second.until(" 3 ")
        await first.type("\x03")
        for screen in (first, second):
            await screen.until("Cancelled: Ctrl-C")
            await screen.until("> ")
        await second.type("\x1b[A\r")
        await second.until("Me too.\n")
        await second.until("> ")
        for screen in (first, second):
            await screen.type("\x04")
            assert 0 == await screen.ended()


async def test_a_line_next_to_the_reply_reports_a_summary(served: Running) -> None:
    """On standard error, so that a pipe holds nothing but what the agent says."""
    kept = v1.Context(summary=v1.Context.Summary(keep_recent=1, batch=1, instruction="/say They met."))
    agent = v1.Agent(llm=v1.LlmAgent(context=kept))
    await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id="archivist", agent=agent))
    done = await notecase("chat", "--server", served.address, said="/say One.\n/say Two.\n")
    assert (0, "One.\nTwo.\n") == (done.code, done.out)
    assert "Summarised for the model: They met." == done.err.splitlines()[-1]
