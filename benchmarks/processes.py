"""The processes of a benchmark: started on a given CPU, measured from outside, and ended by the process that started
them."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple, Self

import psutil

STOP_SECONDS = 20.0
"""More than a server's own grace period; what is not gone then is killed."""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def end_on_sigterm() -> None:
    """Ends the current task at SIGTERM as an interrupt does, so that its servers end with this process."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


class Cpus(NamedTuple):
    """Where the processes run."""

    server: int
    load: int
    """Also the model's. The server's own when the machine has only one."""

    @classmethod
    def choose(cls) -> Self:
        allowed = sorted(os.sched_getaffinity(0))
        return cls(allowed[0], allowed[-1])


class Process:
    """A process that printed its port on its first line."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.port = port
        self._process = process
        self._info = psutil.Process(process.pid)
        # Linux makes a process's CPU clock from its number like this (clock_getcpuclockid). It counts nanoseconds, of
        # threads that have ended too, where /proc counts hundredths of a second.
        self._clock = (~process.pid << 3) | 2

    @property
    def pid(self) -> int:
        return self._process.pid

    def cpu(self) -> float:
        """Seconds of CPU time used so far, user and system."""
        return time.clock_gettime(self._clock)

    def resident(self) -> int:
        """Bytes of memory held."""
        return self._info.memory_info().rss

    def forget_peak(self) -> None:
        """Resets the peak to the current value."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        """The most bytes of memory held so far."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10

    async def last_words(self) -> str:
        """Asks it to stop, and returns what it says then; empty where it ended by itself before."""
        if self._process.returncode is not None:
            return ""
        await self.stop()
        assert self._process.stdout is not None
        return (await self._process.stdout.read()).decode().strip()

    def descriptors(self) -> int:
        """Files, sockets and the like that are open."""
        return self._info.num_fds()

    def threads(self) -> int:
        return self._info.num_threads()

    async def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@contextlib.asynccontextmanager
async def running(
    cpu: int, log: Path, *arguments: str, env: dict[str, str], python: str = sys.executable
) -> AsyncIterator[Process]:
    """`python` with these arguments on one CPU, until the block is left. `env` is its whole environment; its standard
    error is appended to `log`. Raises RuntimeError, with the log, when it ends before it has a port."""
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            python, *arguments, env=env, stdout=asyncio.subprocess.PIPE, stderr=errors
        )
    os.sched_setaffinity(process.pid, {cpu})
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    if not line:
        await process.wait()
        raise RuntimeError(f"{' '.join(arguments)} did not start; its last words are in {log}")
    started = Process(process, int(line.split()[-1]))
    try:
        yield started
    finally:
        await started.stop()


def with_model(port: int | None) -> dict[str, str]:
    """The environment of a server that asks the stub at that port, or without one the offline model."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "NOTECASE_"))}
    return env if port is None else env | {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": "none"}


@contextlib.asynccontextmanager
async def running_server(
    cpu: int, folder: Path, name: str, model_port: int | None, *module: str, key: str = "", store: str = ""
) -> AsyncIterator[Process]:
    """`notecase serve` over a new SQLite file `name` in `folder` or another `store`, with the stub as its model, or
    without a port with the offline one; by another `module` with its first arguments, where one is given. With a `key`
    callers need it."""
    program = ("-m", *(module or ("notecase_server",)))
    arguments = ("serve", "--listen", "127.0.0.1:0", "--store", store or f"sqlite:{folder / name}.db")
    env = with_model(model_port) | ({"NOTECASE_ADMIN_KEY": key} if key else {})
    async with running(cpu, folder / f"{name}.log", *program, *arguments, env=env) as server:
        yield server


@contextlib.asynccontextmanager
async def running_stub(cpu: int, folder: Path) -> AsyncIterator[Process]:
    """The model of `benchmarks.stub`."""
    async with running(cpu, folder / "stub.log", "-m", "benchmarks.stub", env=dict(os.environ)) as stub:
        yield stub
