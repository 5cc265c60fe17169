"""The Tab key of a shell: installed by one command, and answered without importing the commands."""

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
from notecase import v1

from tests.cli.command import COMMAND, notecase, spawn
from tests.support.server import Running


async def test_it_installs_itself_once(tmp_path: Path) -> None:
    """For the shell that the user has, and again without writing its line twice."""
    settings = tmp_path / ".bashrc"
    settings.write_text("# mine")
    env = {"HOME": str(tmp_path), "SHELL": "/bin/bash"}
    for _ in range(2):
        done = await notecase("completion", "install", env=env)
        assert (0, "") == (done.code, done.err)
    script = tmp_path / ".local" / "share" / "notecase" / "completion.bash"
    assert f'# mine\nsource "{script}"  # completion of notecase\n' == settings.read_text()
    checked = await asyncio.create_subprocess_exec("bash", "-n", str(script))
    assert 0 == await checked.wait()
    assert 0 == (await notecase("completion", "install", "fish", env=env)).code
    assert "complete" in (tmp_path / ".config" / "fish" / "completions" / "notecase.fish").read_text()
    done = await notecase("completion", "install", env={**env, "SHELL": "/bin/ksh"})
    assert (2, True) == (done.code, "Say which shell: bash, zsh, fish." in done.err)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("notecase se", ["plain,serve", "plain,sessions"]),
        ("notecase sessions exp", ["plain,export"]),
        ("notecase sessions list --fi", ["plain,--filter"]),
        ("notecase agents list -o ", ["plain,table", "plain,json", "plain,yaml"]),
    ],
)
async def test_words_are_completed(words: str, found: list[str]) -> None:
    assert found == await completed(words)


async def completed(words: str, env: Mapping[str, str] | None = None, seconds: float = 60) -> list[str]:
    """What bash is given for the last word. Nothing is said besides. The server may take so many seconds: this machine
    may be busy."""
    asked = {"_NOTECASE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    program = f"import notecase_server.cli.lookup as up; up.SECONDS = {seconds}; import sys; sys.argv[0] = 'notecase'"
    program += "; from notecase_server.cli import main; main()"
    process = await spawn(COMMAND[0], "-c", program, env={**asked, **(env or {})})
    out, err = await process.communicate()
    assert b"" == err
    return out.decode().split()


async def test_ids_are_completed(served: Running, agent: v1.Agent) -> None:
    """Where a command takes one: of sessions, agents, runs and messages, also of several, and as whole names."""
    env = {"NOTECASE_ADDRESS": served.address}
    async with served.client() as client:
        for session in ("alpha", "alps", "beta"):
            await client.create_session(agent.name, session_id=session)
        await client.invoke("/say Hello", session="beta")
    run = (await served.runs.ListRuns(v1.ListRunsRequest(parent="sessions/beta"))).runs[0].name.rpartition("/")[2]
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent="sessions/beta"))
    messages = [f"plain,beta/{one.name.rpartition('/')[2]}" for one in reversed(listed.messages)]
    for words, found in (
        ("notecase sessions show al", ["plain,alps", "plain,alpha"]),
        ("notecase logs sessions/al", ["plain,sessions/alps", "plain,sessions/alpha"]),
        ("notecase sessions delete alpha be", ["plain,beta"]),
        ("notecase chat --session b", ["plain,beta"]),
        ("notecase run --agent d", ["plain,detective"]),
        ("notecase runs show be", ["plain,beta", f"plain,beta/{run}"]),
        ("notecase messages show beta/", messages),
        ("notecase state get a", ["plain,app", "plain,alps", "plain,alpha"]),
    ):
        assert (words, found) == (words, await completed(words, env))
    assert ["plain,beta"] == await completed(f"notecase logs --server {served.address} be")


async def test_no_ids_are_offered_without_a_server(served: Running, agent: v1.Agent, tmp_path: Path) -> None:
    """Neither where it is away, nor where it never answers, nor where a command would be run for its token."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for address in ("127.0.0.1:1", f"127.0.0.1:{port}"):
            assert [] == await completed("notecase sessions show c", {"NOTECASE_ADDRESS": address}, 0.1)
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    ran = tmp_path / "ran"
    for words in (("one", "--token-command", f"touch {ran}"), ("two", "--token", "x")):
        assert 0 == (await notecase("profiles", "set", *words, "--server", served.address, env=env)).code
    assert [] == await completed("notecase agents show ", env)
    assert ["plain,detective"] == await completed("notecase agents show --profile two ", env)
    assert not ran.exists()
    assert ["plain,one", "plain,two"] == await completed("notecase sessions list --profile ", env)
