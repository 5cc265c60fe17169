"""The options that several commands share."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from notecase_server.cli import ids

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_ADDRESS = "127.0.0.1:7420"
"""Where `serve` listens and the other commands look for it."""

_TARGETS = "unix|unix-abstract|dns|ipv4|ipv6|vsock|xds|passthrough"
"""gRPC's own schemes of naming a server, which it judges itself."""


def address(context: click.Context, option: click.Parameter, value: str) -> str:
    """Returns an option's value if it is an address. Raises BadParameter otherwise: without a port gRPC would take
    443, without a host all of them, and of a list or a URL it would look up a part."""
    if not re.fullmatch(rf"(?:{_TARGETS}):.+|(?:\[[^\]\s]+\]|[^:/?#@,\s\[\]]+):[0-9]+", value):
        raise click.BadParameter(f"{value!r} is not an address; write HOST:PORT, for example {DEFAULT_ADDRESS}.")
    return value


class Given(NamedTuple):
    """The options below by name, as far as they are given."""

    options: dict[str, Any]
    """On the command line."""
    variables: dict[str, Any]
    """By a variable alone."""


def given_connection(context: click.Context) -> Given:
    """Returns what is kept for `connection`."""
    kept: Given = context.meta.setdefault("notecase.connection", Given({}, {}))
    return kept


def _keep(context: click.Context, option: click.Parameter, value: Any) -> None:
    """Keeps an option for `connection`. A token that only a variable says is kept as None: the client takes it from
    there, and sends it with more care."""
    name, kept = option.name or "", given_connection(context)
    if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
        kept.options[name] = value
    elif value:
        kept.variables[name] = value if name != "token" else None


def _keep_address(context: click.Context, option: click.Parameter, value: str) -> None:
    if value:
        _keep(context, option, address(context, option, value))


_OPTIONS = (
    click.option(
        "--server",
        default="",
        show_default=DEFAULT_ADDRESS,
        envvar="NOTECASE_ADDRESS",
        show_envvar=True,
        metavar="HOST:PORT",
        callback=_keep_address,
        expose_value=False,
        help="The server to talk to: by TLS, unless it is on this machine and no --ca is given.",
    ),
    click.option(
        "--profile",
        default="",
        show_default=False,
        envvar="NOTECASE_PROFILE",
        show_envvar=True,
        metavar="NAME",
        shell_complete=ids.profiles,
        callback=_keep,
        expose_value=False,
        help="Take the server, token and authorities of this profile; see `notecase profiles`. Other options win "
        "over it.",
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
        help="Talk without TLS beyond this machine, too; everybody on the way can read it.",
    ),
)


def SERVER(command: F) -> F:  # noqa: N802  # named as the other options are
    """Adds the options of a command that talks to a server. `connection` reads them; the command itself gets none."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


OUTPUT = click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["table", "json", "yaml"]),
    default="table",
    help="A table for people, or everything that the service says as JSON or YAML.",
)
"""The form in which a command prints what it reads."""

LIMIT = click.option("--limit", type=click.IntRange(1), default=50, help="How many to list at most.")

WAIT = click.option(
    "--wait",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="How long a run may wait for a caller's tool before you are asked for its result; 2 without this option. "
    "Where there is no terminal: for anybody, before the command ends; 10 without it.",
)

FORCE = click.option("--force", is_flag=True, help="Replace FILE where it exists, once the new one is whole.")

YES = click.option("--yes", is_flag=True, help="Do not ask first.")

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
