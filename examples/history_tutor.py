"""A history tutor: one session of several turns, which the program finds again when it is started again.

    python examples/history_tutor.py rome.db

asks the next questions of the course each time it is run. Without a file it runs twice, as two processes, on one
that it throws away. With OPENAI_API_KEY or OPENAI_BASE_URL set it talks to that model, otherwise to the offline one.
"""

import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import notecase
import serving
from notecase import v1
from serving import say, server

INSTRUCTION = """\
You are a patient history tutor who answers in two sentences.
Your pupil is {{ user.name }}, and this is lesson {{ lesson }} about {{ topic }}."""

LESSONS = [
    ["Who founded Rome?", "Is that a legend?"],
    ["When did the republic end?", "And who ended it?"],
]


async def open_session(client: notecase.Client) -> str:
    """Returns the pupil's session: a new one at first, and from then on the one that is there."""
    try:
        await client.create_session("tutor", session_id="rome", user="ada", state={"topic": "Rome"})
    except notecase.NotecaseError as error:
        if error.reason != "ALREADY_EXISTS":
            raise
        said = [message async for message in client.list_messages("rome")]
        say(f"Welcome back. {len(said)} messages were said, the first of them: {first_line(said[0])}")
    return "sessions/rome"


async def teach(store: Path) -> None:
    """One life of the program: a lesson."""
    async with server(store) as address, notecase.Client(address) as client:
        await client.put_agent("tutor", INSTRUCTION)
        await client.put_state("users/ada", "name", "Ada")
        session = await open_session(client)
        lesson = (await client.get_state(session, "lesson")).get("lesson", 0)
        if lesson == len(LESSONS):
            say("That was the course.")
            return
        await client.put_state(session, "lesson", lesson + 1)
        for question in LESSONS[lesson]:
            say(f"\n  Ada    {question}")
            reply = await client.invoke(question, session=session)
            say("  tutor  " + reply.text.replace("\n", "\n         "))


def first_line(message: v1.Message) -> str:
    return notecase.text_of(message).splitlines()[0]


def main() -> None:
    if len(sys.argv) > 1:
        serving.run(teach(Path(sys.argv[1])))
        return
    with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
        for life in ("The program starts.", "\nThe program has ended, and starts again."):
            say(life)
            subprocess.run([sys.executable, __file__, str(Path(folder) / "rome.db")], check=True)


if __name__ == "__main__":
    main()
