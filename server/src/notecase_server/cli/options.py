"""The options that several commands share."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
from click.core import ParameterSource

from notecase_server.cli import ids

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_ADDRESS = "127.0.0.1:7420"
"""Where `serve` listens and the other commands look for it."""

MAX_PORT = 65535


class Number(click.IntRange):
    """A whole number that a request can have. The help does not show the upper bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number: int = super().convert(value, param, ctx)
        if number >= 1 << 63:
            self.fail(f"{number} is too large.", param, ctx)
        return number


_TARGETS = "unix|unix-abstract|dns|ipv4|ipv6|vsock|xds|passthrough"
"""gRPC's own schemes of naming a server, which it judges itself."""


def address(context: click.Context, option: click.Parameter, value: str, *, targets: bool = True) -> str:
    """Returns an option's value if it is an address, or with `targets` a name of one in a scheme of gRPC's. Raises
    BadParameter otherwise: without a port gRPC would take 443, without a host all of them, of a list or a URL it would
    look up a part, and of a port it would take the last 16 bits."""
    place = re.fullmatch(r"(?:\[[^\]\s]+\]|[^:/?#@,\s\[\]]+):0*([0-9]{1,5})", value)
    is_target = re.match(rf"(?:{_TARGETS}):.", value)
    right = targets if is_target else place is not None and int(place[1]) <= MAX_PORT
    if not right:
        raise click.BadParameter(f"{value!r} is not an address; write HOST:PORT, for example {DEFAULT_ADDRESS}.")
    return value


def filled(context: click.Context, option: click.Parameter, value: str) -> str:
    """Returns an option's value. Raises BadParameter for an empty one on the command line, which a script's variable
    leaves that is not set: the command would do more than it says, such as make a key for all users."""
    if value == "" and context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE:
        raise click.BadParameter("It is empty; give a value, or leave the option out.")
    return value


class Given(NamedTuple):
    """The options below by name, as far as they are given."""

    options: dict[str, Any]
    """On the command line."""
    variables: dict[str, Any]
    """By a variable alone."""


def given_connection(context: click.Context) -> Given:
    """Returns the options collected for `connection`."""
    kept: Given = context.meta.setdefault("notecase.connection", Given({}, {}))
    return kept


def _keep(context: click.Context, option: click.Parameter, value: Any) -> None:
    """Collects an option for `connection`. A token from a variable is collected as None: the client reads the variable
    itself, and does not send that token unencrypted to other machines."""
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
        help="The server's address. TLS is used unless the server is on this machine and --ca is not set.",
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
        help="Use the server, token and CA certificates of this profile; see `notecase profiles`. Other "
        "options take precedence.",
    ),
    click.option(
        "--token",
        envvar="NOTECASE_TOKEN",
        show_envvar=True,
        metavar="TOKEN",
        callback=_keep,
        expose_value=False,
        help="The API key or token. Other users of this machine can see options, but not variables.",
    ),
    click.option(
        "--ca",
        type=click.Path(),
        envvar="NOTECASE_CA",
        show_envvar=True,
        metavar="FILE",
        callback=_keep,
        expose_value=False,
        help="CA certificates for the server's certificate, as PEM; by default the public ones.",
    ),
    click.option(
        "--plaintext",
        is_flag=True,
        callback=_keep,
        expose_value=False,
        help="Connect to other machines without TLS; others on the network can read everything.",
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
    help="A table, or all fields as JSON or YAML.",
)
"""The output format of a command."""

LIMIT = click.option("--limit", type=Number(1), default=50, help="The most entries to list.")

WAIT = click.option(
    "--wait",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="How long a run may wait for a caller's tool before you are asked for its result; 2 by default. Without "
    "a terminal: how long it may wait for anything before the command ends; 10 by default.",
)

FORCE = click.option("--force", is_flag=True, help="Replace FILE if it exists, when the new one is complete.")

YES = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")

STORE = click.option(
    "--store",
    default="sqlite:notecase.db",
    envvar="NOTECASE_STORE",
    show_envvar=True,
    metavar="URL",
    help="Where data is stored: sqlite:PATH, postgresql://USER@HOST/DATABASE with libpq parameters, or memory:, "
    "which is lost at exit.",
)

PASSWORD_FILE = click.option(
    "--store-password-file",
    type=click.Path(path_type=Path),
    envvar="NOTECASE_STORE_PASSWORD_FILE",
    show_envvar=True,
    metavar="FILE",
    help="A file with the PostgreSQL password, which may also be in PGPASSWORD or in the URL. Read again for each "
    "connection.",
)
