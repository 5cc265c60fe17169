"""Where a server's time goes, from the model's socket to the client's: `python -m benchmarks.where [--write FILE]`.

py-spy samples the server many times a second, from outside: the stack of each thread that has work, with frames of
Python and of C. Each sample counts for the part of its innermost known frame, so that the C library and the system
count for their callers. What the server's clock says that a turn or a token cost is shared out by these counts.
"""

import argparse
import asyncio
import collections
import os
import re
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import uvloop

from benchmarks.load import Load
from benchmarks.processes import Cpus, Process, end_on_sigterm, running_server, running_stub, say
from benchmarks.targets import digits, markdown
from benchmarks.written import write

LOOKS = 20
"""A second. Each stops the server while its C frames are read, so with many it would do nothing else."""

TOKENS = 200
"""Of one reply, where tokens are counted."""

PARTS: Mapping[str, str] = {
    "The model's answer, read (`models/`)": r"notecase_server/models/",
    "The engine (`engine/`)": r"notecase_server/engine/",
    "The store's Python (`store/`)": r"notecase_server/store/",
    "Calls, frames and events to callers (`rpc/`)": r"notecase_server/rpc/",
    "What else is ours": r"notecase_server/|notecase/",
    "SQLite": r"sqlite3",
    "Protobuf": r"google/_upb|_message|google/protobuf|upb",
    "msgspec": r"msgspec",
    "HTTP to the model (aiohttp)": r"aiohttp/|_http_parser|yarl/|multidict|openai/|httpx2?/|anyio/|pydantic",
    "gRPC": r"cygrpc|grpc/",
    "The log's lines (structlog)": r"structlog/|logging/",
    "The event loop": r"uvloop|asyncio/|contextlib|contextvars",
    "Hand-overs between threads": r"concurrent/|threading|queue\.py|_queue",
}
"""What each part's frames look like, by the file or the library that they are in. Of one frame, the first that fits."""

REST = "The rest"

_WAITS = re.compile(r"(0x\w+|epoll_p?wait|f(data)?sync|futex\w*|poll|select|sem_\w*wait|pthread_cond_\w+) \(libc[.-]")
"""Where a thread waits in the C library, which has no name everywhere. That takes no CPU time."""

_FRAME = re.compile(r"\(([^()]*?)(?::\d+)?\)$")


class Work(NamedTuple):
    """What the server is looked at while it does."""

    name: str
    unit: str
    tokens: int
    pause_ms: int
    at_once: int
    turns: int
    counts_tokens: bool


WORKS = (
    Work("a turn of one token, 8 at once", "turn", 1, 0, 8, 4000, False),
    Work("a token, 8 streams flat out", "token", TOKENS, 0, 8, 1600, True),
    Work("a token, 32 streams, one every 10 ms", "token", TOKENS, 10, 32, 256, True),
)


def part_of(stack: str) -> str:
    """The part that a stack, outermost frame first, counts for."""
    for frame in reversed(stack.split(";")):
        found = _FRAME.search(frame)
        for part, pattern in PARTS.items() if found else ():
            if re.search(pattern, found[1]):  # type: ignore[index]
                return part
    return REST


def shares(stacks: Iterable[str]) -> dict[str, float]:
    """Of each part the share of all looks at work; `stacks` are lines of a stack, a space and a count."""
    counts: collections.Counter[str] = collections.Counter()
    for line in stacks:
        stack, _, count = line.rstrip().rpartition(" ")
        if not _WAITS.match(stack.rpartition(";")[2]):
            counts[part_of(stack)] += int(count)
    return {part: count / counts.total() for part, count in counts.items()}


async def looked_at(server: Process, output: Path, work: Callable[[], Awaitable[None]]) -> list[str]:
    """Does the work while py-spy looks at the server; returns the stacks that it saw."""
    looks = ("record", "--rate", f"{LOOKS}", "--native", "--format", "raw", "--duration", "3600")
    spy = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("py-spy")), *looks, "--output", str(output), "--pid", f"{server.pid}",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    assert spy.stdout is not None
    await spy.stdout.readline()  # it says that it looks
    try:
        await work()
    finally:
        spy.send_signal(signal.SIGINT)
        told, _ = await spy.communicate()
    return _seen(output, told)


def _seen(output: Path, told: bytes) -> list[str]:
    if not output.exists():
        raise RuntimeError(f"py-spy saw nothing: {told.decode()}")
    return output.read_text().splitlines()


async def measured(work: Work, load: Load, server: Process, folder: Path) -> tuple[float, dict[str, float]]:
    """The microseconds of one unit of the work, unobserved, and the share of each part in them."""
    agent = await load.agent(work.tokens, work.pause_ms)
    each = 10 if work.turns > work.at_once * 10 else work.turns // work.at_once

    async def turns(share: float) -> float:
        sessions = await load.new_sessions(max(work.at_once, int(work.turns * share / each)))
        before = server.cpu()
        await load.conversations(sessions, each, agent, work.tokens, at_once=work.at_once)
        units = len(sessions) * each * (work.tokens if work.counts_tokens else 1)
        return (server.cpu() - before) / units * 1e6

    async def observed() -> None:
        await turns(1)

    await turns(0.1)  # what is done once is done now
    cost = await turns(0.5)
    return cost, shares(await looked_at(server, folder / "stacks", observed))


async def run(options: argparse.Namespace) -> None:
    end_on_sigterm()
    cpus = Cpus.choose()
    os.sched_setaffinity(0, {cpus.load})
    columns: list[tuple[Work, float, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="notecase-where-") as name:
        folder = Path(name)
        async with running_stub(cpus.load, folder) as model:
            for number, work in enumerate(WORKS):
                async with (
                    running_server(cpus.server, folder, f"where{number}", model.port) as server,
                    Load.connect(server.port) as load,
                ):
                    say(f"Looking at {work.name}.")
                    columns.append((work, *await measured(work, load, server, folder)))
    lines = list(table(columns))
    for line in lines:
        say(line)
    if options.write:
        write(options.write, lines)


def table(columns: list[tuple[Work, float, dict[str, float]]]) -> Iterable[str]:
    """The lines of a Markdown table: microseconds of each part, in the order of the first column."""
    parts = sorted((*PARTS, REST), key=lambda part: -columns[0][2].get(part, 0))
    yield from markdown(
        [
            ("CPU µs", *(work.name for work, _, _ in columns)),
            *((part, *(digits(cost * found.get(part, 0)) for _, cost, found in columns)) for part in parts),
            ("All", *(digits(cost) for _, cost, _ in columns)),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.where", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this page, with when and where")
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
