"""The `notecase` command: serve, and look around from a terminal. All but `serve` know a server only by its address."""

import asyncio
import io
import os
import re
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal

import click
import grpc
from google.protobuf import text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from notecase import Client, NotecaseError, v1

from notecase_server import __version__, cli_state
from notecase_server import cli_screen as screen
from notecase_server.cli_chat import converse, name_of
from notecase_server.config import (
    DEFAULT_LISTEN,
    Settings,
    configure_logging,
    is_loopback,
    openai_from_environment,
)
from notecase_server.store.contract import StoreOpenError
from notecase_server.tools.contract import ToolSettingsError
from notecase_server.tools.mcp_settings import read_mcp_servers

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}

IMPORT_PIECE = 256 << 10
"""What is read of a file, and sent, at a time."""

INTERRUPTED = 130
"""The exit code of what Ctrl-C ended, as shells have it."""


def _address(context: click.Context, option: click.Parameter, value: str) -> str:
    """Without a port gRPC would take 443, and without a host all of them."""
    if not re.fullmatch(r"unix:.+|.+:[0-9]+", value):
        raise click.BadParameter(f"{value!r} is no address; want HOST:PORT, for example {DEFAULT_LISTEN}.")
    return value


def _server(context: click.Context, option: click.Parameter, value: str) -> str:
    """`notecase sessions --server A show S` asks A, too."""
    name = option.name or ""
    given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    above = context.parent.params.get(name) if context.parent else None
    return _address(context, option, value if given or above is None else str(above))


SERVER = click.option(
    "--server",
    default=DEFAULT_LISTEN,
    envvar="NOTECASE_SERVER",
    show_envvar=True,
    metavar="HOST:PORT",
    callback=_server,
    help="The server to talk to.",
)
STORE = click.option(
    "--store",
    default="sqlite:notecase.db",
    envvar="NOTECASE_STORE",
    show_envvar=True,
    metavar="URL",
    help="Where everything is kept: sqlite:PATH, or memory: to forget it all at the end.",
)
LIMIT = click.option("--limit", type=click.IntRange(1, 1000), default=50, help="How many to list.")
MORE = "There are more; --limit lists up to 1000."


def ask(server: str, conversation: Callable[[Client], Awaitable[int | None]]) -> None:
    """Talks to a server and exits with the code that came of it. What goes wrong is told in a sentence, with exit
    code 1."""

    async def talk() -> int | None:
        async with Client(server) as client:
            return await conversation(client)

    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that one of them does not know is shown as another
    try:
        sys.exit(asyncio.run(talk()))
    except NotecaseError as error:
        raise click.ClickException(screen.sentence(error, server)) from None
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@click.group(context_settings=HELP)
@click.version_option(__version__, prog_name="notecase")
def main() -> None:
    """A self-hosted gRPC agent service: agents, their sessions, state, messages and runs.

    Every option that shows a NOTECASE_ variable can also be set by it.
    """


@main.command()
@click.option(
    "--listen",
    default=DEFAULT_LISTEN,
    envvar="NOTECASE_LISTEN",
    show_envvar=True,
    metavar="HOST:PORT",
    callback=_address,
    help="Where to serve; port 0 takes a free one and prints it.",
)
@STORE
@click.option(
    "--insecure",
    is_flag=True,
    envvar="NOTECASE_INSECURE",
    show_envvar=True,
    help="Serve beyond this machine, with no TLS and no credentials: whoever reaches the port may do all.",
)
@click.option(
    "--max-runs",
    type=click.IntRange(1),
    default=1000,
    envvar="NOTECASE_MAX_RUNS",
    show_envvar=True,
    help="Runs under way at once; a start above it is refused with RESOURCE_EXHAUSTED.",
)
@click.option(
    "--max-blob-bytes",
    type=click.IntRange(1),
    default=256 << 20,
    envvar="NOTECASE_MAX_BLOB_BYTES",
    show_envvar=True,
    help="The largest content that is stored.",
)
@click.option(
    "--max-session-bytes",
    type=click.IntRange(1),
    default=1 << 30,
    envvar="NOTECASE_MAX_SESSION_BYTES",
    show_envvar=True,
    help="Of all content that one session refers to.",
)
@click.option(
    "--grace",
    type=click.FloatRange(0),
    default=10.0,
    envvar="NOTECASE_GRACE",
    show_envvar=True,
    metavar="SECONDS",
    help="How long runs may take to their next commit when the server stops; the rest goes on at the next start.",
)
@click.option(
    "--profile",
    default="",
    show_default=False,
    envvar="NOTECASE_PROFILE",
    show_envvar=True,
    metavar="PROFILE",
    help="What the model's provider takes, where its address and model do not tell: the name of a built-in profile, a "
    "JSON object of what to override, or a file with one.",
)
@click.option(
    "--connect-timeout",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    envvar="NOTECASE_CONNECT_TIMEOUT",
    show_envvar=True,
    metavar="SECONDS",
    help="How long connecting to the model's provider may take.",
)
@click.option(
    "--first-timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    envvar="NOTECASE_FIRST_TIMEOUT",
    show_envvar=True,
    metavar="SECONDS",
    help="How long the provider may take to the first piece of a reply.",
)
@click.option(
    "--idle-timeout",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    envvar="NOTECASE_IDLE_TIMEOUT",
    show_envvar=True,
    metavar="SECONDS",
    help="How long it may be silent between two pieces; comments count as silence.",
)
@click.option(
    "--whole-timeout",
    type=click.FloatRange(0, min_open=True),
    default=3600.0,
    envvar="NOTECASE_WHOLE_TIMEOUT",
    show_envvar=True,
    metavar="SECONDS",
    help="How long an answer may take in all.",
)
@click.option(
    "--max-retries",
    type=click.IntRange(0),
    default=2,
    envvar="NOTECASE_MAX_RETRIES",
    show_envvar=True,
    metavar="NUMBER",
    help="How often a call of the model is repeated when what went wrong may pass.",
)
@click.option(
    "--retry-time",
    type=click.FloatRange(0),
    default=60.0,
    envvar="NOTECASE_RETRY_TIME",
    show_envvar=True,
    metavar="SECONDS",
    help="How long may be waited between all of these tries together.",
)
@click.option(
    "--tools",
    multiple=True,
    envvar="NOTECASE_TOOLS",
    show_envvar=True,
    metavar="MODULE",
    help="A Python module whose functions marked with @tool agents may call; may be given several times.",
)
@click.option(
    "--mcp-config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="NOTECASE_MCP_CONFIG",
    show_envvar=True,
    metavar="FILE",
    help="MCP servers whose tools agents may call: JSON or TOML with `mcpServers`.",
)
@click.option(
    "--log-format",
    type=click.Choice(["console", "json"]),
    default="console",
    envvar="NOTECASE_LOG_FORMAT",
    show_envvar=True,
    help="For people, or one JSON object a line. Logs go to standard error and hold no message contents.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    envvar="NOTECASE_LOG_LEVEL",
    show_envvar=True,
    help="The least that is logged.",
)
def serve(
    listen: str,
    store: str,
    insecure: bool,
    max_runs: int,
    max_blob_bytes: int,
    max_session_bytes: int,
    grace: float,
    profile: str,
    connect_timeout: float,
    first_timeout: float,
    idle_timeout: float,
    whole_timeout: float,
    max_retries: int,
    retry_time: float,
    tools: tuple[str, ...],
    mcp_config: Path | None,
    log_format: Literal["console", "json"],
    log_level: str,
) -> None:
    """Serve until SIGTERM or SIGINT.

    The model's provider is `openai` when OPENAI_API_KEY or OPENAI_BASE_URL is set (OPENAI_MODEL names the default
    model), and the built-in `offline` one otherwise.
    """
    # These bring the model providers' libraries, which take as long as all the rest and are of no use to a client.
    import uvloop  # noqa: PLC0415

    from notecase_server.serve import serve as serve_forever  # noqa: PLC0415

    if not insecure and not is_loopback(listen):
        raise click.ClickException(
            f"{listen} can be reached from other machines, and this server has no TLS and no credentials yet. "
            f"Listen on {DEFAULT_LISTEN}, or say --insecure where the network itself is trusted."
        )
    configure_logging(log_format, log_level)
    started = False

    def ready(port: int) -> None:
        nonlocal started
        started = True
        click.echo(f"listening on port {port}")

    openai = openai_from_environment()
    if openai is not None:
        openai = replace(
            openai,
            profile=profile,
            connect_timeout=connect_timeout,
            first_timeout=first_timeout,
            idle_timeout=idle_timeout,
            whole_timeout=whole_timeout,
            max_retries=max_retries,
            retry_time=retry_time,
        )
    try:
        settings = Settings(
            listen=listen,
            store=store,
            max_runs=max_runs,
            max_blob_bytes=max_blob_bytes,
            max_session_bytes=max_session_bytes,
            grace=grace,
            openai=openai,
            tools=tools,
            mcp_servers=read_mcp_servers(mcp_config) if mcp_config else {},
        )
        uvloop.run(serve_forever(settings, ready))
    except (StoreOpenError, ToolSettingsError) as error:
        raise click.ClickException(str(error)) from None
    except ValueError as error:
        if started:
            raise
        raise click.ClickException(f"The openai provider cannot be used: {error}.") from None
    except RuntimeError as error:
        if "bind" not in str(error):
            raise
        raise click.ClickException(f"{listen} cannot be listened on; another server may have it.") from None


@main.command()
@STORE
@click.option("--force", is_flag=True, help="Replace DEST where it exists.")
@click.argument("destination", metavar="DEST", type=click.Path(path_type=Path, dir_okay=False))
def backup(store: str, force: bool, destination: Path) -> None:
    """Copy a store to the file DEST, while a server goes on with it.

    The copy is the store as it is at one moment, and a store itself: `notecase serve --store sqlite:DEST`. It holds
    everything, also what is deleted from the store later on.
    """
    from notecase_server.serve import backup as copy  # noqa: PLC0415

    try:
        copy(store, destination, force)
    except StoreOpenError as error:
        raise click.ClickException(str(error)) from None


@main.command()
@SERVER
def health(server: str) -> None:
    """Ask a server how it is.

    The exit code is 0 when it serves and 1 otherwise.
    """

    async def check() -> int:
        async with grpc.aio.insecure_channel(server) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its types know no methods
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=3)
        click.echo(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
        return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1

    try:
        sys.exit(asyncio.run(check()))
    except grpc.RpcError as error:
        raise click.ClickException(f"{server} does not answer ({error.code().name}).") from None


@main.command()
@SERVER
@click.option(
    "--agent",
    default="",
    show_default=False,
    envvar="NOTECASE_AGENT",
    show_envvar=True,
    metavar="ID",
    help="Who answers: of a new session from then on, of a resumed one in this chat. ID@REVISION is one revision.",
)
@click.option(
    "--session",
    default="",
    show_default=False,
    metavar="ID",
    help="Resume this session; with --new, open one of this id.",
)
@click.option("--new", is_flag=True, help="Open a new session without asking.")
def chat(server: str, agent: str, session: str, new: bool) -> None:
    """Talk with an agent.

    At a terminal a session is chosen from a list unless --session or --new say which. Ctrl-C stops a reply and keeps
    the conversation; at the prompt Ctrl-C or Ctrl-D leave. /help tells the rest.

    Through a pipe each line is a message in a new session, or in that of --session. The replies alone go to standard
    output, and the exit code is 1 when a message had none.
    """
    ask(server, lambda client: converse(client, server, agent, session, new))


@main.group(invoke_without_command=True)
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


@main.command("export")
@click.argument("session", metavar="ID")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@SERVER
def export_session(session: str, file: Path, server: str) -> None:
    """Write a session to a file, to be imported here or elsewhere.

    An existing file is replaced once the new one is whole.
    """

    async def save(client: Client) -> None:
        with _beside(file) as part:
            async for piece in client.export_session(name_of("sessions", session)):
                part.write(piece)

    with _on_disk(file):
        ask(server, save)


@main.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--session", default="", show_default=False, metavar="ID", help="The id of the new session.")
@SERVER
def import_session(file: Path, session: str, server: str) -> None:
    """Make a new session of an exported one."""

    async def load(client: Client) -> None:
        with file.open("rb") as whole:
            pieces = iter(lambda: whole.read(IMPORT_PIECE), b"")
            made = await client.import_session(pieces, session_id=session.removeprefix("sessions/"))
        click.echo(f"{made.name}, {made.last_sequence} events")

    with _on_disk(file):
        ask(server, load)


@contextmanager
def _beside(file: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `file` once the block has ended well: nobody ever finds half of one."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}-", delete=False) as part:
        try:
            yield part
            part.flush()
            os.fsync(part.fileno())
            Path(part.name).replace(file)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


@contextmanager
def _on_disk(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}.") from None


@main.group(invoke_without_command=True)
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


@main.group()
def state() -> None:
    """Read, put and watch notes: the state of a session, of a user, or of the app.

    OWNER is a session's id, sessions/ID, users/ID or app.
    """


@state.command("get")
@click.argument("owner", default="app")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, at a terminal and of text, too.")
@SERVER
def get_state(owner: str, keys: tuple[str, ...], as_json: bool, server: str) -> None:
    """Print a state, that of the app when no OWNER is named, or some keys of it.

    Of one KEY the value alone is printed, whole: text and bytes as they are, into a pipe also the content of a file,
    all else as JSON. Otherwise it is a table at a terminal and a JSON object in a pipe, with bytes as base64. The exit
    code is 1 when a KEY is not there.
    """
    ask(server, lambda client: cli_state.get(client, cli_state.owner_of(owner), keys, as_json))


@state.command("put", context_settings={"ignore_unknown_options": True})  # -1 is a value
@click.argument("owner")
@click.argument("key")
@click.argument("value")
@click.option("--text", is_flag=True, help="VALUE is text, whatever it looks like.")
@click.option("--file", "from_file", is_flag=True, help="VALUE is a file, whose content is uploaded and referred to.")
@click.option(
    "--if-version",
    type=click.IntRange(0),
    default=None,
    help="Only if the key has this version; 0: only if there is no such key.",
)
@SERVER
def put_state(
    owner: str, key: str, value: str, text: bool, from_file: bool, if_version: int | None, server: str
) -> None:
    """Set a key to VALUE: JSON as what it is, all else as text.

    In a pipe the key's new version is printed, which --if-version takes.
    """
    read = cli_state.as_file if from_file else cli_state.as_text if text else cli_state.as_json
    ask(server, lambda client: cli_state.put(client, cli_state.owner_of(owner), key, value, read, if_version))


@state.command("watch")
@click.argument("session", metavar="SESSION")
@SERVER
def watch_state(session: str, server: str) -> None:
    """Print what changes in the state of a session, its user and the app, until Ctrl-C.

    Each change is a line, in a pipe an object of JSON. A server that is away is waited for, and what changed meanwhile
    is printed then.
    """
    ask(server, lambda client: cli_state.watch(client, name_of("sessions", session)))
