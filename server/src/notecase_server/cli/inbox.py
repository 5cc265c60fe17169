"""`notecase inbox`, `approve`, `deny` and `answer`: what runs wait for, and the answers."""

from typing import Literal

import click
from notecase import Client, v1

from notecase_server.cli import ids, named, output, screen, waits
from notecase_server.cli.ask import ask, read_text
from notecase_server.cli.connection import Exit, Refusal
from notecase_server.cli.options import OUTPUT, SERVER
from notecase_server.cli.waits import APPROVAL, INTERRUPTED, QUESTION

TOOL = v1.InputRequest.KIND_UNSPECIFIED

WHERE = click.argument("run", metavar="SESSION", shell_complete=ids.of("runs"))
ID = click.option(
    "--id", "wanted", default="", show_default=False, metavar="ID", help="Which one, if the run waits for several."
)


@click.command()
@click.argument("session", required=False, default="", metavar="[SESSION]", shell_complete=ids.of("sessions"))
@OUTPUT
@SERVER
def inbox(session: str, form: str) -> None:
    """List what runs wait for: approvals, answers and results of callers' tools.

    Lists one session, or all. Pass the SESSION to `approve`, `deny` or `answer`. The column MAY ANSWER shows who may
    answer.
    """

    async def look(client: Client) -> None:
        parent = await named.session(client, session) if session else "sessions/-"
        if form != "table":
            output.print_data([output.as_data(run) async for run in client.waiting(parent)], form)
            return
        caller = await waits.caller_of(client)
        found = [(run, wait) async for run in client.waiting(parent) for wait in waits.waits_of(run)]
        rows = [
            (
                run.name.split("/")[1],
                wait.kind_word,
                wait.describe(80),
                "you" if waits.may_answer(caller, wait) else wait.who,
                screen.moment(run.state_time),
                wait.id,
            )
            for run, wait in found
        ]
        click.echo(output.table(("SESSION", "KIND", "WHAT", "MAY ANSWER", "SINCE", "ID"), rows))

    ask(look)


@click.command()
@WHERE
@ID
@click.option(
    "--arguments",
    default="",
    show_default=False,
    metavar="JSON",
    help="Run the call with these arguments instead; - reads standard input.",
)
@click.option(
    "--remember",
    type=click.Choice(["once", "run", "session"]),
    default="once",
    help="Apply this to later calls of the tool in the run or session, too.",
)
@SERVER
def approve(run: str, wanted: str, arguments: str, remember: Literal["once", "run", "session"]) -> None:
    """Approve a call that waits for approval, or run an interrupted call again."""
    edited = read_text(arguments)

    async def send(client: Client) -> None:
        wait = await _find(client, run, wanted, {APPROVAL, INTERRUPTED}, remember)
        await client.approve(wait.run, wait.id, edited or None, remember=remember)

    ask(send)


@click.command()
@WHERE
@ID
@click.option("--reason", default="", show_default=False, metavar="TEXT", help="The reason, which the model reads.")
@click.option(
    "--remember",
    type=click.Choice(["once", "run", "session"]),
    default="once",
    help="Apply this to later calls of the tool in the run or session, too.",
)
@SERVER
def deny(run: str, wanted: str, reason: str, remember: Literal["once", "run", "session"]) -> None:
    """Deny a call that waits for approval.

    For an interrupted call or a caller's tool, report that it failed; for a question, decline to answer.
    """

    async def send(client: Client) -> None:
        wait = await _find(client, run, wanted, {APPROVAL, INTERRUPTED, QUESTION, TOOL}, remember)
        if wait.asked is None:
            await client.give_result(wait.run, wait.id, error=reason or "The tool failed.")
        else:
            await client.deny(wait.run, wait.id, reason, remember=remember)

    ask(send)


@click.command()
@WHERE
@click.argument("text")
@ID
@SERVER
def answer(run: str, text: str, wanted: str) -> None:
    """Answer a question, or give the result of a caller's tool or of an interrupted call.

    TEXT is plain text, or JSON if the question has a schema; - reads standard input.
    """
    said = read_text(text)

    async def send(client: Client) -> None:
        wait = await _find(client, run, wanted, {QUESTION, INTERRUPTED, TOOL})
        if wait.asked is None:
            await client.give_result(wait.run, wait.id, said)
        else:
            await client.answer(wait.run, wait.id, said)

    ask(send)


async def _find(client: Client, run: str, wanted: str, kinds: set[int], remember: str = "once") -> waits.Wait:
    """Returns the input or call to answer. Raises Refusal when it does not exist, when others have to answer it, and
    when the answer of something other than an approval should be remembered, which the service does not do."""
    wait = await waits.find(client, *await named.run(client, run), wanted, kinds)
    if not waits.may_answer(await waits.caller_of(client), wait):
        raise Refusal(f"This waits for {wait.who}: {wait.describe()}", Exit.FAILED)
    if remember != "once" and wait.kind != APPROVAL:
        raise Refusal(f"--remember works only for approvals, and the run waits for {wait.phrase}.", Exit.USAGE)
    return wait
