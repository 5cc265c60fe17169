"""`notecase keys`: the API keys of a server."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
from notecase import Client, v1

from notecase_server.cli import ids, output, screen
from notecase_server.cli.ask import ask, confirm, name_of
from notecase_server.cli.options import LIMIT, OUTPUT, PASSWORD_FILE, SERVER, STORE, YES, filled
from notecase_server.cli.store_config import CONFIG

ROLES = {name.removeprefix("ROLE_").lower(): value for name, value in v1.Key.Role.items() if value}
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class Span(click.ParamType[timedelta]):
    """A time span such as 90d, 12h or 30m."""

    name = "span"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        found = re.fullmatch(r"(\d{1,6})([smhd])", str(value))
        if found is None:
            self.fail(f"{value!r} is not a time span; write a number and s, m, h or d, for example 90d.", param, ctx)
        return timedelta(**{UNITS[found[2]]: int(found[1])})


TENANT = click.option(
    "--tenant",
    default="",
    show_default=False,
    metavar="ID",
    callback=filled,
    shell_complete=ids.of("tenants"),
    help="The tenant of the keys; by default your own. Only operators may name another.",
)
KEY = click.argument("key", metavar="ID", shell_complete=ids.of("keys"))

_COLUMNS = {
    "KEY": lambda one: screen.id_of(one.name),
    "ROLE": lambda one: screen.word_of(v1.Key.Role, one.role),
    "USER": lambda one: screen.id_of(one.user) or "-",
    "CREATED": lambda one: screen.moment(one.create_time),
    "EXPIRES": lambda one: screen.moment(one.expire_time) if one.HasField("expire_time") else "never",
    "NAME": lambda one: screen.one_line(one.display_name),
}


@click.group()
def keys() -> None:
    """Create, list, rotate and revoke API keys.

    All commands except `bootstrap` call the server and need the key of an admin or operator in NOTECASE_TOKEN.
    """


@keys.command()
@click.option("--name", default="", show_default=False, metavar="TEXT", help="What the key is for.")
@click.option("--role", type=click.Choice(list(ROLES)), required=True, help="The role of its callers.")
@click.option(
    "--user",
    default="",
    show_default=False,
    metavar="ID",
    callback=filled,
    help="The only user whose sessions and state it can access.",
)
@click.option("--expires", type=Span(), metavar="SPAN", help="When it expires, for example 90d; by default never.")
@TENANT
@SERVER
def create(name: str, role: str, user: str, expires: timedelta | None, tenant: str) -> None:
    """Create a key and print it. It cannot be shown again."""

    async def make(client: Client) -> None:
        key = v1.Key(display_name=name, role=ROLES[role], user=name_of("users", user) if user else "")
        if expires is not None:
            key.expire_time.GetCurrentTime()
            key.expire_time.FromMicroseconds(key.expire_time.ToMicroseconds() + expires // timedelta(microseconds=1))
        made = await client.keys.CreateKey(v1.CreateKeyRequest(tenant=_tenant(tenant), key=key))
        if tenant and made.tenant_created:
            screen.aside(f"created the tenant {screen.one_line(tenant)}, which did not exist")
        _show(made.key, made.secret)

    ask(make)


@keys.command("list")
@TENANT
@LIMIT
@OUTPUT
@SERVER
def list_keys(tenant: str, limit: int, form: str) -> None:
    """List keys, newest first."""

    async def look(client: Client) -> None:
        request = v1.ListKeysRequest(tenant=_tenant(tenant))
        output.print_list(await output.listed(client.keys.ListKeys, request, "keys", limit), form, _COLUMNS)

    ask(look)


@keys.command()
@KEY
@TENANT
@SERVER
def revoke(key: str, tenant: str) -> None:
    """Revoke a key: calls with it are refused from now on."""

    async def end(client: Client) -> None:
        await client.keys.RevokeKey(v1.RevokeKeyRequest(name=name_of("keys", key), tenant=_tenant(tenant)))

    ask(end)


@keys.command()
@KEY
@click.option("--overlap", type=Span(), default="1h", metavar="SPAN", help="How long the old secret stays valid.")
@TENANT
@YES
@SERVER
def rotate(key: str, overlap: timedelta, tenant: str, yes: bool) -> None:
    """Give a key a new secret and print it. It cannot be shown again.

    The key's id, role and user stay the same. A key has one old secret: rotating it again during the overlap ends
    that of the first, and asks first unless the overlap is 0s.
    """

    async def renew(client: Client) -> None:
        request = v1.RotateKeyRequest(name=name_of("keys", key), tenant=_tenant(tenant))
        request.overlap.FromTimedelta(overlap)
        found = await client.keys.GetKey(v1.GetKeyRequest(name=request.name, tenant=request.tenant))
        if overlap and found.overlap_end_time.ToDatetime(UTC) > datetime.now(UTC):
            until = screen.moment(found.overlap_end_time)
            confirm(f"The secret from before the last rotation is valid until {until}. End it now?", yes)
        made = await client.keys.RotateKey(request)
        _show(made.key, made.secret)

    ask(renew)


@keys.command()
@CONFIG
@STORE
@PASSWORD_FILE
@click.option("--tenant", show_default="default", metavar="ID", help="The tenant of the admin key.")
@click.option("--operator", is_flag=True, help="Create an operator's key, which has no tenant, instead of an admin's.")
@click.option("--name", default="bootstrap", metavar="TEXT", help="What the key is for.")
def bootstrap(store: str, store_password_file: Path | None, tenant: str | None, operator: bool, name: str) -> None:
    """Create the first key of a store and print it. It cannot be shown again.

    No server may have the store open. From then on, `notecase serve` requires a key for calls to this store.
    """
    # No other of these commands needs a server.
    from notecase_server import serve  # noqa: PLC0415
    from notecase_server.config import configure_logging  # noqa: PLC0415
    from notecase_server.serve_stores import Database, new_file  # noqa: PLC0415
    from notecase_server.store.contract import StoreOpenError  # noqa: PLC0415

    if operator and tenant is not None:
        raise click.UsageError("--operator cannot be combined with --tenant: an operator has no tenant.")
    of = "default" if tenant is None else tenant.removeprefix("tenants/")
    if problem := serve.tenant_problem(of):  # an empty one, too: the key would be an operator's
        raise click.UsageError(f"--tenant: {problem}")
    configure_logging("console", "info")
    created = new_file(store)
    try:
        database = Database(password_file=store_password_file)
        made, secret = serve.bootstrap(store, "" if operator else of, name, database)
    except StoreOpenError as error:
        raise click.ClickException(str(error)) from None
    if created:
        screen.aside(f"created a new store at {created}")
    _show(made, secret)


def _tenant(given: str) -> str:
    return name_of("tenants", given) if given else ""


def _show(key: v1.Key, secret: str) -> None:
    """Prints the secret on standard output, alone, so that it can be piped on."""
    screen.aside(f"{key.name}, shown only once:")
    click.echo(secret)
