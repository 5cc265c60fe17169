"""`notecase run`: one question, one answer."""

import sys

import click
from notecase import Client, NotecaseError, RunStream, text_of, v1
from notecase.view import ENDED

from notecase_server.cli import attaching, ids, named, output, piped, screen
from notecase_server.cli.ask import ask, name_of, read_text
from notecase_server.cli.connection import Exit, Refusal
from notecase_server.cli.follow import Follower, Left
from notecase_server.cli.options import SERVER, WAIT, filled


@click.command()
@click.argument("text", nargs=-1)
@click.option(
    "--agent",
    default="",
    show_default=False,
    envvar="NOTECASE_AGENT",
    show_envvar=True,
    metavar="ID",
    shell_complete=ids.of("agents"),
    help="The agent; required in a new session if there are several. ID@REVISION is one revision.",
)
@click.option(
    "--session",
    default="",
    show_default=False,
    metavar="ID",
    callback=filled,
    shell_complete=ids.of("sessions"),
    help="Run in this session instead of a new one.",
)
@click.option(
    "--attach",
    multiple=True,
    metavar="FILE[:TYPE]",
    help="A file to attach, with its media type if its name does not show it; - is standard input. May be repeated.",
)
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["text", "json", "yaml"]),
    default="text",
    help="Stream the reply as text, or print the run as JSON or YAML when it has ended.",
)
@WAIT
@SERVER
def run(
    text: tuple[str, ...], agent: str, session: str, attach: tuple[str, ...], form: str, wait: float | None
) -> None:
    """Send TEXT to an agent, stream its reply, and exit.

    Input from a pipe is sent after TEXT, or alone without TEXT. Only the reply goes to standard output; everything
    else, such as the name of a new session, goes to standard error.

    The exit code is 1 if the run fails or is cancelled, and 3 if it is left waiting for a person or a caller's tool; at
    a terminal you are asked first. Ctrl-C cancels the run.
    """
    said = _said(text, [attaching.split(one)[0] for one in attach].count("-"))
    if not said.strip() and not attach:
        raise Refusal("Nothing to say.", Exit.USAGE)

    async def answer(client: Client) -> Exit:
        parts = [v1.Part(text=said)] if said.strip() else []
        parts += [v1.Part(blob=await attaching.upload(client, *attaching.split(one))) for one in attach]
        return await _run(client, v1.Message(parts=parts), agent, session, form, wait)

    ask(answer)


def _said(text: tuple[str, ...], attached: int) -> str:
    """Returns the message: TEXT and standard input, unless that is attached."""
    reads = text[-1:] == ("-",)
    words = " ".join(text[:-1] if reads else text)
    if reads + attached > 1:
        raise click.UsageError("Standard input can be read only once; there is more than one -.")
    if attached:
        return words
    if not text and sys.stdin is not None and sys.stdin.isatty():
        raise click.UsageError("Give a TEXT, or pipe one to standard input.")
    return piped.joined(words, read_text("-")) if reads or not text else piped.with_input(words)


async def _run(client: Client, said: v1.Message, agent: str, session: str, form: str, patience: float | None) -> Exit:
    name = await named.session(client, session) if session else ""
    answering = name_of("agents", agent) if agent else ("" if session else await _only_agent(client))
    if not name:
        words = screen.one_line(text_of(said) or ", ".join(part.blob.filename for part in said.parts))
        name = (await client.create_session(answering, display_name=words)).name
    stream = client.run(said, agent=answering, session=name)
    follower = Follower(client, stream, patience=patience, quiet=form != "text")
    try:
        well = await follower.follow()
    except Left as left:
        raise Refusal(screen.folded(str(left), len("Error: ")), Exit.WAITING) from None
    except NotecaseError as error:
        if error.reason == "AGENT_NOT_FOUND" and not agent:
            raise Refusal(f"{screen.sentence(error, '')} --agent chooses another.", Exit.FAILED) from None
        _print_ended(stream, form)
        raise
    finally:
        if stream.session and not session:
            screen.aside(f"{stream.session} with {answering}")
    _print_ended(stream, form)
    return Exit.OK if well else Exit.FAILED


def _print_ended(stream: RunStream, form: str) -> None:
    """Prints the run as JSON or YAML. Prints nothing if the stream was cut or left before the run's end."""
    found = stream.view.runs.get(stream.name)
    if form != "text" and found is not None and found.state in ENDED:
        output.print_data(output.as_data(found), form)


async def _only_agent(client: Client) -> str:
    """Returns the name of the only agent. Raises Refusal when there is none, or when there are several."""
    found = (await client.agents.ListAgents(v1.ListAgentsRequest(page_size=9))).agents
    if len(found) == 1:
        return found[0].name
    if not found:
        raise Refusal("There is no agent yet; create one with `notecase agents create`.", Exit.FAILED)
    ids = ", ".join(screen.id_of(one.name) for one in found)
    raise Refusal(f"There are several agents ({ids}); choose one with --agent.", Exit.USAGE)
