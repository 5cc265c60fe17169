"""`notecase sessions`: conversations, from their list to their files."""

import click
from notecase import Client, v1

from notecase_server.cli import ids, named, output, screen, transfer
from notecase_server.cli.ask import ask, confirm, name_of
from notecase_server.cli.options import FORCE, LIMIT, OUTPUT, SERVER, YES, Number, filled

SESSION = click.argument("session", metavar="SESSION", shell_complete=ids.of("sessions"))
NEW_ID = click.option("--id", "new_id", default="", show_default=False, metavar="ID", help="The id of the new session.")

_KEEP = "How many of the newest messages not to summarise; by default the number that the agent sets, or 10."

_COLUMNS = {
    "SESSION": lambda one: screen.id_of(one.name),
    "AGENT": lambda one: screen.id_of(one.agent),
    "ACTIVITY": screen.activity,
    "EVENTS": lambda one: str(one.last_sequence),
    "UPDATED": lambda one: screen.moment(one.update_time),
    "DISPLAY NAME": lambda one: screen.one_line(one.display_name),
}


@click.group()
def sessions() -> None:
    """List, show, create, fork, rewind, compact, delete, export and import sessions.

    SESSION is a session's id or the beginning of one, or a full name, sessions/ID. `delete` accepts only complete ids.
    """


@sessions.command("list")
@click.option(
    "--filter",
    "where",
    default="",
    show_default=False,
    metavar="EXPRESSION",
    help='List only matching sessions, for example: agent = "agents/detective" AND activity = IDLE. Fields: user, '
    "agent, "
    "activity, display_name, create_time, update_time and labels.KEY.",
)
@LIMIT
@OUTPUT
@SERVER
def list_sessions(where: str, limit: int, form: str) -> None:
    """List sessions, newest first."""

    async def look(client: Client) -> None:
        request = v1.ListSessionsRequest(filter=where)
        output.print_list(await output.listed(client.sessions.ListSessions, request, "sessions", limit), form, _COLUMNS)

    ask(look)


@sessions.command("show")
@SESSION
@OUTPUT
@SERVER
def show_session(session: str, form: str) -> None:
    """Print the conversation of a session; with -o, the session's own fields."""

    async def look(client: Client) -> None:
        found = await client.sessions.GetSession(v1.GetSessionRequest(name=await named.session(client, session)))
        if form != "table":
            output.print_data(output.as_data(found), form)
            return
        click.secho(" ".join([found.name, screen.one_line(found.display_name)]).rstrip(), bold=True)
        told = (found.agent, screen.activity(found), f"{found.last_sequence} events", screen.moment(found.update_time))
        click.secho(", ".join(filter(None, told)), dim=True)
        summary = await output.event_at(client, found.name, found.summary_sequence)
        covered = summary.summarized.last_sequence
        request = v1.ListMessagesRequest(parent=found.name)
        async for message in output.every(client.messages.ListMessages, request, "messages"):
            if covered and message.sequence > covered:
                click.secho(f"\n{screen.summarized(summary.summarized)} (event {summary.sequence})", dim=True)
                covered = 0
            click.secho(f"\n{screen.author(message)}  {screen.moment(message.create_time)}", dim=True)
            click.echo(screen.message(message))

    ask(look)


@sessions.command("create")
@click.option(
    "--agent",
    default="",
    show_default=False,
    metavar="ID",
    shell_complete=ids.of("agents"),
    help="The session's default agent.",
)
@click.option(
    "--user",
    default="",
    show_default=False,
    metavar="ID",
    callback=filled,
    help="The user whose state the agent reads.",
)
@click.option("--name", default="", show_default=False, metavar="TEXT", help="The session's display name.")
@NEW_ID
@SERVER
def create_session(agent: str, user: str, name: str, new_id: str) -> None:
    """Create a session and print its name."""

    async def make(client: Client) -> None:
        made = await client.create_session(
            name_of("agents", agent) if agent else "",
            session_id=new_id,
            user=name_of("users", user) if user else "",
            display_name=name,
        )
        click.echo(made.name)

    ask(make)


@sessions.command("delete")
@click.argument("sessions", metavar="SESSION...", nargs=-1, required=True, shell_complete=ids.of("sessions"))
@YES
@SERVER
def delete_sessions(sessions: tuple[str, ...], yes: bool) -> None:
    """Delete sessions permanently, with their contents.

    Asks for confirmation; without a terminal, --yes is required. Stops at the first session that cannot be deleted.
    """
    names = [name_of("sessions", one) for one in sessions]
    confirm(f"Permanently delete {', '.join(names)}?", yes)

    async def remove(client: Client) -> None:
        for name in names:
            await client.sessions.DeleteSession(v1.DeleteSessionRequest(name=name))

    ask(remove)


@sessions.command("fork")
@SESSION
@click.option(
    "--at",
    type=Number(0),
    metavar="SEQUENCE",
    help="Copy the session as it was at this sequence; by default as it is now.",
)
@NEW_ID
@SERVER
def fork_session(session: str, at: int | None, new_id: str) -> None:
    """Create a copy of a session, as it is now or was at a sequence, and print its name.

    The original is not changed. `notecase logs` shows the sequences.
    """

    async def copy(client: Client) -> None:
        click.echo((await client.fork(await named.session(client, session), at, session_id=new_id)).name)

    ask(copy)


@sessions.command("rewind")
@SESSION
@click.option("--to", type=Number(0), metavar="SEQUENCE", required=True, help="The newest sequence to keep.")
@SERVER
def rewind_session(session: str, to: int) -> None:
    """Rewind a session to a sequence: later messages are superseded, and its state is restored.

    The log keeps everything. `notecase logs` shows the sequences.
    """

    async def rewind(client: Client) -> None:
        name = await named.session(client, session)
        before = await client.sessions.GetSession(v1.GetSessionRequest(name=name))
        after = await client.rewind(name, to)
        gone = before.last_sequence - to
        told = "1 event is superseded" if gone == 1 else f"{gone} events are superseded"
        click.echo(f"{name} is rewound to {to}; {told} (the log has {after.last_sequence})")

    ask(rewind)


@sessions.command("compact")
@SESSION
@click.option("--keep", type=click.IntRange(1, 500), metavar="NUMBER", help=_KEEP)
@SERVER
def compact_session(session: str, keep: int | None) -> None:
    """Summarise the older messages of a session for its model.

    This calls the model. The log keeps everything.
    """

    async def compact(client: Client) -> None:
        name = await named.session(client, session)
        before = (await client.sessions.GetSession(v1.GetSessionRequest(name=name))).summary_sequence
        request = v1.CompactSessionRequest(name=name, keep_recent=keep or 0)
        at = (await client.sessions.CompactSession(request)).summary_sequence
        if at == before:
            click.echo(f"{name}: no {'further ' if at else ''}summary: too short to shorten")
        else:
            click.echo(f"{name}: summary at {at}; `notecase logs {screen.id_of(name)} --after {at - 1}` shows it")

    ask(compact)


@sessions.command("export")
@SESSION
@click.argument("file", metavar="FILE")
@FORCE
@SERVER
def export_session(session: str, file: str, force: bool) -> None:
    """Export a session to a file, or to standard output with -, for `sessions import` on any server."""

    async def save(client: Client) -> None:
        with transfer.destination(file, force) as write:
            async for piece in client.export_session(await named.session(client, session)):
                write(piece)

    ask(save)


@sessions.command("import")
@click.argument("file", metavar="FILE")
@NEW_ID
@SERVER
def import_session(file: str, new_id: str) -> None:
    """Create a session from an exported file, or from standard input with -, and print its name."""

    async def load(client: Client) -> None:
        with transfer.source(file) as pieces:
            click.echo((await client.import_session(pieces, session_id=new_id)).name)

    ask(load)
