"""A server for an example to talk to: one of its own, on a free port."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path


@asynccontextmanager
async def server(store: Path) -> AsyncIterator[str]:
    """`notecase serve` as a process of its own; stopped with SIGTERM, as an operator would."""
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
        process.terminate()
        await process.wait()


def say(text: str = "") -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
