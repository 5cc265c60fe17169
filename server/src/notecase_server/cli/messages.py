"""`notecase messages`: a session's conversation, message by message."""

import click
from notecase import Client, v1

from notecase_server.cli import ids, named, output, screen
from notecase_server.cli.ask import ask, read_text
from notecase_server.cli.options import LIMIT, OUTPUT, SERVER

_COLUMNS = {
    "SEQUENCE": lambda one: str(one.sequence),
    "MESSAGE": lambda one: one.name.removeprefix("sessions/").replace("/messages/", "/"),
    "AUTHOR": screen.author,
    "STATUS": lambda one: screen.word_of(v1.Message.Status, one.status).replace("_", " "),
    "TEXT": lambda one: screen.one_line(_text(one), 80),
}


def _text(found: v1.Message) -> str:
    """Returns a message's words and its calls; of a message that has neither, whatever it has."""
    told = (
        part.text or (f"→ {screen.called(part.tool_call)}" if part.HasField("tool_call") else "")
        for part in found.parts
    )
    return " ".join(filter(None, told)) or click.unstyle(screen.message(found))


@click.group()
def messages() -> None:
    """List, show and append messages of a session."""


@messages.command("list")
@click.argument("session", metavar="SESSION", shell_complete=ids.of("sessions"))
@click.option("--newest", is_flag=True, help="List newest first.")
@click.option("--superseded", is_flag=True, help="Include messages that a rewind superseded.")
@LIMIT
@OUTPUT
@SERVER
def list_messages(session: str, newest: bool, superseded: bool, limit: int, form: str) -> None:
    """List messages, oldest first."""

    async def look(client: Client) -> None:
        request = v1.ListMessagesRequest(
            parent=await named.session(client, session),
            order_by="sequence desc" if newest else "",
            show_superseded=superseded,
        )
        found = await output.listed(client.messages.ListMessages, request, "messages", limit)
        output.print_list(found, form, _COLUMNS)

    ask(look)


@messages.command("show")
@click.argument("message", metavar="SESSION/MESSAGE", shell_complete=ids.of("messages"))
@OUTPUT
@SERVER
def show_message(message: str, form: str) -> None:
    """Print one message with the outcomes of its tool calls."""
    session, _, last = message.removeprefix("sessions/").partition("/")
    if not last:
        raise click.UsageError(f"{message!r} names no message of a session; `notecase messages list SESSION` has them.")

    async def look(client: Client) -> None:
        name = f"{await named.session(client, session)}/messages/{last.removeprefix('messages/')}"
        found = await client.messages.GetMessage(v1.GetMessageRequest(name=name))
        output.print_one(found, form, lambda one: click.echo(screen.message(one)))

    ask(look)


@messages.command("append")
@click.argument("session", metavar="SESSION", shell_complete=ids.of("sessions"))
@click.argument("text")
@click.option("--role", type=click.Choice(["user", "system", "assistant"]), default="user", help="The author's role.")
@SERVER
def append_message(session: str, text: str, role: str) -> None:
    """Append a message without running an agent, and print its name. TEXT may be - for standard input."""
    said = v1.Message(role=v1.Message.Role.Value(f"ROLE_{role.upper()}"), parts=[v1.Part(text=read_text(text))])

    async def add(client: Client) -> None:
        request = v1.AppendMessagesRequest(parent=await named.session(client, session), messages=[said])
        for added in (await client.messages.AppendMessages(request)).messages:
            click.echo(added.name)

    ask(add)
