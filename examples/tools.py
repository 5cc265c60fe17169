"""Tools in the caller's own process: plain typed functions, called by an agent that runs in the server.

With the built-in offline model, which calls what it is told to call.
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated

import notecase
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
            agent = v1.Agent(llm=v1.LlmAgent(instruction="You are a detective.", provider="offline"))
            await client.agents.CreateAgent(v1.CreateAgentRequest(agent_id="detective", agent=agent))
            session = await client.create_session("agents/detective")
            ask = '/call search {"what": "violin"}\n/call weigh {"thing": "violin"}'
            async with client.run(ask, session=session.name, tools=[search, weigh]) as run:
                async for event in run:
                    if event.HasField("tool_finished"):
                        call = event.tool_finished
                        say(f"  {call.tool} -> {v1.ToolCall.Outcome.Name(call.outcome)}")
            say(notecase.text_of(run.result.reply))


if __name__ == "__main__":
    asyncio.run(main())
