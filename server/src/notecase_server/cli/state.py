"""`notecase state`: what is typed. `notes` does it."""

import click

from notecase_server.cli import ids, notes
from notecase_server.cli.ask import ask, read_text
from notecase_server.cli.options import SERVER


@click.group()
def state() -> None:
    """Read, put, delete and watch the notes of a session, a user or the app.

    Together they are its state. OWNER is a session's id, sessions/ID, users/ID or app.
    """


@state.command("get")
@click.argument("owner", default="app", shell_complete=ids.of("states"))
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["table", "json", "yaml"]),
    help="Always a table, JSON or YAML, of one KEY too.",
)
@SERVER
def get_state(owner: str, keys: tuple[str, ...], form: str | None) -> None:
    """Print a state, that of the app when no OWNER is named, or some keys of it.

    Of one KEY the value alone is printed, whole: text and bytes as they are, into a pipe also the content of a file,
    all else as JSON. Otherwise it is a table at a terminal and a JSON object in a pipe, with bytes as base64. The exit
    code is 1 when a KEY is not there.
    """
    ask(lambda client: notes.get(client, owner, keys, form or ""))


@state.command("put", context_settings={"ignore_unknown_options": True})  # -1 is a value
@click.argument("owner", shell_complete=ids.of("states"))
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
def put_state(owner: str, key: str, value: str, text: bool, from_file: bool, if_version: int | None) -> None:
    """Set a key to VALUE: JSON as what it is, all else as text; - is standard input.

    In a pipe the key's new version is printed, which --if-version takes.
    """
    read = notes.as_file if from_file else notes.as_text if text else notes.as_json
    given = value if from_file else read_text(value)
    ask(lambda client: notes.put(client, owner, key, given, read, if_version))


@state.command("delete")
@click.argument("owner", shell_complete=ids.of("states"))
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@SERVER
def delete_state(owner: str, keys: tuple[str, ...]) -> None:
    """Remove keys, all at once; those that are not there are passed over."""
    ask(lambda client: notes.delete(client, owner, keys))


@state.command("watch")
@click.argument("session", metavar="SESSION", shell_complete=ids.of("sessions"))
@SERVER
def watch_state(session: str) -> None:
    """Print what changes in the state of a session, its user and the app, until Ctrl-C.

    Each change is a line, in a pipe an object of JSON. A server that is away is waited for, and what changed meanwhile
    is printed then.
    """
    ask(lambda client: notes.watch(client, session))
