"""One conversation with notecase without asyncio: an agent, a session, a streamed reply, the log, and an error with its
reason.

    python examples/python_sync.py 127.0.0.1:7420
"""

import sys

from notecase import NotecaseError
from notecase.sync import Client


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def converse(client: Client) -> None:
    # The first time it is created; after that this program can be run again.
    client.put_agent("detective", "You are a detective.", provider="offline")
    session = client.create_session("detective")
    say(f"Opened {session.name}.\n")

    with client.run("Where do we begin?", session=session) as run:
        for text in run.text():
            say(text)

    # A stream continues after the last sequence that was seen; after 0 comes the whole log.
    with client.attach(session, 0) as log:
        say(f"\nThe log has {sum(1 for _ in log)} events.\n")

    try:
        client.get_state("sessions/nobody")
    except NotecaseError as error:
        say(f"{error.reason}: {error.message}\n")


if __name__ == "__main__":
    try:
        with Client(sys.argv[1] if len(sys.argv) > 1 else None) as connected:
            converse(connected)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells have it
