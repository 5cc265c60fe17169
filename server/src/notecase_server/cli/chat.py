"""`notecase chat`."""

import click

from notecase_server.cli import ids
from notecase_server.cli.ask import ask
from notecase_server.cli.conversation import converse
from notecase_server.cli.options import SERVER, WAIT, filled


@click.command()
@click.option(
    "--agent",
    default="",
    show_default=False,
    envvar="NOTECASE_AGENT",
    show_envvar=True,
    metavar="ID",
    shell_complete=ids.of("agents"),
    help="The agent: the default agent of a new session, or in a resumed session the agent for this chat. "
    "ID@REVISION is one revision.",
)
@click.option(
    "--session",
    default="",
    show_default=False,
    metavar="ID",
    callback=filled,
    shell_complete=ids.of("sessions"),
    help="Resume this session; with --new, create it with this id.",
)
@click.option("--new", is_flag=True, help="Start a new session without asking.")
@WAIT
@SERVER
def chat(agent: str, session: str, new: bool, wait: float | None) -> None:
    """Talk with an agent.

    At a terminal you choose a session from a list unless --session or --new is given. Ctrl-C stops a reply and keeps
    the conversation; at the prompt, Ctrl-C or Ctrl-D exits. /help lists the commands.

    Through a pipe, each line is a message in a new session or in that of --session. Only replies go to standard output.
    The exit code is 1 if a message got no reply, and 3 if a run waits longer than --wait.
    """
    ask(lambda client: converse(client, agent, session, new, wait))
