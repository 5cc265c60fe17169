"""Tools in the caller's own process: plain typed functions, called by an agent that runs in the server.

It uses the built-in offline model, which calls the tools that the message names.
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated

import notecase
import serving
from notecase import v1
from serving import say, server

PAPERS = {"violin": ["A violin was seen at the harbour.", "The violin's owner is abroad."], "bow": []}


def search(what: Annotated[str, "one word to look for"]) -> list[str]:
    """Searches yesterday's papers."""
    say(f"    (search runs here: {what})")
    return PAPERS.get(what, [])


async def weigh(thing: str, unit: str = "kg") -> str:
    """Weighs a thing."""
    say(f"    (weigh runs here: {thing})")
    await asyncio.sleep(0)
    return f"0.5 {unit}"


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with server(Path(folder) / "notecase.db") as address, notecase.Client(address) as client:
            await client.put_agent("detective", "You are a detective.", provider="offline", tools=[search, weigh])
            ask = '/call search {"what": "violin"}\n/call weigh {"thing": "violin"}'
            async with client.run(ask, agent="detective") as run:
                async for event in run:
                    if event.HasField("tool_finished"):
                        call = event.tool_finished
                        say(f"  {call.tool} -> {v1.ToolCall.Outcome.Name(call.outcome)}")
            say(run.reply.text)


if __name__ == "__main__":
    serving.run(main())
