"""`notecase tenants`: whole tenants, for operators."""

import sys
from pathlib import Path

import click
from notecase import Client, v1

from notecase_server.cli import screen
from notecase_server.cli.ask import ask, name_of, replace_unknown
from notecase_server.cli.options import SERVER
from notecase_server.cli.takeout import save
from notecase_server.cli.transfer import on_disk

TENANT = click.argument("tenant", metavar="ID")


@click.group()
def tenants() -> None:
    """Make, list, suspend, resume, export and delete tenants.

    With an operator's key in NOTECASE_TOKEN.
    """


@tenants.command()
@TENANT
@click.option("--name", default="", show_default=False, metavar="TEXT", help="The tenant's name for people.")
@SERVER
def create(tenant: str, name: str, server: str) -> None:
    """Make a tenant known. A key makes its tenant known, too."""

    async def make(client: Client) -> None:
        told = v1.Tenant(display_name=name)
        request = v1.CreateTenantRequest(tenant_id=tenant.removeprefix("tenants/"), tenant=told)
        click.echo((await client.tenants.CreateTenant(request)).name)

    ask(server, make)


@tenants.command("list")
@SERVER
def list_tenants(server: str) -> None:
    """List tenants by name."""

    async def look(client: Client) -> None:
        request, rows = v1.ListTenantsRequest(page_size=1000), []
        while True:
            page = await client.tenants.ListTenants(request)
            rows += [
                (screen.id_of(one.name), _state(one), screen.moment(one.create_time), screen.one_line(one.display_name))
                for one in page.tenants
            ]
            request.page_token = page.next_page_token
            if not request.page_token:
                break
        click.echo(screen.table(("TENANT", "STATE", "CREATED", "NAME"), rows))

    ask(server, look)


@tenants.command()
@TENANT
@SERVER
def show(tenant: str, server: str) -> None:
    """Print a tenant's state, and since when it is known."""

    async def look(client: Client) -> None:
        found = await client.tenants.GetTenant(v1.GetTenantRequest(name=name_of("tenants", tenant)))
        click.secho(" ".join([found.name, screen.one_line(found.display_name)]).rstrip(), bold=True)
        told = [("state", _state(found)), ("created", screen.moment(found.create_time))]
        click.echo("\n".join(screen.aligned(told)))

    ask(server, look)


@tenants.command()
@TENANT
@SERVER
def suspend(tenant: str, server: str) -> None:
    """Refuse all calls of a tenant, and cancel its runs that are at work or queued."""

    async def stop(client: Client) -> None:
        await client.tenants.SuspendTenant(v1.SuspendTenantRequest(name=name_of("tenants", tenant)))

    ask(server, stop)


@tenants.command()
@TENANT
@SERVER
def resume(tenant: str, server: str) -> None:
    """Take calls of a suspended tenant again."""

    async def go_on(client: Client) -> None:
        await client.tenants.ResumeTenant(v1.ResumeTenantRequest(name=name_of("tenants", tenant)))

    ask(server, go_on)


@tenants.command()
@TENANT
@click.option("--yes", is_flag=True, help="Do not ask first.")
@SERVER
def delete(tenant: str, yes: bool, server: str) -> None:
    """Remove a tenant with all its sessions, state, agents, content and keys.

    Returns when nothing is left. Asks first, and needs --yes where there is no terminal.
    """
    name = name_of("tenants", tenant)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("Nobody can be asked here whether to remove all of it; say --yes.")
        replace_unknown()
        click.confirm(f"Remove {screen.one_line(name)} with all that it has?", abort=True, err=True)

    async def remove(client: Client) -> None:
        await client.tenants.DeleteTenant(v1.DeleteTenantRequest(name=name))

    ask(server, remove)


@tenants.command("export")
@TENANT
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@SERVER
def export_tenant(tenant: str, directory: Path, server: str) -> None:
    """Write what a tenant holds to a new directory: sessions, states, agents and content.

    index.jsonl has a line for each of them; `sessions` has files for `notecase import`. The tenant's audit tells of it.
    The directory is there once all of it is.
    """
    if directory.exists() and any(directory.iterdir()):
        raise click.UsageError(f"{directory} is not empty.")

    with on_disk(directory):
        ask(server, lambda client: save(client, name_of("tenants", tenant), directory))


def _state(tenant: v1.Tenant) -> str:
    return v1.Tenant.State.Name(tenant.state).removeprefix("STATE_").lower()
