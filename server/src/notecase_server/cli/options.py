"""The options that several commands share."""

import re
from collections.abc import Callable
from pathlib import Path
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


_CONNECTION = "notecase.connection"


def _keep(context: click.Context, option: click.Parameter, value: Any) -> None:
    """Keeps an option for `connection`, the group's too where the command has none. A token that only a variable says
    is left to the client, which sends it with more care."""
    name = option.name or ""
    source = context.get_parameter_source(name)
    if source is click.core.ParameterSource.COMMANDLINE or (value and name != "token"):
        context.meta.setdefault(_CONNECTION, {})[name] = value


def connection() -> dict[str, Any]:
    """Returns what the options of the command say of its connection: those arguments of Client that are given, of
    `token`, `ca` and `plaintext`."""
    given = dict(click.get_current_context().meta.get(_CONNECTION, {}))
    if given.get("plaintext"):
        given.pop("ca", None)
    return given


_OPTIONS = (
    click.option(
        "--server",
        default=DEFAULT_ADDRESS,
        envvar="NOTECASE_ADDRESS",
        show_envvar=True,
        metavar="HOST:PORT",
        callback=_server,
        help="The server to talk to: by TLS, unless it is on this machine and no --ca is given.",
    ),
    click.option(
        "--token",
        envvar="NOTECASE_TOKEN",
        show_envvar=True,
        metavar="TOKEN",
        callback=_keep,
        expose_value=False,
        help="The key or token to call with. Other users of the machine see options, and not variables.",
    ),
    click.option(
        "--ca",
        type=click.Path(),
        envvar="NOTECASE_CA",
        show_envvar=True,
        metavar="FILE",
        callback=_keep,
        expose_value=False,
        help="The authorities that the server's certificate may be of: PEM. Without it, those that are known widely.",
    ),
    click.option(
        "--plaintext",
        is_flag=True,
        callback=_keep,
        expose_value=False,
        help="Talk without TLS beyond this machine, too; who is on the way can read it all.",
    ),
)


def SERVER(command: F) -> F:  # noqa: N802  # named as the other options are
    """The options of a command that talks to a server; the command itself gets its address alone."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


STORE = click.option(
    "--store",
    default="sqlite:notecase.db",
    envvar="NOTECASE_STORE",
    show_envvar=True,
    metavar="URL",
    help="Where everything is kept: sqlite:PATH, postgresql://USER@HOST/DATABASE with the parameters of libpq, or "
    "memory: to forget it all at the end.",
)

PASSWORD_FILE = click.option(
    "--store-password-file",
    type=click.Path(path_type=Path),
    envvar="NOTECASE_STORE_PASSWORD_FILE",
    show_envvar=True,
    metavar="FILE",
    help="The password for PostgreSQL, which may also be in PGPASSWORD or in the URL. Read again for each connection.",
)
