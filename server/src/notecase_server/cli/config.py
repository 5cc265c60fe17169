"""`notecase config`: the configuration file of a server."""

from pathlib import Path

import click

from notecase_server.auth.tables import SettingsError
from notecase_server.cli.serve import serve
from notecase_server.cli.serve_settings import check as mistakes_of
from notecase_server.cli.serve_settings import check_parts
from notecase_server.config import configure_logging


@click.group()
def config() -> None:
    """Check a configuration file."""


@config.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Print everything that is wrong with FILE, each with its key; the exit code is 1 then.

    The variables and files with secrets that it names are read, modules of tools are imported, and it is checked that
    the programs of MCP servers exist. Nothing is connected or opened: not the store, no provider, no MCP server and no
    identity provider. Options and NOTECASE_ variables are ignored, except NOTECASE_ADMIN_KEY.
    """
    configure_logging("console", "warning")
    try:
        found = mistakes_of(serve, file)
    except SettingsError as error:
        raise click.ClickException(error.mistakes[0].text) from None
    for path in found.file.exposed:
        click.echo(f"Warning: other users of this machine can read {path}.", err=True)
    mistakes = [*found.mistakes, *check_parts(found)]
    for setting, text in mistakes:
        click.echo(f"{setting}: {text}")
    if mistakes:
        raise click.exceptions.Exit(1)
    click.echo(f"{file} is fine.")
