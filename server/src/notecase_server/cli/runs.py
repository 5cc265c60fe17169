"""`notecase runs`: lists, shows and cancels runs."""

import click
from notecase import Client, v1

from notecase_server.cli import ids, named, output, screen, waits
from notecase_server.cli.ask import ask
from notecase_server.cli.connection import Exit, Refusal
from notecase_server.cli.options import LIMIT, OUTPUT, SERVER

RUN = click.argument("run", metavar="RUN", shell_complete=ids.of("runs"))


def _state(run: v1.Run) -> str:
    return screen.word_of(v1.Run.State, run.state)


def short(name: str) -> str:
    """Returns a run's name as the commands take it: SESSION/RUN."""
    return name.removeprefix("sessions/").replace("/runs/", "/")


_COLUMNS = {
    "RUN": lambda one: short(one.name),
    "AGENT": lambda one: f"{screen.id_of(one.agent)}@{one.agent_revision}" if one.agent_revision else "",
    "STATE": _state,
    "CREATED": lambda one: screen.moment(one.create_time),
    "ENDED": lambda one: screen.moment(one.end_time) if one.HasField("end_time") else "",
}


@click.group()
def runs() -> None:
    """List, show and cancel runs.

    RUN is SESSION/RUN or the run's full name; SESSION alone means its newest run.
    """


@runs.command("list")
@click.argument("session", required=False, default="", metavar="[SESSION]", shell_complete=ids.of("sessions"))
@click.option(
    "--filter",
    "where",
    default="",
    show_default=False,
    metavar="EXPRESSION",
    help="List only matching runs, for example: state = RUNNING. Fields: state, agent, create_time and labels.KEY.",
)
@LIMIT
@OUTPUT
@SERVER
def list_runs(session: str, where: str, limit: int, form: str) -> None:
    """List the runs of one session or of all, newest first."""

    async def look(client: Client) -> None:
        request = v1.ListRunsRequest(
            parent=await named.session(client, session) if session else "sessions/-", filter=where
        )
        output.print_list(await output.listed(client.runs.ListRuns, request, "runs", limit), form, _COLUMNS)

    ask(look)


@runs.command("show")
@RUN
@OUTPUT
@SERVER
def show_run(run: str, form: str) -> None:
    """Print a run: its state, what it waits for, its token usage and its reply."""

    async def look(client: Client) -> None:
        found = await client.runs.GetRun(v1.GetRunRequest(name=await _named(client, run)))
        if form != "table":
            output.print_data(output.as_data(found), form)
            return
        last = await output.event_at(client, found.name.partition("/runs/")[0], found.last_sequence)
        _show(found, last.run_state_changed.reason)

    ask(look)


@runs.command("cancel")
@RUN
@click.option("--reason", default="", show_default=False, metavar="TEXT", help="The reason, recorded in the log.")
@click.option("--after-turn", is_flag=True, help="Let running tool calls finish first.")
@SERVER
def cancel_run(run: str, reason: str, after_turn: bool) -> None:
    """Cancel a run; its output so far is kept."""

    async def stop(client: Client) -> None:
        await client.cancel(await _named(client, run), reason, after_turn=after_turn)

    ask(stop)


async def _named(client: Client, given: str) -> str:
    """Returns a run's name; for a session alone, the name of its newest run. Raises Refusal when it has none."""
    session, run = await named.run(client, given)
    if run:
        return run
    newest = (await client.runs.ListRuns(v1.ListRunsRequest(parent=session, page_size=1))).runs
    if not newest:
        raise Refusal(f"{session} has no run.", Exit.FAILED)
    return newest[0].name


def _show(found: v1.Run, reason: str) -> None:
    """`reason` is from its last change of state, such as a cancel."""
    used = found.usage
    tokens = f"{used.input_tokens} input tokens, {used.output_tokens} output tokens, {used.model_calls} model calls"
    output.print_settings(
        found.name,
        {
            "state": ": ".join(filter(None, [_state(found), screen.one_line(reason, 200)])),
            "agent": f"{found.agent}@{found.agent_revision}" if found.agent_revision else found.agent,
            "created": screen.moment(found.create_time),
            "ended": screen.moment(found.end_time) if found.HasField("end_time") else "",
            "error": screen.one_line(found.error.message, 200),
            "used": tokens,
        },
    )
    for wait in waits.waits_of(found):
        click.echo(f"\nwaits for {wait.kind_word} {wait.id}\n  {wait.describe()}")
    if found.HasField("reply"):
        click.echo(f"\n{screen.message(found.reply)}")
