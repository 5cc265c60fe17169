"""`notecase config`: the configuration file of a server."""

from pathlib import Path

import click

from notecase_server.auth.tables import SettingsError
from notecase_server.cli.serve import serve
from notecase_server.cli.serve_settings import check as mistakes_of
from notecase_server.cli.serve_settings import check_parts, exposed, overriding_variables
from notecase_server.config import configure_logging


@click.group()
def config() -> None:
    """Check a configuration file."""


@config.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Print all mistakes in FILE, each with its key; the exit code is 1 if there are any.

    The check reads the variables and secret files that FILE names, imports its tool modules, and looks for the programs
    of its MCP servers. It does not open the store or connect to a provider, an MCP server or an identity provider.
    Options and NOTECASE_ variables are ignored, except NOTECASE_ADMIN_KEY; variables that are set and take precedence
    over a key of FILE are named on standard error.
    """
    configure_logging("console", "warning")
    try:
        found = mistakes_of(serve, file)
    except SettingsError as error:
        raise click.ClickException(error.mistakes[0].text) from None
    for key, variable in overriding_variables(serve, found.file).items():
        click.echo(f"Warning: {variable} is set, and takes precedence over {key}.", err=True)
    for path in exposed(found.settings, found.file):
        click.echo(f"Warning: other users of this machine can read {path}.", err=True)
    mistakes = [*found.mistakes, *check_parts(found)]
    for setting, text in mistakes:
        click.echo(f"{setting}: {text}")
    if mistakes:
        raise click.exceptions.Exit(1)
    click.echo(f"{file} is valid.")
