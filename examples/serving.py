"""Starts a server for an example, on a free port."""

import asyncio
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any


@asynccontextmanager
async def server(store: Path) -> AsyncIterator[str]:
    """`notecase serve` as a separate process, stopped with SIGTERM."""
    with store.with_suffix(".log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "notecase_server", "serve", "--listen", "127.0.0.1:0", "--store", f"sqlite:{store}"),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    if not line:
        raise SystemExit(f"The server did not start:\n{store.with_suffix('.log').read_text()}")
    try:
        yield f"127.0.0.1:{line.split()[-1]}"
    finally:
        with suppress(ProcessLookupError):  # Ctrl-C in a terminal reaches the server, too
            process.terminate()
        await process.wait()


def run(example: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, but Ctrl-C ends the example without a traceback."""
    try:
        asyncio.run(example)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as shells have it


def say(text: str = "") -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
