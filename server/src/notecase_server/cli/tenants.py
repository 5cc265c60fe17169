"""`notecase tenants`: whole tenants, for operators."""

from pathlib import Path

import click
from notecase import Client, v1

from notecase_server.cli import ids, output, screen
from notecase_server.cli.ask import ask, confirm, name_of
from notecase_server.cli.options import LIMIT, OUTPUT, SERVER, YES
from notecase_server.cli.takeout import save
from notecase_server.cli.transfer import on_disk

TENANT = click.argument("tenant", metavar="ID", shell_complete=ids.of("tenants"))


@click.group()
def tenants() -> None:
    """Make, list, suspend, resume, export and delete tenants.

    With an operator's key in NOTECASE_TOKEN.
    """


@tenants.command()
@TENANT
@click.option("--name", default="", show_default=False, metavar="TEXT", help="The tenant's name for people.")
@SERVER
def create(tenant: str, name: str) -> None:
    """Make a tenant known. A key makes its tenant known, too."""

    async def make(client: Client) -> None:
        told = v1.Tenant(display_name=name)
        request = v1.CreateTenantRequest(tenant_id=tenant.removeprefix("tenants/"), tenant=told)
        click.echo((await client.tenants.CreateTenant(request)).name)

    ask(make)


@tenants.command("list")
@LIMIT
@OUTPUT
@SERVER
def list_tenants(limit: int, form: str) -> None:
    """List tenants by name."""

    async def look(client: Client) -> None:
        request = v1.ListTenantsRequest()
        found = await output.listed(client.tenants.ListTenants, request, "tenants", limit)
        output.print_list(found, form, _COLUMNS)

    ask(look)


@tenants.command()
@TENANT
@OUTPUT
@SERVER
def show(tenant: str, form: str) -> None:
    """Print a tenant's state, and since when it is known."""

    async def look(client: Client) -> None:
        found = await client.tenants.GetTenant(v1.GetTenantRequest(name=name_of("tenants", tenant)))
        output.print_one(found, form, _show)

    ask(look)


@tenants.command()
@TENANT
@SERVER
def suspend(tenant: str) -> None:
    """Refuse all calls of a tenant, and cancel its runs that are at work or queued."""

    async def stop(client: Client) -> None:
        await client.tenants.SuspendTenant(v1.SuspendTenantRequest(name=name_of("tenants", tenant)))

    ask(stop)


@tenants.command()
@TENANT
@SERVER
def resume(tenant: str) -> None:
    """Take calls of a suspended tenant again."""

    async def go_on(client: Client) -> None:
        await client.tenants.ResumeTenant(v1.ResumeTenantRequest(name=name_of("tenants", tenant)))

    ask(go_on)


@tenants.command()
@TENANT
@YES
@SERVER
def delete(tenant: str, yes: bool) -> None:
    """Remove a tenant with all its sessions, state, agents, content and keys.

    Returns when nothing is left. Asks first, and needs --yes where there is no terminal.
    """
    name = name_of("tenants", tenant)
    confirm(f"Remove {screen.one_line(name)} with all that it has?", yes)

    async def remove(client: Client) -> None:
        await client.tenants.DeleteTenant(v1.DeleteTenantRequest(name=name))

    ask(remove)


@tenants.command("export")
@TENANT
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@SERVER
def export_tenant(tenant: str, directory: Path) -> None:
    """Write what a tenant holds to a new directory: sessions, states, agents and content.

    index.jsonl has a line for each of them; `sessions` has files for `notecase sessions import`.
    The directory is made once all of it is there. The tenant's audit says so.
    """
    if directory.exists() and any(directory.iterdir()):
        raise click.UsageError(f"{directory} is not empty; name a new directory.")

    with on_disk(directory):
        ask(lambda client: save(client, name_of("tenants", tenant), directory))


def _state(tenant: v1.Tenant) -> str:
    return screen.word_of(v1.Tenant.State, tenant.state)


def _show(found: v1.Tenant) -> None:
    settings = {"state": _state(found), "created": screen.moment(found.create_time)}
    output.print_settings(" ".join([found.name, screen.one_line(found.display_name)]), settings)


_COLUMNS = {
    "TENANT": lambda one: screen.id_of(one.name),
    "STATE": _state,
    "CREATED": lambda one: screen.moment(one.create_time),
    "NAME": lambda one: screen.one_line(one.display_name),
}
