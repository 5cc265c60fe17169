"""Soaks one server and says whether it stays flat: `python -m benchmarks.soak [--minutes 30] [--svg FILE]`."""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from statistics import fmean

import uvloop

from benchmarks.load import Load, lanes
from benchmarks.measures import FILLING
from benchmarks.processes import Cpus, Process, end_on_sigterm, running_server, running_stub, say
from benchmarks.soak.mix import Mix
from benchmarks.soak.plot import svg
from benchmarks.soak.verdict import WATCHED, Sample, growth, table

SHARE = 0.7
"""Of the server's CPU."""

CALIBRATION_SECONDS = 10.0

SAMPLE_SECONDS = 10.0

READERS = 3
"""Reads at once, for which the store has a connection each."""

MOST_UNDER_WAY = 256
"""Actions at once. What comes due above it is left out and counted: the server, or the load, is slower than it was."""


def for_seconds(seconds: float, action: Callable[[], Awaitable[None]]) -> Iterator[Callable[[], Awaitable[None]]]:
    clock = asyncio.get_running_loop().time
    end = clock() + seconds
    while clock() < end:
        yield action


async def calibrated(server: Process, mix: Mix) -> float:
    """The actions a second that keep the server's CPU busy for `SHARE`; warms the server up first."""
    await lanes(32, for_seconds(CALIBRATION_SECONDS, mix.one))
    before, done = server.cpu(), mix.done.total()
    await lanes(32, for_seconds(CALIBRATION_SECONDS, mix.one))
    rate = SHARE * (mix.done.total() - done) / (server.cpu() - before)
    # A server that is never idle does more at a time, and so for less: what it costs at that rate is what counts.
    before, done = server.cpu(), mix.done.total()
    await offered(mix, rate, CALIBRATION_SECONDS)
    return SHARE * (mix.done.total() - done) / (server.cpu() - before)


async def offered(mix: Mix, rate: float, seconds: float) -> int:
    """Begins so many actions a second, whether or not those before have ended, and awaits all. Returns how many were
    left out."""
    loop = asyncio.get_running_loop()
    begun, under_way, left_out = loop.time(), set[asyncio.Task[None]](), 0
    async with asyncio.TaskGroup() as group:
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begun + number / rate - loop.time()))
            if len(under_way) < MOST_UNDER_WAY:
                task = group.create_task(mix.one())
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            else:
                left_out += 1
    return left_out


async def sampled(server: Process, mix: Mix, samples: list[Sample], seconds: float) -> None:
    """Notes the server now and every `SAMPLE_SECONDS` until so many seconds have passed."""
    loop = asyncio.get_running_loop()
    begun, done, at, cpu = loop.time(), mix.done.total(), loop.time(), server.cpu()
    for number in range(1, int(seconds / SAMPLE_SECONDS) + 1):
        await asyncio.sleep(begun + number * SAMPLE_SECONDS - loop.time())
        now, used = loop.time(), server.cpu()
        sample = Sample(
            seconds=now - begun,
            resident=server.resident(),
            descriptors=server.descriptors(),
            threads=server.threads(),
            busy=(used - cpu) / (now - at),
            actions=mix.done.total() - done,
        )
        at, cpu = now, used
        samples.append(sample)
        shown = ", ".join(f"{each.name} {each.read(sample):.0f} {each.unit}".rstrip() for each in WATCHED)
        say(f"[{sample.seconds:4.0f} s] {sample.actions} actions, busy {sample.busy:.0%}, {shown}")


async def soak(mix: Mix, server: Process, seconds: float) -> list[Sample]:
    await mix.prepare()
    rate = await calibrated(server, mix)
    say(f"{rate:.0f} actions a second should keep the server busy for {SHARE:.0%} of its CPU.")
    samples: list[Sample] = []
    async with asyncio.TaskGroup() as group:
        sampling = group.create_task(sampled(server, mix, samples, seconds))
        left_out = await offered(mix, rate, seconds)
        await sampling
    busy = fmean(sample.busy for sample in samples)
    say(f"The server was busy for {busy:.0%}. Left out with {MOST_UNDER_WAY} actions under way: {left_out}.")
    return samples


async def run(options: argparse.Namespace) -> int:
    end_on_sigterm()
    cpus = Cpus.choose()
    os.sched_setaffinity(0, {cpus.load})
    say(f"The server runs on CPU {cpus.server}, the model and the load on CPU {cpus.load}.")
    with tempfile.TemporaryDirectory(prefix="notecase-soak-") as name:
        folder = Path(name)
        async with (
            running_stub(cpus.load, folder) as model,
            running_server(cpus.server, folder, "soak", model.port) as server,
            Load.connect(server.port) as load,
        ):
            # The store's page caches fill once, and would be taken for growth.
            await load.read_all(await load.session(FILLING), at_once=READERS)
            mix = Mix(load, options.seed)
            samples = await soak(mix, server, options.minutes * 60)
    found = growth(samples)
    for line in table(found):
        say(line)
    say(", ".join(f"{kind}: {mix.done[kind]} done, {mix.wrong[kind]} wrong" for kind in mix.actions))
    for error in mix.errors:
        say(error)
    flat, wrong = all(each.flat for each in found), mix.wrong.total()
    if options.svg:
        panels = [(f"{each.name} {each.unit}".rstrip(), [each.read(sample) for sample in samples]) for each in WATCHED]
        panels.append(("busy, of one CPU", [sample.busy for sample in samples]))
        options.svg.write_text(svg([sample.seconds / 60 for sample in samples], panels))
    say(f"{'Flat' if flat else 'Not flat'} over the second half, and {wrong or 'no'} errors.")
    return int(not flat or wrong > 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Watch a server at work.")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long the load lasts (default: 30)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the plot there")
    parser.add_argument("--seed", type=int, default=1, help="of the order of the actions (default: 1)")
    options = parser.parse_args()
    if options.minutes * 60 < 4 * SAMPLE_SECONDS:
        parser.error(f"--minutes has to be at least {4 * SAMPLE_SECONDS / 60:.2g}, for four samples")
    sys.exit(uvloop.run(run(options)))


if __name__ == "__main__":
    main()
