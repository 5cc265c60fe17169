"""A detective's conversation, from an empty machine to a restarted server: what `make demo` shows.

It starts a server on a free port, with a SQLite file in a temporary directory. With OPENAI_API_KEY or
OPENAI_BASE_URL set it talks to that model, otherwise to the built-in offline one.
"""

import os
import sys
import tempfile
from pathlib import Path

import notecase
import serving
from notecase import v1
from serving import say, server

INSTRUCTION = """\
You are a detective who thinks aloud, in two or three sentences.
The case: {{ case }}.
Last seen: {{ last_seen | default: "nobody knows where" }}.
{% if theory %}You last said: {{ theory | truncatewords: 8 }}{% endif %}"""


async def turn(client: notecase.Client, session: str, question: str) -> None:
    say(f"\n  you        {question}")
    sys.stdout.write("  detective  ")
    async with client.run(question, session=session) as run:
        async for text in run.text():
            sys.stdout.write(text.replace("\n", "\n             "))
            sys.stdout.flush()
    usage = run.result.usage
    say(f"\n             [{usage.model}: {usage.input_tokens} tokens in, {usage.output_tokens} out]")


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "notecase.db"
        async with server(store) as address, notecase.Client(address) as client:
            info = await client.server.GetServerInfo(v1.GetServerInfoRequest())
            say(f"notecase {info.version} serves on {address}, with its data in {info.store}.")
            if info.providers[0] == "offline":
                say("No OPENAI_API_KEY is set, so the built-in offline model answers.")
            model = os.environ.get("OPENAI_MODEL", "")
            await client.put_agent("detective", INSTRUCTION, model=model, output_key="theory")
            session = await client.create_session(
                "detective", session_id="violin", state={"case": "the missing violin"}
            )
            say(f"Created {session.agent} and {session.name}, with a first value in its state: case.")
            await turn(client, session.name, "Where do we begin?")
            await client.put_state(session, "last_seen", "the harbour, at dusk")
            say("\n  state      last_seen = the harbour, at dusk")
            await turn(client, session.name, "Where was it last seen?")
        say("\nThe server was stopped and started again with the same file.")
        async with server(store) as address, notecase.Client(address) as client:
            async for found in client.list_sessions():
                say(f"It still has {found.name}: {found.last_sequence} events, {found.usage.model_calls} replies.")
            await turn(client, "sessions/violin", "And who was there?")
            state = await client.get_state("sessions/violin")
            say(f"\nIts state: {', '.join(sorted(state))}.")


if __name__ == "__main__":
    serving.run(main())
