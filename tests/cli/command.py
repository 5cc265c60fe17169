"""Runs the `notecase` command as its users do: in a separate process, with pipes or with a terminal."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple

import pyte

from tests.support.forking import call

COMMAND = (sys.executable, "-m", "notecase_server")

ON_A_TERMINAL = (
    *(sys.executable, "-c"),
    "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))",
)
"""Passes its pipes on to a terminal that the command is in the foreground of."""

OF_A_SIZE = ("sh", "-c", 'stty rows "$LINES" cols "$COLUMNS"; unset LINES COLUMNS; exec "$@"', "sh")
"""Gives the terminal its size, and goes on as the command."""

CONTROL = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[=>])|\r")
"""What a terminal obeys and does not show."""


def missing(name: str) -> str:
    """What a command says of a session or an agent that does not exist, by its name."""
    collection = name.partition("/")[0]
    return f"There is no {collection[:-1]} {name!r}. `notecase {collection} list` lists those that exist."


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of this process, without settings of the user who runs the tests."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "NOTECASE_", "XDG_"))}
    keep["HOME"] = "/nonexistent"  # where there are no profiles
    return {**keep, "PYTHONIOENCODING": "utf-8", **(extra or {})}


async def spawn(*arguments: str, env: Mapping[str, str] | None = None) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*arguments, env=environment(env), stdin=pipe, stdout=pipe, stderr=pipe)


async def notecase(*arguments: str, said: str = "", env: Mapping[str, str] | None = None) -> Done:
    """Runs the command to its end; `said` is all of its standard input. None may end with a traceback."""
    code, out, err = await call("notecase_server.cli", arguments, environment(env), said.encode())
    assert "Traceback" not in err.decode()
    return Done(code, out.decode(), err.decode())


class Terminal:
    """The command on a terminal, which a test types at and reads."""

    def __init__(self, process: asyncio.subprocess.Process, lines: int, columns: int) -> None:
        self._process = process
        self._raw = b""
        self._read = 0
        self._window = pyte.HistoryScreen(columns, lines, history=10_000)
        self._stream = pyte.ByteStream(self._window)

    @property
    def screen(self) -> str:
        """All that has been shown, as text, each time that it was."""
        return CONTROL.sub("", self._raw.decode(errors="ignore"))

    @property
    def window(self) -> list[str]:
        """The lines that are to be seen now, without the empty ones."""
        return [line.rstrip() for line in self._window.display if line.strip()]

    @property
    def paper(self) -> list[str]:
        """The lines of the window, and before them those that have left it at its top; without the empty ones."""
        gone = ["".join(line[x].data for x in range(self._window.columns)) for line in self._window.history.top]
        return [line.rstrip() for line in gone if line.strip()] + self.window

    async def until(self, text: str) -> None:
        """Returns once that is shown, after what was last waited for."""
        assert self._process.stdout is not None
        while (found := self.screen.find(text, self._read)) < 0:
            data = await self._process.stdout.read(1 << 16)
            assert data, f"ended without {text!r}: {self.screen}"
            self._take(data)
        self._read = found + len(text)

    async def seen(self, text: str) -> None:
        """Returns once that is to be seen in the window, on one line."""
        assert self._process.stdout is not None
        while not any(text in line for line in self.window):
            data = await self._process.stdout.read(1 << 16)
            assert data, f"ended without {text!r}: {self.window}"
            self._take(data)

    def _take(self, data: bytes) -> None:
        self._raw += data
        self._stream.feed(data)

    async def type(self, keys: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(keys.encode())
        await self._process.stdin.drain()

    async def ended(self) -> int:
        """Its exit code, once everything shown is on the screen."""
        assert self._process.stdout is not None
        self._take(await self._process.stdout.read())
        return await self._process.wait()


@asynccontextmanager
async def terminal(
    *arguments: str, env: Mapping[str, str] | None = None, lines: int = 50, columns: int = 100
) -> AsyncIterator[Terminal]:
    """The command on a terminal that cannot tell where its cursor is; it has ended when the block is left."""
    size = {"LINES": str(lines), "COLUMNS": str(columns)}
    env = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **size, **(env or {})}
    process = await spawn(*ON_A_TERMINAL, *OF_A_SIZE, *COMMAND, *arguments, env=env)
    try:
        yield Terminal(process, lines, columns)
    finally:
        if process.returncode is None:
            process.kill()  # closes the terminal, which ends the command
        await process.communicate()
