"""A client that can be lost at any moment: all it must keep is one integer."""

import tempfile
from pathlib import Path

import notecase
import serving
from serving import say, server


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with server(Path(folder) / "notecase.db") as address:
            async with notecase.Client(address) as client:
                await client.put_agent("counter", "You count.", provider="offline")
                async with client.run("/pause 20\n/chunks 40", agent="counter") as run:
                    async for event in run:
                        if event.block_delta.end > 20:
                            break
                name, kept = run.name, run.last_sequence
                say(f"The first client leaves in mid-sentence. It keeps the run's name and one number: {kept}.")
            async with notecase.Client(address) as client:
                async with client.attach(name, kept) as again:
                    async for event in again:
                        if event.sequence:
                            say(f"  {event.sequence} {event.WhichOneof('payload')}")
                say(f"The run continued by itself: {again.reply.text}")


if __name__ == "__main__":
    serving.run(main())
