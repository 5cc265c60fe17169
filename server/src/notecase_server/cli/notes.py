"""Reads, puts and watches state in any of its three scopes, for a terminal or a script. An owner is given as
`named.owner` has it."""

import base64
import json
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any

import click
from google.protobuf import json_format
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from notecase import Client, NotecaseError, Plain, Retry, from_value, v1
from notecase.retry import Backoff

from notecase_server.cli import attaching, named, output, screen
from notecase_server.cli.connection import renews_token

CANNOT = (OverflowError, ValueError, RecursionError, DecodeError)
"""The exceptions for a key or a value that state cannot hold: ValueError, including UnicodeError for text that is not
Unicode, and DecodeError for a value that is nested too deep for protobuf."""

CANNOT_HOLD = "State cannot hold this value: integers have 64 bits, text is Unicode, lists are at most 16 levels deep."

NOTHING = "This state has no keys."

PATIENT = Retry(tries=1000)
"""A watch resumes after a cut, and gives up after more than an hour without a server."""


def parse(given: str) -> Plain:
    """Parses JSON; other text is returned unchanged. NaN and Infinity are not JSON. Raises RecursionError for lists
    nested without end."""
    try:
        value: Plain = json.loads(given, parse_constant=_no_json)
    except ValueError:
        return given
    return value


async def as_json(client: Client, given: str) -> Plain:
    """Parses JSON; other text is returned unchanged. See `parse`."""
    return parse(given)


async def as_text(client: Client, given: str) -> Plain:
    """Takes the value as text, whatever it looks like."""
    return given


async def as_file(client: Client, given: str) -> Plain:
    """Uploads a file, or for `-` standard input; see `attaching.upload`."""
    return await attaching.upload(client, *attaching.split(given))


def _no_json(name: str) -> float:
    raise ValueError(name)


async def get(client: Client, owner: str, keys: Sequence[str], form: str) -> int:
    """Prints the keys named, or all; returns the exit code: 1 when one that is named is not there. `form` is "table",
    "json" or "yaml"; empty: as it fits where the output goes."""
    owner = await named.owner(client, owner)
    entries = {key: entry async for key, entry in _entries(client, owner, keys)}
    missing = [key for key in keys if key not in entries]
    for key in missing:
        screen.failure(f"{owner}/state has no {key!r}.")
    if len(keys) == 1 and form != "table":
        for entry in entries.values():
            if entry.value.HasField("blob_value") and not (form or sys.stdout.isatty()):
                async for piece in client.download(entry.value.blob_value):
                    click.echo(piece, nl=False)
            else:
                _print_alone(from_value(entry.value), form)
    elif form in {"json", "yaml"} or not (form or sys.stdout.isatty()):
        held = {key: from_value(entry.value) for key, entry in sorted(entries.items())}
        output.print_data(json.loads(_json(held)), form)
    elif entries:
        rows = [
            (
                screen.one_line(key, 40),
                screen.note(from_value(entry.value), 60),
                str(entry.version),
                screen.moment(entry.update_time),
            )
            for key, entry in sorted(entries.items())
        ]
        click.echo(output.table(("KEY", "VALUE", "VERSION", "UPDATED"), rows))
    elif not keys:
        screen.aside(NOTHING)
    return 1 if missing else 0


async def put(
    client: Client,
    owner: str,
    key: str,
    given: str,
    read: Callable[[Client, str], Awaitable[Plain]],
    if_version: int | None,
) -> None:
    """Sets a key and prints its version, which is all that a script needs. `read` makes the value from the typed text.
    Raises ClickException for a value that state cannot hold."""
    try:
        value = await read(client, given)
        entry = await client.put_state(await named.owner(client, owner), key, value, if_version=if_version)
    except CANNOT:
        raise click.ClickException(CANNOT_HOLD) from None
    if sys.stdout.isatty():
        version = click.style(f"(version {entry.version})", dim=True)
        click.echo(f"{screen.one_line(key)} = {screen.note(value)}  {version}")
    else:
        click.echo(str(entry.version))


async def delete(client: Client, owner: str, keys: Sequence[str]) -> None:
    """Removes keys, all in one change; missing ones are ignored."""
    ops = [v1.StateOp(key=key, remove=Empty()) for key in keys]
    request = v1.UpdateStateRequest(
        name=f"{await named.owner(client, owner)}/state", ops=ops, request_id=uuid.uuid4().hex
    )
    await client.state.UpdateState(request)


async def watch(client: Client, session: str) -> None:
    """Prints what changes from now on in the state of the session, of its user and of the app. Waits for a server that
    is away, and then prints what changed meanwhile.

    Raises NotecaseError when the session does not exist, or not any more."""
    found = await client.sessions.GetSession(v1.GetSessionRequest(name=await named.session(client, session)))
    others = {f"{owner}/state": _Outside(client, owner) for owner in filter(None, (found.user, "app"))}
    request = v1.WatchEventsRequest(name=found.name, if_session_uid=found.uid, options=v1.WatchOptions(keep_open=True))
    backoff = Backoff(PATIENT, renews_token())
    while True:
        try:
            async for frame in client.runs.WatchEvents(request):
                if frame.HasField("attached"):
                    for other in others.values():
                        _print_changes(await other.missed())
                    if not request.HasField("after_sequence"):
                        request.after_sequence = frame.attached.last_sequence
                        screen.aside(f"Watching {', '.join([f'{found.name}/state', *others])}.")
                    backoff.progress()
                for event in frame.batch.events:
                    request.after_sequence = event.sequence or request.after_sequence
                    change = event.state_changed
                    if change.state in others:
                        _print_changes(await others[change.state].told(change))
                    elif event.HasField("state_changed"):
                        _print_changes([change])
            return
        except NotecaseError as error:
            await backoff.wait(error, limited=True)


class _Outside:
    """The state of a user or of the app. It is not part of the session's log, so no stream repeats its changes; it is
    read again when a version is missing."""

    def __init__(self, client: Client, owner: str) -> None:
        self._client = client
        self._owner = owner
        self._version = -1  # not read yet
        self._keys: set[str] = set()

    async def told(self, change: v1.StateChanged) -> list[v1.StateChanged]:
        """Returns the news in a change from the stream."""
        if change.version > self._version + 1:
            return await self.missed()
        if change.version <= self._version:
            return []
        self._version = change.version
        for op in change.ops:
            (self._keys.discard if op.HasField("remove") else self._keys.add)(op.key)
        return [change]

    async def missed(self) -> list[v1.StateChanged]:
        """Returns what has changed since the last change that was shown, key by key as it is now; at first nothing."""
        name, before = f"{self._owner}/state", self._version
        head = await self._client.state.GetState(v1.GetStateRequest(name=name, page_size=1))
        if head.version == before:
            return []
        entries = {key: entry async for key, entry in _entries(self._client, self._owner)}
        gone = self._keys - entries.keys()
        self._version, self._keys = head.version, set(entries)
        if before < 0:
            return []
        # What is newer than the head has its own event still to come.
        fresh = sorted((one.version, key) for key, one in entries.items() if before < one.version <= head.version)
        return [
            *(
                v1.StateChanged(state=name, version=version, ops=[v1.StateOp(key=key, set=entries[key].value)])
                for version, key in fresh
            ),
            *(
                v1.StateChanged(state=name, version=head.version, ops=[v1.StateOp(key=key, remove=Empty())])
                for key in sorted(gone)
            ),
        ]


async def _entries(client: Client, owner: str, keys: Iterable[str] = ()) -> AsyncIterator[tuple[str, v1.StateEntry]]:
    request = v1.GetStateRequest(name=f"{owner}/state", keys=keys, page_size=1000)
    while True:
        page = await client.state.GetState(request)
        for entry in page.entries.items():
            yield entry
        request.page_token = page.next_page_token
        if not request.page_token:
            return


def _json(value: Any) -> str:
    """Returns JSON in which bytes are base64 and a file is its reference, as in protobuf's JSON."""
    return screen.as_json(value, default=_json_of)


def _json_of(held: bytes | v1.Blob) -> Any:
    if isinstance(held, v1.Blob):
        return json_format.MessageToDict(held, preserving_proto_field_name=True)
    return base64.b64encode(held).decode()


def _print_alone(value: Any, form: str) -> None:
    """Prints a whole value: text and bytes as they are, as far as a terminal may have them, all else as JSON."""
    terminal = sys.stdout.isatty()
    if form == "yaml":
        output.print_data(json.loads(_json(value)), form)
    elif form or not isinstance(value, str | bytes | v1.Blob):
        click.echo(_json(value))
    elif terminal or isinstance(value, v1.Blob):
        click.echo(screen.harmless(value) if isinstance(value, str) else screen.note(value))
    else:
        click.echo(value, nl=isinstance(value, str))


def _print_changes(changes: Iterable[v1.StateChanged]) -> None:
    """Prints a line for each operation: for people, or as an object of JSON."""
    terminal = sys.stdout.isatty()
    for change in changes:
        for op in change.ops:
            if terminal:
                click.echo(f"{click.style(change.state.removesuffix('/state'), dim=True)}  {line_of(op)}")
            else:
                kind, value = _operation(op)
                click.echo(_json({"state": change.state, "version": change.version, "key": op.key, kind: value}))


def _operation(op: v1.StateOp) -> tuple[str, Any]:
    """Returns what an operation does, and its value."""
    kind = op.WhichOneof("op") or ""
    held = getattr(op, kind, None)
    return kind, from_value(held) if isinstance(held, v1.Value) else True if kind == "remove" else held


def line_of(op: v1.StateOp) -> str:
    """Returns an operation on one line, for people."""
    kind, value = _operation(op)
    match kind:
        case "set":
            told = f"= {screen.note(value)}"
        case "increment":
            told = f"{'-' if value < 0 else '+'}= {abs(value)}"
        case "append":
            told = f"+= [{screen.note(value)}]"
        case _:
            told = "is removed"
    return f"{screen.one_line(op.key)} {told}"
