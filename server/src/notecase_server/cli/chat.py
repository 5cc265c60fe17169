"""`notecase chat`."""

import click

from notecase_server.cli import ids
from notecase_server.cli.ask import ask
from notecase_server.cli.conversation import converse
from notecase_server.cli.options import SERVER, WAIT


@click.command()
@click.option(
    "--agent",
    default="",
    show_default=False,
    envvar="NOTECASE_AGENT",
    show_envvar=True,
    metavar="ID",
    shell_complete=ids.of("agents"),
    help="Who answers: of a new session from then on, of a resumed one in this chat. ID@REVISION is one revision.",
)
@click.option(
    "--session",
    default="",
    show_default=False,
    metavar="ID",
    shell_complete=ids.of("sessions"),
    help="Resume this session; with --new, open one of this id.",
)
@click.option("--new", is_flag=True, help="Open a new session without asking.")
@WAIT
@SERVER
def chat(agent: str, session: str, new: bool, wait: float | None) -> None:
    """Talk with an agent.

    At a terminal a session is chosen from a list unless --session or --new say which. Ctrl-C stops a reply and keeps
    the conversation; at the prompt Ctrl-C or Ctrl-D leave. /help tells the rest.

    Through a pipe each line is a message in a new session, or in that of --session. The replies alone go to standard
    output, and the exit code is 1 when a message had none, and 3 when a run waits for longer than --wait.
    """
    ask(lambda client: converse(client, agent, session, new, wait))
