"""`notecase state`: what is typed. `notes` does it."""

import click

from notecase_server.cli import notes
from notecase_server.cli.ask import ask, name_of
from notecase_server.cli.options import SERVER


@click.group()
def state() -> None:
    """Read, put and watch the notes of a session, a user or the app.

    Together they are its state. OWNER is a session's id, sessions/ID, users/ID or app.
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
    ask(server, lambda client: notes.get(client, notes.owner_of(owner), keys, as_json))


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
    read = notes.as_file if from_file else notes.as_text if text else notes.as_json
    ask(server, lambda client: notes.put(client, notes.owner_of(owner), key, value, read, if_version))


@state.command("watch")
@click.argument("session", metavar="SESSION")
@SERVER
def watch_state(session: str, server: str) -> None:
    """Print what changes in the state of a session, its user and the app, until Ctrl-C.

    Each change is a line, in a pipe an object of JSON. A server that is away is waited for, and what changed meanwhile
    is printed then.
    """
    ask(server, lambda client: notes.watch(client, name_of("sessions", session)))
