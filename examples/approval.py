"""A person in the loop: a call waits for approval over a restart of the server, and another client gives it."""

import asyncio
import tempfile
from pathlib import Path

import notecase
from notecase import v1
from serving import say, server


def pay(amount: int, to: str) -> str:
    """Pays an amount in cents."""
    say(f"    (paid {amount} to {to})")
    return "paid"


TOOL = notecase.Tool(pay, requires_approval=True, declare=False)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "notecase.db"
        async with server(store) as address, notecase.Client(address) as client:
            llm = v1.LlmAgent(instruction="You keep the books.", provider="offline", tools=[TOOL.definition])
            await client.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=llm)))
            session = await client.create_session("agents/clerk", session_id="books")
            request = v1.CreateRunRequest(
                start=v1.StartRun(
                    session=session.name,
                    run_id="rent",
                    messages=[notecase.to_message('/call pay {"amount": 90000, "to": "the landlord"}')],
                )
            )
            run = await client.runs.CreateRun(request)
            waiting = await client.runs.WaitRun(v1.WaitRunRequest(name=run.name))
            say(f"{waiting.name} is {v1.Run.State.Name(waiting.state)}: {waiting.pending_inputs[0].prompt}")
        say("The server is stopped, and started again on the same file.")
        async with server(store) as address, notecase.Client(address) as client:
            async for waiting in client.waiting():
                request_ = waiting.pending_inputs[0]
                say(f"Still waiting: {waiting.name} wants {request_.call.tool}({request_.call.arguments})")
                await client.approve(waiting.name, request_.input_id, arguments={"amount": 80000, "to": "the landlord"})
                async with client.attach(waiting.name, tools=[TOOL]) as following:
                    async for event in following:
                        if event.HasField("tool_finished"):
                            say(f"  {event.tool_finished.tool} -> {event.tool_finished.result[0].text}")
                say(notecase.text_of(following.result.reply))


if __name__ == "__main__":
    asyncio.run(main())
