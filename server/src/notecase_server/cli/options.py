"""The options that several commands share."""

import re

import click

DEFAULT_ADDRESS = "127.0.0.1:7420"
"""Where `serve` listens and the other commands look for it."""


def address(context: click.Context, option: click.Parameter, value: str) -> str:
    """Returns an option's value if it is an address. Raises BadParameter otherwise: without a port gRPC would take
    443, and without a host all of them."""
    if not re.fullmatch(r"unix:.+|.+:[0-9]+", value):
        raise click.BadParameter(f"{value!r} is no address; want HOST:PORT, for example {DEFAULT_ADDRESS}.")
    return value


def _server(context: click.Context, option: click.Parameter, value: str) -> str:
    """Takes the group's option where the command has none: `notecase sessions --server A show S` asks A, too."""
    name = option.name or ""
    given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    above = context.parent.params.get(name) if context.parent else None
    return address(context, option, value if given or above is None else str(above))


SERVER = click.option(
    "--server",
    default=DEFAULT_ADDRESS,
    envvar="NOTECASE_SERVER",
    show_envvar=True,
    metavar="HOST:PORT",
    callback=_server,
    help="The server to talk to.",
)
STORE = click.option(
    "--store",
    default="sqlite:notecase.db",
    envvar="NOTECASE_STORE",
    show_envvar=True,
    metavar="URL",
    help="Where everything is kept: sqlite:PATH, or memory: to forget it all at the end.",
)
