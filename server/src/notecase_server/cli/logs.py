"""`notecase logs`: a session's log, event by event."""

import click
from google.protobuf.message import Message
from notecase import Client, NotecaseError, Retry, v1
from notecase.retry import Backoff

from notecase_server.cli import ids, named, output, screen
from notecase_server.cli.ask import ask
from notecase_server.cli.connection import renews_token
from notecase_server.cli.notes import line_of
from notecase_server.cli.options import OUTPUT, SERVER, Number

PATIENT = Retry(tries=1000)
"""Following resumes after a cut, and gives up after more than an hour without a server."""


@click.command()
@click.argument("session", metavar="SESSION", shell_complete=ids.of("sessions"))
@click.option(
    "-f", "--follow", is_flag=True, help="Keep printing new events until Ctrl-C; if the server is away, wait for it."
)
@click.option("--after", type=Number(0), default=0, metavar="SEQUENCE", help="Start after this sequence.")
@OUTPUT
@SERVER
def logs(session: str, follow: bool, after: int, form: str) -> None:
    """Print the events of a session's log, in order of their sequence.

    -o json prints one object per line, -o yaml one document per event.
    """
    ask(lambda client: _print(client, session, follow, after, form))


async def _print(client: Client, given: str, follow: bool, after: int, form: str) -> None:
    runs = _Runs()
    request = v1.WatchEventsRequest(
        after_sequence=after,
        options=v1.WatchOptions(durable_only=True, keep_open=follow),
    )
    backoff = Backoff(PATIENT, renews_token())
    while True:
        try:
            if not request.name:
                request.name = await named.session(client, given)
                await runs.read(client, request.name)
            async for frame in client.runs.WatchEvents(request):
                backoff.progress()
                request.if_session_uid = request.if_session_uid or frame.attached.session_uid
                for event in frame.batch.events:
                    if event.sequence:
                        request.after_sequence = event.sequence
                        click.echo(_line(event, runs) if form == "table" else _WRITTEN[form](event))
                if frame.batch.caught_up and not follow:
                    return
            return
        except NotecaseError as error:
            if not follow and error.reason != "WATCHER_TOO_SLOW":  # a reader of the pipe may take its time
                raise
            await backoff.wait(error, limited=bool(request.if_session_uid))


def _json(event: v1.Event) -> str:
    return screen.as_json(output.as_data(event))


def _yaml(event: v1.Event) -> str:
    return f"---\n{output.as_yaml(output.as_data(event))}"


class _Runs:
    """The ids of a session's runs, shortened as far as they still distinguish the runs known so far."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    async def read(self, client: Client, session: str) -> None:
        """Reads which runs there are: the newest ones."""
        request = v1.ListRunsRequest(parent=session, page_size=named.READ)
        self._known.update(screen.id_of(one.name) for one in (await client.runs.ListRuns(request)).runs)

    def short(self, run: str) -> str:
        """Returns the first 8 digits of an id that was not chosen by a caller, or as many more as it takes."""
        self._known.add(run)
        cuts = [run[:length] for length in (8, 13, 18, 23)] if named.is_made(run) else []
        return next((cut for cut in cuts if sum(one.startswith(cut) for one in self._known) == 1), run)


def _line(event: v1.Event, runs: _Runs) -> str:
    kind = event.WhichOneof("payload") or ""
    run = runs.short(screen.id_of(event.run)) if event.run else ""
    told = " ".join(filter(None, [kind, screen.one_line(_told(event, kind), 160), f"({run})" if run else ""]))
    return f"{event.sequence:>6}  {click.style(event.create_time.ToJsonString()[:19], dim=True)}  {told}"


def _told(event: v1.Event, kind: str) -> str:
    """Returns the gist of an event."""
    match kind:
        case "message_added":
            return f"{screen.author(event.message_added)}: {click.unstyle(screen.message(event.message_added, 160))}"
        case "run_state_changed":
            change = event.run_state_changed
            return f"{screen.word_of(v1.Run.State, change.state)} {change.error.message or change.reason}"
        case "tool_started":
            return screen.called(event.tool_started)
        case "tool_finished":
            return screen.call(event.tool_finished)
        case "input_requested":
            asked = event.input_requested
            return f"{screen.word_of(v1.InputRequest.Kind, asked.kind)} {asked.prompt or screen.called(asked.call)}"
        case "input_resolved":
            response = event.input_resolved.response
            edited = f"with edited arguments {response.edited_arguments}" if response.edited_arguments else ""
            told = screen.word_of(v1.InputResponse.Decision, response.decision)
            return " ".join(filter(None, [told, edited, response.answer or response.reason]))
        case "state_changed":
            return "; ".join(map(line_of, event.state_changed.ops))
        case "run_started":
            return f"{event.run_started.agent}@{event.run_started.agent_revision}"
        case "usage":
            return f"{event.usage.input_tokens} input tokens, {event.usage.output_tokens} output tokens"
        case "summarized":
            return event.summarized.text
        case "rewound":
            return f"to {event.rewound.to_sequence}"
        case _:
            held = getattr(event, kind, None)
            return str(held) if isinstance(held, Message) else ""


_WRITTEN = {"json": _json, "yaml": _yaml}
