"""A person in the loop: a call waits for approval over a restart of the server, and another client gives it."""

import tempfile
from pathlib import Path

import notecase
import serving
from serving import say, server


def pay(amount: int, to: str) -> str:
    """Pays an amount in cents."""
    say(f"    (paid {amount} to {to})")
    return "paid"


PAY = notecase.Tool(pay, requires_approval=True)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "notecase.db"
        async with server(store) as address, notecase.Client(address) as client:
            await client.put_agent("clerk", "You keep the books.", provider="offline", tools=[PAY])
            await client.create_session("clerk", session_id="books")
            try:
                await client.invoke('/call pay {"amount": 90000, "to": "the landlord"}', session="books", run_id="rent")
            except notecase.RunWaiting as waiting:
                say(f"{waiting.run.name} waits: {waiting.run.pending_inputs[0].prompt}")
        say("The server is stopped, and started again on the same file.")
        async with server(store) as address, notecase.Client(address) as client:
            async for run in client.waiting():
                asked = run.pending_inputs[0]
                say(f"Still waiting: {run.name} wants to call {asked.call.tool}({asked.call.arguments})")
                await client.approve(run, asked.input_id, arguments={"amount": 80000, "to": "the landlord"})
                async with client.attach(run, tools=[PAY]) as following:
                    async for event in following:
                        if event.HasField("tool_finished"):
                            say(f"  {event.tool_finished.tool} -> {event.tool_finished.result[0].text}")
                say(following.reply.text)


if __name__ == "__main__":
    serving.run(main())
