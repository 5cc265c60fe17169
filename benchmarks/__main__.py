"""Measures the server and prints the table: `python -m benchmarks [--only tokens turn] [--rounds 3] [--write PAGE]`."""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from benchmarks.load import Load
from benchmarks.measures import MEASURES, ONCE, Bench, Values
from benchmarks.neighbour import Times
from benchmarks.processes import Cpus, end_on_sigterm, running_server, running_stub, say
from benchmarks.targets import table
from benchmarks.written import write


async def measure(names: Sequence[str], rounds: int, times: Times, found: list[Values]) -> list[str]:
    """Goes through the measures round by round, so that what else the machine does at a time hits all of them alike.
    Each round's values are in `found` as soon as they are known. Returns what is to be said besides."""
    cpus = Cpus.choose()
    os.sched_setaffinity(0, {cpus.load})
    say(f"The server runs on CPU {cpus.server}, the model and the load on CPU {cpus.load}; {rounds} rounds.")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="notecase-bench-") as name:
        folder = Path(name)
        async with (
            running_stub(cpus.load, folder) as model,
            running_server(cpus.server, folder, "bench", model.port) as server,
            Load.connect(server.port) as load,
            running_server(cpus.server, folder, "floor", model.port, "benchmarks.floor") as floor,
            Load.connect(floor.port) as floor_load,
        ):
            beside = Bench(floor, floor_load, cpus, folder, model)
            bench = Bench(server, load, cpus, folder, model, beside, times=times)
            for number in range(1, rounds + 1):
                found.append({})
                for measure_name in (name for name in names if number == 1 or name not in ONCE):
                    say(f"[{time.monotonic() - begun:3.0f} s] round {number}: {measure_name}")
                    found[-1] |= await MEASURES[measure_name](bench)
            return [line for lines in bench.notes.values() for line in ("", *lines)]


async def run(options: argparse.Namespace) -> int:
    found: list[Values] = []
    names = [name for name in MEASURES if not options.only or name in options.only]
    late, notes = False, list[str]()
    end_on_sigterm()
    try:
        async with asyncio.timeout(options.limit):
            times = Times(*(getattr(options, name) for name in Times._fields))
            notes = await measure(names, options.rounds, times, found)
    except TimeoutError:
        late = True
    lines = [*table(found), *notes]
    for line in lines:
        say(line)
    if options.write:
        write(options.write, [f"The median of {options.rounds} rounds, their least and their most.", "", *lines])
    if late:
        say(f"Stopped after {options.limit:g} seconds; the table holds what was measured until then.")
    return int(late)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure the server on this machine.")
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), metavar="NAME", help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--rounds", type=int, default=3, help="each measures everything once (default: 3)")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds after which it stops (default: 1200)")
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="put the table into this page, with when and on what"
    )
    for name, seconds in Times()._asdict().items():
        told = f"seconds of a neighbour {name} (default: {seconds:g})"
        parser.add_argument(f"--{name}", type=float, default=seconds, metavar="SECONDS", help=told)
    sys.exit(uvloop.run(run(parser.parse_args())))


if __name__ == "__main__":
    main()
