"""`notecase run`: what it says comes from the command line, from a pipe and from files."""

import asyncio
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from notecase import Client, NotecaseError, Retry, v1
from notecase_server.cli import follow, piped, run
from notecase_server.cli.connection import Exit, Refusal

from tests.cli.command import COMMAND, missing, notecase, spawn
from tests.client.proxy import Proxy
from tests.support.server import Running


async def parts(served: Running) -> list[v1.Part]:
    """The parts of the first message of the newest session."""
    session = (await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions[0]
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent=session.name))
    return list(listed.messages[0].parts)


async def test_what_comes_through_a_pipe_is_said_after_the_text(served: Running, agent: v1.Agent) -> None:
    there = {"NOTECASE_ADDRESS": served.address}
    for words, said in (
        (["Explain", "this"], "Explain this\n\nthe notes\n"),
        (["Explain", "this", "-"], "Explain this\n\nthe notes\n"),
        (["-"], "the notes\n"),
        ([], "the notes\n"),
    ):
        done = await notecase("run", *words, said="the notes\n", env=there)
        assert (0, said) == (done.code, (await parts(served))[0].text)
    assert 0 == (await notecase("run", "Hello", env=there)).code
    assert "Hello" == (await parts(served))[0].text
    for command in (["run"], ["run", "-"], ["run", " "]):
        done = await notecase(*command, env=there)
        assert (2, "Error: Nothing to say.\n") == (done.code, done.err)


async def test_a_pipe_that_gives_nothing_in_time_is_refused_and_nothing_is_sent(
    served: Running, agent: v1.Agent
) -> None:
    """The text without its input may mean something else, and a script must notice."""
    process = await spawn(*COMMAND, "run", "/say Hello", env={"NOTECASE_ADDRESS": served.address})
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = await asyncio.gather(process.stdout.read(), process.stderr.read())
    await process.communicate()
    assert (2, b"", f"Error: {piped.SILENT}\n") == (process.returncode, out, err.decode())
    assert not (await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions


def test_a_silent_socket_is_refused_and_input_that_is_there_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = socket.socketpair()
    with here, there, here.makefile() as file:
        monkeypatch.setattr("sys.stdin", file)
        with pytest.raises(Refusal, match="gave nothing"):
            piped.with_input("say", 0)
        there.sendall(b"this\n")
        there.shutdown(socket.SHUT_WR)
        assert "say\n\nthis\n" == piped.with_input("say", 600)
    with Path("/dev/null").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert "say" == piped.with_input("say", 0)


def test_input_that_is_not_there_or_of_others_is_not_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as the rest of the file whose lines a loop of the shell reads."""
    lines = tmp_path / "lines"
    lines.write_text("one\ntwo\n")
    with lines.open() as file:
        os.lseek(file.fileno(), 4, os.SEEK_SET)
        monkeypatch.setattr("sys.stdin", file)
        assert "say" == piped.with_input("say", 0)
        assert 4 == os.lseek(file.fileno(), 0, os.SEEK_CUR)
    assert f"{piped.NOT_READ}\n" == capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", None)
    assert "say" == piped.with_input("say", 0)
    assert "" == capsys.readouterr().err


async def test_any_text_is_attached_and_a_type_may_be_named(served: Running, agent: v1.Agent, tmp_path: Path) -> None:
    (tmp_path / "odd:x").mkdir()
    for name in ("a.yaml", "a.rs", "Makefile", "odd:x/y"):
        (tmp_path / name).write_text("é: 1\n")
    (tmp_path / "raw").write_bytes(b"\xff")
    files = [*("a.yaml", "a.rs", "Makefile", "odd:x/y"), "raw:application/pdf"]
    options = [word for file in files for word in ("--attach", f"{tmp_path}/{file}")]
    there = {"NOTECASE_ADDRESS": served.address}
    assert 0 == (await notecase("run", "Look", *options, "--attach", "-", said="piped", env=there)).code
    assert ["text/plain"] * 4 + ["application/pdf", "text/plain"] == [
        part.blob.media_type for part in (await parts(served))[1:]
    ]
    done = await notecase("run", "Look", "--attach", f"{tmp_path}/raw", env=there)
    assert (2, True) == (done.code, "set it as FILE:TYPE" in done.err)
    assert 0 == (await notecase("run", "--attach", "-", said="piped", env=there)).code
    assert [5] == [part.blob.size_bytes for part in await parts(served)]
    done = await notecase("run", "-", "--attach", "-", said="piped", env=there)
    assert (2, True) == (done.code, "only once" in done.err)


@pytest.mark.parametrize("megabytes", [5, 17])
async def test_what_is_too_large_for_a_request_is_refused_and_not_a_server_that_is_none(
    served: Running, agent: v1.Agent, megabytes: int
) -> None:
    """By the service, and above 16 MiB by the transport."""
    done = await notecase("run", "Look", said="x" * (megabytes << 20), env={"NOTECASE_ADDRESS": served.address})
    assert (Exit.FAILED, True) == (done.code, done.err.startswith("Error: The request has ")), done.err


async def test_a_file_whose_name_is_not_utf_8_is_attached(served: Running, agent: v1.Agent, tmp_path: Path) -> None:
    """As an archive made in Latin-1 has it; a type that is not UTF-8 is refused for that."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.pdf"))
    odd.write_bytes(b"%PDF-1.7\xff")
    there = {"NOTECASE_ADDRESS": served.address}
    assert 0 == (await notecase("run", "Look", "--attach", str(odd), env=there)).code
    assert [("caf\ufffd.pdf", "application/pdf")] == [
        (part.blob.filename, part.blob.media_type) for part in (await parts(served))[1:]
    ]
    done = await notecase("blobs", "upload", str(odd), "--type", "\udcff", env=there)
    assert (2, True) == (done.code, "caf?.pdf is not UTF-8; set it with --type." in done.err)


@pytest.mark.parametrize(
    "words",
    [("run", "\udcff"), ("sessions", "show", "\udcff"), ("state", "get", "app", "\udcff")],
)
async def test_an_argument_that_is_not_utf_8_is_a_sentence(
    served: Running, agent: v1.Agent, words: Sequence[str]
) -> None:
    done = await notecase(*words, env={"NOTECASE_ADDRESS": served.address})
    refused = "Error: An argument, or the content of a file that it names, is not UTF-8.\n"
    assert (2, "", refused) == done


@pytest.mark.parametrize("form", ["json", "yaml"])
async def test_a_run_whose_stream_is_cut_before_its_end_is_not_printed(
    served: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """The command ends with the error of the stream."""
    monkeypatch.setattr(follow, "AWAY_SECONDS", -1)
    tools = [v1.Tool(name="search", client=v1.ClientTool())]
    async with Client(served.address) as direct:
        clerk = v1.Agent(llm=v1.LlmAgent(instruction="", tools=tools))
        await direct.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=clerk))
        await direct.create_session("clerk", session_id="case")
        async with Proxy(served.address) as proxy, Client(proxy.address, retry=Retry(tries=0)) as client:
            said = v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text="/call search {}")])
            running = asyncio.create_task(run._run(client, said, "", "case", form, 600))
            async with direct.attach("sessions/case", options=v1.WatchOptions(keep_open=True)) as stream:
                async for event in stream:
                    if event.run_state_changed.state == v1.Run.STATE_WAITING:
                        break
            proxy.cut()
            with pytest.raises(NotecaseError, match="UNAVAILABLE"):
                await running
    assert "STATE_" not in capsys.readouterr().out


@pytest.mark.parametrize("form", ["json", "yaml"])
async def test_a_run_that_the_user_let_go_of_is_not_printed(
    served: Running, agent: v1.Agent, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """As after a second Ctrl-C at a terminal."""

    class LetGo(follow.Follower):
        async def follow(self) -> bool:
            async with self._stream:
                return False

    monkeypatch.setattr(run, "Follower", LetGo)
    async with Client(served.address) as client:
        said = v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text="/pause 9000 /chunks 100")])
        assert Exit.FAILED == await run._run(client, said, "", "", form, None)
        (left,) = (await client.runs.ListRuns(v1.ListRunsRequest(parent="sessions/-"))).runs
        await client.cancel(left.name)
    assert "STATE_" not in capsys.readouterr().out


async def test_a_new_session_is_named_after_its_first_words(served: Running, agent: v1.Agent, tmp_path: Path) -> None:
    there = {"NOTECASE_ADDRESS": served.address}
    await notecase("run", "What", "is this?", env=there)
    (session,) = (await served.sessions.ListSessions(v1.ListSessionsRequest())).sessions
    assert "What is this?" == session.display_name


async def test_where_a_session_s_agent_was_deleted_another_may_answer(served: Running, agent: v1.Agent) -> None:
    there = {"NOTECASE_ADDRESS": served.address}
    await served.sessions.CreateSession(
        v1.CreateSessionRequest(session_id="case", session=v1.Session(agent=agent.name))
    )
    await served.agents.DeleteAgent(v1.DeleteAgentRequest(name=agent.name))
    done = await notecase("run", "Hello", "--session", "case", env=there)
    assert (1, f"Error: {missing('agents/detective')} --agent chooses another.\n") == (done.code, done.err)
    done = await notecase("chat", "--session", "case", said="Hello", env=there)
    assert (1, f"{missing('agents/detective')} `notecase chat --agent` chooses another.\n") == (
        done.code,
        done.err,
    )
