"""A writer, a reviewer and a refactorer: three agents on one session, who hand their work on through state.

The reply of each is stored in state under its `output_key`, and the instruction of the next is a template that reads
it. They do not see each other's messages: only state passes between them. With OPENAI_API_KEY or
OPENAI_BASE_URL set they are that model, otherwise the built-in offline one, which says what it is given to say.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import notecase
import serving
from notecase import v1
from serving import say, server

TASK = "A Python function that adds up the prices of a list of orders."


class Member(NamedTuple):
    instruction: str
    output_key: str
    offline: str
    """The message for the offline model: after `/say` it says the rest, and otherwise it repeats its instruction."""


TEAM = {
    "writer": Member(
        instruction="Write the Python that you are asked for. Answer with code alone.",
        output_key="draft",
        offline="/say def total(orders): return sum([order.price for order in orders])",
    ),
    "reviewer": Member(
        instruction="Review this code in one sentence:\n{{ draft }}",
        output_key="review",
        offline="/say The list within the sum is not needed.",
    ),
    "refactorer": Member(
        instruction="Improve the code as its review says.\nCode: {{ draft }}\nReview: {{ review }}",
        output_key="final",
        offline=TASK,
    ),
}


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with server(Path(folder) / "notecase.db") as address, notecase.Client(address) as client:
            info = await client.server.GetServerInfo(v1.GetServerInfoRequest())
            session = await client.create_session()
            for name, member in TEAM.items():
                await client.put_agent(
                    name, member.instruction, output_key=member.output_key, context={"stateless": True}
                )
                said = member.offline if info.providers[0] == "offline" else TASK
                reply = await client.invoke(said, session=session, agent=name)
                say(f"The reply of the {name} is in state, as {member.output_key}:\n")
                say("    " + reply.text.replace("\n", "\n    ") + "\n")
            state = await client.get_state(session)
            say(f"The session's state: {', '.join(sorted(state))}.")


if __name__ == "__main__":
    serving.run(main())
