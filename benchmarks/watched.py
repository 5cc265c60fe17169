"""`notecase serve` with a loop that is watched: every callback that takes long is written to a file.

`python -m benchmarks.watched FILE serve …`. A line of the file has the CPU time in seconds that the loop's thread took
for one callback, and what it was. Collections of garbage are separate lines and not part of the callbacks during which
they happen. The loop is asyncio's own: callbacks of uvloop cannot be reached from Python, and what they call is the
same.
"""

import asyncio
import gc
import os
import sys
import time
from asyncio import events
from typing import Any

import uvloop
from notecase_server.cli import main

LONG = 0.001
"""Seconds from which on a callback is written down."""

GARBAGE = "garbage"
"""Stands for a collection in a line."""


def watch(path: str) -> None:
    """Makes every loop of this process write to the file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    run = events.Handle._run
    began = collected = 0.0

    def write(taken: float, what: str) -> None:
        if taken >= LONG:
            os.write(file, f"{taken:.6f} {what}".replace("\n", " ").encode() + b"\n")

    def collecting(phase: str, _: dict[str, Any]) -> None:
        nonlocal began, collected
        if phase == "start":
            began = time.thread_time()
        else:
            collected += time.thread_time() - began
            write(time.thread_time() - began, GARBAGE)

    def timed(handle: asyncio.Handle) -> None:
        nonlocal collected
        begun, collected = time.thread_time(), 0.0
        run(handle)
        write(time.thread_time() - begun - collected, repr(handle))

    gc.callbacks.append(collecting)
    events.Handle._run = timed  # type: ignore[method-assign, assignment]
    uvloop.new_event_loop = asyncio.new_event_loop  # type: ignore[assignment]


if __name__ == "__main__":
    watch(sys.argv.pop(1))
    main()
