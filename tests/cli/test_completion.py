"""The Tab key of a shell: installed by one command, and answered without importing the commands."""

import asyncio
from pathlib import Path

import pytest

from tests.cli.command import COMMAND, notecase, spawn


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
    assert (2, True) == (done.code, "Name a shell: bash, zsh, fish." in done.err)


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
    env = {"_NOTECASE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    program = "import sys; sys.argv[0] = 'notecase'; from notecase_server.cli import main; main()"
    process = await spawn(COMMAND[0], "-c", program, env=env)
    out, _ = await process.communicate()
    assert found == out.decode().splitlines()
