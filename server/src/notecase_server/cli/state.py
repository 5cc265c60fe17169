"""`notecase state`: the commands; `notes` implements them."""

import click

from notecase_server.cli import ids, notes
from notecase_server.cli.ask import ask, read_text
from notecase_server.cli.options import SERVER, Number


@click.group()
def state() -> None:
    """Read, set, delete and watch the state of a session, a user or the app.

    OWNER is a session's id, sessions/ID, users/ID or app.
    """


@state.command("get")
@click.argument("owner", default="app", shell_complete=ids.of("states"))
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["table", "json", "yaml"]),
    help="Print a table, JSON or YAML, also for one KEY.",
)
@SERVER
def get_state(owner: str, keys: tuple[str, ...], form: str | None) -> None:
    """Print all or some keys of a state; without OWNER, of the app's.

    For one KEY, only the value is printed: text and bytes unchanged, in a pipe also the content of a file, anything
    else as JSON. Otherwise the output is a table at a terminal and a JSON object in a pipe, with bytes as base64. The
    exit code is 1 if a KEY does not exist.
    """
    ask(lambda client: notes.get(client, owner, keys, form or ""))


@state.command("put", context_settings={"ignore_unknown_options": True})  # -1 is a value
@click.argument("owner", shell_complete=ids.of("states"))
@click.argument("key")
@click.argument("value")
@click.option("--text", is_flag=True, help="Store VALUE as text, even if it is JSON.")
@click.option("--file", "from_file", is_flag=True, help="VALUE is the path of a file, which is uploaded as a blob.")
@click.option(
    "--if-version",
    type=Number(0),
    default=None,
    help="Set it only if the key has this version; 0: only if the key does not exist.",
)
@SERVER
def put_state(owner: str, key: str, value: str, text: bool, from_file: bool, if_version: int | None) -> None:
    """Set a key to VALUE: parsed as JSON if possible, else text; - reads standard input.

    In a pipe, the key's new version is printed, for use with --if-version.
    """
    read = notes.as_file if from_file else notes.as_text if text else notes.as_json
    given = value if from_file else read_text(value)
    ask(lambda client: notes.put(client, owner, key, given, read, if_version))


@state.command("delete")
@click.argument("owner", shell_complete=ids.of("states"))
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@SERVER
def delete_state(owner: str, keys: tuple[str, ...]) -> None:
    """Delete keys in one change; missing keys are ignored."""
    ask(lambda client: notes.delete(client, owner, keys))


@state.command("watch")
@click.argument("session", metavar="SESSION", shell_complete=ids.of("sessions"))
@SERVER
def watch_state(session: str) -> None:
    """Print changes to the state of a session, its user and the app, until Ctrl-C.

    Each change is a line; in a pipe, a JSON object. If the server is away, the command waits for it and then prints
    what changed meanwhile.
    """
    ask(lambda client: notes.watch(client, session))
