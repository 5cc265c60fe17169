"""Shows the remembered answers to approvals of a session, and takes them back."""

import contextlib
import sys
import uuid

import click
from google.protobuf.field_mask_pb2 import FieldMask
from notecase import Client, v1

from notecase_server.cli import screen

NONE = "No answer to an approval holds for further calls in this session."

KEEP = "Leave it so"


async def review(client: Client, name: str) -> None:
    """Shows which tools of a session run without an approval, or are denied, and at a terminal lets the user take such
    an answer back. `name` is the session's, empty before it is created. Raises NotecaseError."""
    session = await client.sessions.GetSession(v1.GetSessionRequest(name=name)) if name else v1.Session()
    answers = {_label(one): one for one in sorted(session.remembered.values(), key=lambda one: one.sequence)}
    if not answers:
        screen.aside(NONE)
    elif not (sys.stdin.isatty() and sys.stdout.isatty()):
        for label in answers:
            click.echo(label)
    else:
        from notecase_server.cli import terminal  # noqa: PLC0415  # only a terminal needs it

        labels = [f"Ask again: {label}" for label in answers]
        with contextlib.suppress(EOFError):
            chosen = await terminal.choose("", [*labels, KEEP], start=len(labels))
            if chosen < len(labels):
                await _take_back(client, session.name, list(answers.values())[chosen])


async def _take_back(client: Client, name: str, answer: v1.RememberedApproval) -> None:
    """Takes back all answers about the tool of this one, except those that were given while the menu was open. Raises
    NotecaseError."""
    session = await client.sessions.GetSession(v1.GetSessionRequest(name=name))
    kept = {input_id: one for input_id, one in session.remembered.items() if _label(one) != _label(answer)}
    request = v1.UpdateSessionRequest(
        session=v1.Session(name=name, remembered=kept, last_sequence=session.last_sequence),
        update_mask=FieldMask(paths=["remembered"]),
        request_id=uuid.uuid4().hex,
    )
    await client.sessions.UpdateSession(request)
    screen.aside(f"{screen.one_line(answer.tool)} asks again from now on.")


def _label(answer: v1.RememberedApproval) -> str:
    tool, agent = screen.one_line(answer.tool), screen.id_of(answer.agent)
    return f"{tool} of {agent} {'runs' if answer.approved else 'is denied'} without being asked for"
