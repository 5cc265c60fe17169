"""A client that can be lost at any moment: all it must keep is one integer."""

import asyncio
import tempfile
from pathlib import Path

import notecase
from notecase import v1
from serving import say, server


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with server(Path(folder) / "notecase.db") as address:
            async with notecase.Client(address) as client:
                agent = v1.Agent(llm=v1.LlmAgent(instruction="You count.", provider="offline"))
                await client.agents.CreateAgent(v1.CreateAgentRequest(agent_id="counter", agent=agent))
                session = await client.create_session("agents/counter")
                async with client.run("/pause 20\n/chunks 40", session=session.name, run_id="count") as run:
                    async for event in run:
                        if event.block_delta.end > 20:
                            break
                kept = run.last_sequence
                say(f"The first client leaves in mid-sentence. It keeps one number: {kept}.")
            async with notecase.Client(address) as client:
                async with client.attach(f"{session.name}/runs/count", kept) as again:
                    async for event in again:
                        if event.sequence:
                            say(f"  {event.sequence} {event.WhichOneof('payload')}")
                say(f"The run went on by itself: {notecase.text_of(again.result.reply)}")


if __name__ == "__main__":
    asyncio.run(main())
