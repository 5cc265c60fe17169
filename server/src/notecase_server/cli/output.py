"""Prints the service's resources as a table, JSON or YAML."""

import io
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import click
from google.protobuf import json_format
from google.protobuf.message import Message
from notecase import Client, v1

from notecase_server.cli import screen

M = TypeVar("M", bound=Message)

PAGE = 1000
"""The largest page of a list that the service gives."""

MORE = "There are more; raise --limit to list them."


def as_data(message: Message) -> Any:
    """Returns a message as protobuf's JSON has it, with the names of the protos."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def print_data(data: Any, output: str) -> None:
    """Prints plain data as "json" or "yaml"."""
    click.echo(as_yaml(data) if output == "yaml" else screen.as_json(data, indent=2))


def print_one(found: M, output: str, show: Callable[[M], None]) -> None:
    """Prints one resource: as data, or by `show` for people."""
    if output == "table":
        show(found)
    else:
        print_data(as_data(found), output)


def print_list(found: Sequence[M], output: str, columns: Mapping[str, Callable[[M], str]]) -> None:
    """Prints a list of resources: as an array, or as a table with these columns, each with a function that returns the
    cell."""
    if output == "table":
        click.echo(table(list(columns), [[cell(one) for cell in columns.values()] for one in found]))
    else:
        print_data([as_data(one) for one in found], output)


def print_settings(title: str, settings: Mapping[str, str]) -> None:
    """Prints a resource for people: a heading, and those settings that have a value."""
    click.secho(title.rstrip(), bold=True)
    if rows := [setting for setting in settings.items() if setting[1]]:
        click.echo("\n".join(screen.aligned(rows)))


class _Page(Protocol):
    """An answer of a List method."""

    next_page_token: str


async def listed(ask: Callable[[Any], Awaitable[Any]], request: Any, field: str, limit: int) -> list[Any]:
    """Returns the first `limit` resources of a list, from as many pages as it takes, and says if there are more.
    `field` is the field of the answer that holds them."""
    found: list[Any] = []
    async for one in every(ask, request, field, min(limit, PAGE)):
        if len(found) == limit:
            screen.aside(MORE)
            break
        found.append(one)
    return found


async def every(
    ask: Callable[[Any], Awaitable[Any]], request: Any, field: str, page_size: int = PAGE
) -> AsyncIterator[Any]:
    """Yields the resources of a list, page by page."""
    request.page_size = page_size
    while True:
        page: _Page = await ask(request)
        for one in getattr(page, field):
            yield one
        request.page_token = page.next_page_token
        if not request.page_token:
            return


async def event_at(client: Client, session: str, sequence: int) -> v1.Event:
    """Returns an event of a session's log; an empty one for sequence 0."""
    if sequence:
        options = v1.WatchOptions(durable_only=True)
        request = v1.WatchEventsRequest(name=session, after_sequence=sequence - 1, options=options)
        async for frame in client.runs.WatchEvents(request):
            for event in frame.batch.events:
                if event.sequence == sequence:
                    return event
    return v1.Event()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table: at a terminal no wider than that, with long cells on several lines; in a pipe a line a row."""
    if not sys.stdout.isatty():
        return "\n".join(screen.aligned([header, *rows]))
    from rich.console import Console  # noqa: PLC0415  # only a table at a terminal pays for its import
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for name in header:
        made.add_column(Text(name, style="dim"), overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    written = io.StringIO()
    Console(file=written, force_terminal=True, color_system="standard", highlight=False).print(made)
    return written.getvalue().rstrip("\n")


def as_yaml(data: Any) -> str:
    """Returns YAML in the order of the data, with long texts as literal blocks, and without a trailing line break."""
    import yaml  # noqa: PLC0415  # as rich

    class Dumper(yaml.SafeDumper):
        """Writes text of several lines as a block."""

    def text(dumper: Any, held: str) -> Any:
        style = '"' if screen.escaped(held) != held else "|" if "\n" in held else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", held, style=style)

    Dumper.add_representer(str, text)
    made: str = yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return screen.escaped(made.removesuffix("\n").removesuffix("\n..."))
