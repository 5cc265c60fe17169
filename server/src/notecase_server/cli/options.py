"""The options that several commands share."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

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


TOKEN = "notecase.token"
"""Under which a command's context has the key that it calls with."""


def _keep(context: click.Context, option: click.Parameter, value: str) -> None:
    context.meta[TOKEN] = value


_TOKEN = click.option(
    "--token",
    default="",
    show_default=False,
    envvar="NOTECASE_TOKEN",
    show_envvar=True,
    metavar="KEY",
    callback=_keep,
    expose_value=False,
    help="The key to call with, where the server needs one. Others on the machine see options, and not variables.",
)
_SERVER = click.option(
    "--server",
    default=DEFAULT_ADDRESS,
    envvar="NOTECASE_SERVER",
    show_envvar=True,
    metavar="HOST:PORT",
    callback=_server,
    help="The server to talk to.",
)


def SERVER(command: F) -> F:  # noqa: N802  (as the other options are named)
    """The options of a command that calls a server; the command is given the address only."""
    return _SERVER(_TOKEN(command))


STORE = click.option(
    "--store",
    default="sqlite:notecase.db",
    envvar="NOTECASE_STORE",
    show_envvar=True,
    metavar="URL",
    help="Where everything is kept: sqlite:PATH, or memory: to forget it all at the end.",
)
