"""`make fuzz`: sends whatever can be sent for some minutes, seed by seed, and prints what may not be."""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from structlog.testing import capture_logs

from tests.fuzz.play import Fuzz, Left, distinct, fuzzed_server, store_of

BATCH = 1000
"""Requests of one seed."""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def fuzz(seed: int, until: float, store: str) -> bool:
    """Whether nothing was found."""
    async with fuzzed_server(store) as served:
        play = Fuzz(served, seed)
        await play.play(BATCH // 10, until)  # what is made once is no growth
        before = Left.now()
        await play.play(BATCH, until)
        # A store in memory keeps what it remembers in objects.
        grown = await Left.settled(before) if store != "memory:" else {}
    say(f"seed {seed}: {play.sent.total()} calls, {len(play.findings)} findings")
    for finding in distinct(play.findings):
        say(f"  {finding}")
    if grown:
        say(f"  left behind: {grown}")
    return not (play.findings or grown)


def main() -> int:
    """Returns how many seeds found something."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, help="the first seed, which the others follow (default: a new one)")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--store", choices=["memory", "sqlite"], default="sqlite")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else time.time_ns() % 1_000_000
    until = time.monotonic() + options.minutes * 60
    found = 0
    while time.monotonic() < until:
        with tempfile.TemporaryDirectory(prefix="notecase-fuzz-") as folder:
            store = "memory:" if options.store == "memory" else store_of(Path(folder))
            with capture_logs():
                found += not asyncio.run(fuzz(seed, until, store))
        seed += 1
    return found


if __name__ == "__main__":
    sys.exit(main() > 0)
