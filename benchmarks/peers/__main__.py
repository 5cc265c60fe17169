"""Measures the peers and notecase, and prints the table: `python -m benchmarks.peers [--rounds 3]`."""

import argparse
import os
import statistics
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import uvloop

from benchmarks.load import Caller, Load
from benchmarks.measures import Side, Values, short_turns, tokens
from benchmarks.peers.callers import A2aSdk, AgentsSdk
from benchmarks.processes import Cpus, end_on_sigterm, running, running_server, running_stub, say, with_model
from benchmarks.targets import digits, markdown

ENVIRONMENTS = Path(".venv-peers")

FIGURES = {
    "token-flat": ("CPU per token, 8 streams flat out", "µs"),
    "token-paced": ("CPU per token, 32 streams, one every 10 ms", "µs"),
    "turn": ("CPU per turn of one token, 8 at once", "ms"),
}


class Peer(NamedTuple):
    """A program of this folder, named like its environment."""

    module: str
    what: str
    packages: tuple[str, ...]
    connect: Callable[[int], AbstractAsyncContextManager[Caller]]

    def title(self) -> str:
        """What it is, with the versions of its packages."""
        sites = [str(site) for site in (ENVIRONMENTS / self.module).glob("lib/python*/site-packages")]
        found = {found.name: found.version for found in metadata.distributions(path=sites)}
        return f"{self.what} ({', '.join(f'{package} {found[package]}' for package in self.packages)})"


PEERS = (
    Peer("agents_sdk", "Agents SDK, SQLite, FastAPI", ("openai-agents", "fastapi"), AgentsSdk.connect),
    Peer("a2a_sdk", "A2A SDK, memory, gRPC", ("a2a-sdk", "grpcio"), A2aSdk.connect),
)


async def turns(side: Side) -> Values:
    """The measure `turn` of `benchmarks.measures`, without the bare calls that it is compared with there."""
    await short_turns(side)
    return {"turn": statistics.fmean([await short_turns(side) for _ in range(6)]) * 1e3}


@asynccontextmanager
async def sides(cpus: Cpus, folder: Path) -> AsyncIterator[dict[str, Side]]:
    """All servers at work, by their titles: they share a CPU, and only one has work at a time."""
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(running_stub(cpus.load, folder))
        server = await stack.enter_async_context(running_server(cpus.server, folder, "notecase", model.port))
        load = await stack.enter_async_context(Load.connect(server.port))
        made = {f"notecase, SQLite ({metadata.version('notecase-server')})": Side(server, load)}
        for peer in PEERS:
            program = ("-m", f"benchmarks.peers.{peer.module}", str(folder / f"{peer.module}.db"))
            log, env = folder / f"{peer.module}.log", with_model(model.port)
            process = await stack.enter_async_context(
                running(cpus.server, log, *program, env=env, python=f"{ENVIRONMENTS}/{peer.module}/bin/python")
            )
            made[peer.title()] = Side(process, await stack.enter_async_context(peer.connect(process.port)))
        yield made


async def measure(rounds: int) -> dict[str, list[Values]]:
    """The values of each round, by the title of the server; ours is the first. Each measure goes through all servers
    before the next, and each round begins with another server."""
    cpus = Cpus.choose()
    os.sched_setaffinity(0, {cpus.load})
    say(f"Each server runs on CPU {cpus.server}, the model and the load on CPU {cpus.load}; {rounds} rounds.")
    with tempfile.TemporaryDirectory(prefix="notecase-peers-") as name:
        async with sides(cpus, Path(name)) as servers:
            found: dict[str, list[Values]] = {title: [{} for _ in range(rounds)] for title in servers}
            for number in range(rounds):
                titles = list(servers)
                for step in (tokens, turns):
                    for title in titles[number % len(titles) :] + titles[: number % len(titles)]:
                        say(f"round {number + 1}: {step.__name__}, {title}")
                        found[title][number] |= await step(servers[title])
            return found


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> Iterator[str]:
    """The lines of a Markdown table: the median of the rounds, their spread, and the median of the ratios to ours,
    which is the first, each taken within a round."""
    ours = next(iter(found.values()))
    rows: list[Sequence[str]] = [("", "server", "median", "min to max", "times ours")]
    for key, (name, unit) in FIGURES.items():
        for title, rounds in found.items():
            values = [measured[key] for measured in rounds]
            ratio = statistics.median(theirs / measured[key] for theirs, measured in zip(values, ours, strict=True))
            median = f"{digits(statistics.median(values))} {unit}"
            rows.append((name, title, median, f"{digits(min(values))} to {digits(max(values))}", digits(ratio)))
    return markdown(rows)


async def run(rounds: int) -> None:
    end_on_sigterm()
    for line in table(await measure(rounds)):
        say(line)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Measure the peers beside ours.")
    parser.add_argument("--rounds", type=int, default=3, help="each measures everything once (default: 3)")
    options = parser.parse_args()
    missing = [peer.module for peer in PEERS if not (ENVIRONMENTS / peer.module).exists()]
    if missing:
        parser.error(f"{ENVIRONMENTS} has no {' and no '.join(missing)}: run make bench-peers")
    uvloop.run(run(options.rounds))


if __name__ == "__main__":
    main()
