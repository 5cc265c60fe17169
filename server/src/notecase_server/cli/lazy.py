"""Loads a command's module only when the command is used, so that it does not pay for the imports of all."""

import errno
import gc
import pkgutil
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from notecase_server.cli import closed_streams

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""Errors of a disk that takes no more. A pipe whose reader has gone ends a command without a word."""


class Lazy(NamedTuple):
    """Where a command is defined, and its line in the list of commands."""

    place: str
    """The command's module within `notecase_server.cli` and its name there, such as "transfer:export_session"."""
    summary: str
    """The first sentence of the command's help, here so that listing the commands imports none of them."""


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is named."""

    def __init__(self, *, table: Mapping[str, Lazy], **settings: Any) -> None:
        names = {name: click.Command(name) for name in table}  # for the list, and for a hint at a name typed wrongly
        super().__init__(commands=names, **settings)
        self.table = table

    def main(self, *args: Any, **extra: Any) -> Any:
        """Runs the command line, as click does, and says so where the output is on a full disk."""
        try:
            return super().main(*args, **extra)
        except OSError as error:
            if error.errno not in FULL:
                raise
            closed_streams.drop(sys.stdout)
            click.echo(f"Error: The output cannot be written: {error.strerror}.", err=True)
            sys.exit(1)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        gc.disable()  # modules are not garbage: searching them during the import takes a sixth of a start
        try:
            command: click.Command = pkgutil.resolve_name(f"notecase_server.cli.{self.table[cmd_name].place}")
        finally:
            gc.enable()
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Returns the commands that begin so, and imports none of them."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        known = self.table.items()
        return [CompletionItem(name, help=told.summary) for name, told in known if name.startswith(incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.table[name].summary) for name in self.list_commands(ctx)])
