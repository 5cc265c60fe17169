"""Completes ids in commands with the Tab key."""

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

from notecase_server.cli import profiles_file

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def of(collection: str) -> Complete:
    """Completes the ids of a collection, such as "sessions"; see `lookup`."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from notecase_server.cli import lookup  # noqa: PLC0415  # imports the client, which only a Tab needs here

        return lookup.offered(context, collection, incomplete)

    return complete


def profiles(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes the names of profiles."""
    try:
        held = profiles_file.read().profiles
    except profiles_file.ProfilesError:
        return []
    return [CompletionItem(name, help=one.address) for name, one in sorted(held.items()) if name.startswith(incomplete)]
