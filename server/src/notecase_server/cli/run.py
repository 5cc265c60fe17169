"""`notecase run`: one question, one answer."""

import sys

import click
from notecase import Client, NotecaseError, text_of, v1

from notecase_server.cli import attaching, ids, named, output, piped, screen
from notecase_server.cli.ask import ask, name_of, read_text
from notecase_server.cli.connection import Exit, Refusal
from notecase_server.cli.follow import Follower, Left
from notecase_server.cli.options import SERVER, WAIT


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
    help="Who answers: in a new session it is needed where there are several agents. ID@REVISION is one revision.",
)
@click.option(
    "--session",
    default="",
    show_default=False,
    metavar="ID",
    shell_complete=ids.of("sessions"),
    help="Run in this session; else in a new one.",
)
@click.option(
    "--attach",
    multiple=True,
    metavar="FILE[:TYPE]",
    help="A file that goes with the text, with its media type where its name does not tell; - is standard input. May "
    "be given several times.",
)
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["text", "json", "yaml"]),
    default="text",
    help="The reply as it comes, or the run once it has ended, as JSON or YAML.",
)
@WAIT
@SERVER
def run(
    text: tuple[str, ...], agent: str, session: str, attach: tuple[str, ...], form: str, wait: float | None
) -> None:
    """Say TEXT to an agent, print its reply as it comes, and end.

    What comes through a pipe is said after TEXT, or alone without TEXT. Standard output has the reply alone; standard
    error has everything else, the name of a new session too.

    The exit code is 1 when the run fails or is cancelled, and 3 when it waits for somebody: at a terminal you are asked
    yourself. Ctrl-C cancels the run.
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
    """Returns what is said: TEXT and standard input, unless that is attached."""
    reads = text[-1:] == ("-",)
    words = " ".join(text[:-1] if reads else text)
    if reads + attached > 1:
        raise click.UsageError("Standard input can be read once only; there is more than one -.")
    if attached:
        return words
    if not text and sys.stdin is not None and sys.stdin.isatty():
        raise click.UsageError("Say something: as TEXT, or through a pipe.")
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
        if form != "text" and stream.name:
            output.print_data(output.as_data(stream.result), form)
        raise
    finally:
        if stream.session and not session:
            screen.aside(f"{stream.session} with {answering}")
    if form != "text":
        output.print_data(output.as_data(stream.result), form)
    return Exit.OK if well else Exit.FAILED


async def _only_agent(client: Client) -> str:
    """Returns the name of the only agent. Raises Refusal when there is none, or when there are several."""
    found = (await client.agents.ListAgents(v1.ListAgentsRequest(page_size=9))).agents
    if len(found) == 1:
        return found[0].name
    if not found:
        raise Refusal("There is no agent yet; `notecase agents create` makes one.", Exit.FAILED)
    ids = ", ".join(screen.id_of(one.name) for one in found)
    raise Refusal(f"There are several agents ({ids}); choose one with --agent.", Exit.USAGE)
