"""Starts processes without the cost of their imports, which take a server two seconds of CPU time: they are forked from
one that has made them once. Each is a separate process, with its own memory and files."""

import asyncio
import atexit
import importlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Self

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "notecase_server.cli.applying",
        "notecase_server.cli.inbox",
        "notecase_server.cli.run",
        "notecase_server.cli.serve",
        "notecase_server.cli.sessions",
        "notecase_server.models.openai",
        "notecase_server.tools.mcp",
        "tests.support.crashing",
    ]
)


@atexit.register
def _kill() -> None:
    """Kills what a test that failed has left behind: multiprocessing would wait for its end, without a bound."""
    for process in multiprocessing.active_children():
        process.kill()


class Forked:
    """A process as asyncio's own are, as far as tests use them."""

    def __init__(self, process: ForkServerProcess, stdout: asyncio.StreamReader) -> None:
        self._process = process
        self.stdout = stdout

    @classmethod
    async def start(cls, module: str, arguments: Sequence[str], env: Mapping[str, str], log: Path) -> Self:
        """Calls the module's `main` with these arguments, in exactly this environment; what it says to standard error
        goes to the file."""
        receiver, sender = _FORKS.Pipe(duplex=False)
        process = _FORKS.Process(target=_become, args=(module, arguments, dict(env), sender, log))
        process.start()
        sender.close()
        stdout = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stdout), os.fdopen(os.dup(receiver.fileno()), "rb")
        )
        receiver.close()
        return cls(process, stdout)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    async def wait(self) -> int:
        await asyncio.to_thread(self._process.join)
        assert self.returncode is not None
        return self.returncode


async def call(module: str, arguments: Sequence[str], env: Mapping[str, str], said: bytes) -> tuple[int, bytes, bytes]:
    """Calls the module's `main` with these arguments, in exactly this environment and with this standard input, and
    returns the exit code and what it wrote to standard output and standard error."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("in", "out", "err")]
        files[0].write_bytes(said)
        process = _FORKS.Process(target=_run, args=(module, arguments, dict(env), files))
        await asyncio.to_thread(process.start)
        await asyncio.to_thread(process.join)
        assert process.exitcode is not None
        return process.exitcode, files[1].read_bytes(), files[2].read_bytes()


def _run(module: str, arguments: Sequence[str], env: Mapping[str, str], files: Sequence[Path]) -> None:
    os.environ.clear()
    os.environ.update({"GRPC_VERBOSITY": "NONE", **env})  # set by the import, which is long past
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND * (number > 0)), number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115  # for the process's life
        for number in range(3)
    )
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()


def _become(module: str, arguments: Sequence[str], env: Mapping[str, str], stdout: Connection, log: Path) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.dup2(stdout.fileno(), 1)
    stdout.close()
    with log.open("ab") as errors:
        os.dup2(errors.fileno(), 2)
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()
