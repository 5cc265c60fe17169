"""`notecase sessions` and `notecase agents`: lists, and one session or agent in full."""

import click
from google.protobuf import text_format
from notecase import Client, v1

from notecase_server.cli import screen
from notecase_server.cli.ask import ask, name_of
from notecase_server.cli.options import SERVER

LIMIT = click.option("--limit", type=click.IntRange(1, 1000), default=50, help="How many to list.")
MORE = "There are more; --limit lists up to 1000."


@click.group(invoke_without_command=True)
@click.option(
    "--filter",
    "where",
    default="",
    show_default=False,
    metavar="EXPRESSION",
    help="Which to list, for example: agent = agents/detective AND activity = IDLE. Fields are user, agent, "
    "activity, display_name, create_time, update_time and labels.KEY.",
)
@LIMIT
@SERVER
@click.pass_context
def sessions(context: click.Context, where: str, limit: int, server: str) -> None:
    """List sessions, the last created first."""
    if context.invoked_subcommand:
        return

    async def look(client: Client) -> None:
        page = await client.sessions.ListSessions(v1.ListSessionsRequest(page_size=limit, filter=where))
        rows = [
            (
                screen.id_of(one.name),
                screen.id_of(one.agent),
                screen.activity(one),
                str(one.last_sequence),
                screen.moment(one.update_time),
                screen.one_line(one.display_name),
            )
            for one in page.sessions
        ]
        click.echo(screen.table(("SESSION", "AGENT", "ACTIVITY", "EVENTS", "UPDATED", "DISPLAY NAME"), rows))
        if page.next_page_token:
            screen.aside(MORE)

    ask(server, look)


@sessions.command("show")
@click.argument("session", metavar="ID")
@SERVER
def show_session(session: str, server: str) -> None:
    """Print the conversation of a session."""

    async def look(client: Client) -> None:
        found = await client.sessions.GetSession(v1.GetSessionRequest(name=name_of("sessions", session)))
        click.secho(" ".join([found.name, screen.one_line(found.display_name)]), bold=True)
        told = (found.agent, screen.activity(found), f"{found.last_sequence} events", screen.moment(found.update_time))
        click.secho(", ".join(filter(None, told)), dim=True)
        request = v1.ListMessagesRequest(parent=found.name, page_size=100)
        while True:
            page = await client.messages.ListMessages(request)
            for message in page.messages:
                click.secho(f"\n{screen.author(message)}  {screen.moment(message.create_time)}", dim=True)
                click.echo(screen.message(message))
            request.page_token = page.next_page_token
            if not request.page_token:
                break

    ask(server, look)


@click.group(invoke_without_command=True)
@LIMIT
@SERVER
@click.pass_context
def agents(context: click.Context, limit: int, server: str) -> None:
    """List agents by name."""
    if context.invoked_subcommand:
        return

    async def look(client: Client) -> None:
        page = await client.agents.ListAgents(v1.ListAgentsRequest(page_size=limit))
        rows = [
            (screen.id_of(one.name), str(one.revision), screen.model_of(one), screen.one_line(one.display_name))
            for one in page.agents
        ]
        click.echo(screen.table(("AGENT", "REVISION", "MODEL", "DISPLAY NAME"), rows))
        if page.next_page_token:
            screen.aside(MORE)

    ask(server, look)


@agents.command("show")
@click.argument("agent", metavar="ID[@REVISION]")
@SERVER
def show_agent(agent: str, server: str) -> None:
    """Print an agent: its settings, and its instruction as it stands."""

    async def look(client: Client) -> None:
        found = await client.agents.GetAgent(v1.GetAgentRequest(name=name_of("agents", agent)))
        click.secho(" ".join([found.name, screen.one_line(found.display_name)]), bold=True)
        settings = {
            "description": screen.one_line(found.description, 200),
            "revision": f"{found.revision} of {screen.moment(found.update_time)}",
            "model": screen.model_of(found),
            "generation": text_format.MessageToString(found.llm.generation, as_one_line=True),
            "context": text_format.MessageToString(found.llm.context, as_one_line=True),
            "output key": screen.one_line(found.output_key),
            "labels": screen.one_line(", ".join(f"{key}={label}" for key, label in sorted(found.labels.items())), 200),
        }
        click.echo("\n".join(screen.aligned([setting for setting in settings.items() if setting[1]])))
        click.echo(f"\n{screen.harmless(found.llm.instruction) or 'It has no instruction.'}")

    ask(server, look)
