"""`notecase config`: the configuration file of a server."""

from pathlib import Path

import click

from notecase_server.auth.tables import SettingsError
from notecase_server.cli.serve import serve
from notecase_server.cli.serve_settings import check as mistakes_of


@click.group()
def config() -> None:
    """Check a configuration file."""


@config.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Print everything that is wrong with FILE, each with its key; the exit code is 1 then.

    The variables and files with secrets that it names are read. Options and NOTECASE_ variables have no say, but for
    NOTECASE_ADMIN_KEY; the store, modules of tools and MCP servers are not looked at.
    """
    try:
        found = mistakes_of(serve, file)
    except SettingsError as error:
        raise click.ClickException(error.mistakes[0].text) from None
    for path in found.exposed:
        click.echo(f"Warning: other users of this machine can read {path}.", err=True)
    for setting, text in found.mistakes:
        click.echo(f"{setting}: {text}")
    if found.mistakes:
        raise click.exceptions.Exit(1)
    click.echo(f"{file} is fine.")
