"""`notecase audit`: who did what."""

from collections.abc import Iterable

import click
from notecase import Client, NotecaseError, v1

from notecase_server.cli import screen
from notecase_server.cli.ask import ask, name_of
from notecase_server.cli.look import LIMIT, MORE
from notecase_server.cli.options import SERVER


@click.group()
def audit() -> None:
    """List who did what: keys, tenants, deletions, exports, approvals, refusals.

    Asks the server, with the key in NOTECASE_TOKEN, which is an admin's or an operator's.
    """


@audit.command("list")
@click.option(
    "--filter",
    "where",
    default="",
    show_default=False,
    metavar="EXPRESSION",
    help='Which to list, for example: outcome = APPROVE AND create_time > "2026-12-01T00:00:00Z". Fields are '
    "principal, method, resource, outcome and create_time.",
)
@click.option(
    "--tenant",
    default="",
    show_default=False,
    metavar="ID",
    help="Whose; another than one's own only operators name, and see what was done to its keys.",
)
@LIMIT
@SERVER
def list_entries(where: str, tenant: str, limit: int, server: str) -> None:
    """List entries, the last one first."""

    async def look(client: Client) -> None:
        name = name_of("tenants", tenant) if tenant else ""
        request = v1.ListAuditEntriesRequest(tenant=name, page_size=limit, filter=where)
        page = await client.audit.ListAuditEntries(request)
        subjects = await _subjects(client, {entry.principal for entry in page.entries if entry.principal})
        rows = [
            (
                screen.moment(entry.create_time),
                screen.one_line(subjects.get(entry.principal, entry.principal)) or "-",
                str(entry.call_count),
                entry.outcome,
                entry.method.removeprefix("notecase.v1.") or "-",
                screen.one_line(entry.resource) or "-",
            )
            for entry in page.entries
        ]
        click.echo(screen.table(("TIME", "SUBJECT", "CALLS", "OUTCOME", "METHOD", "RESOURCE"), rows))
        if page.next_page_token:
            screen.aside(MORE)

    ask(server, look)


async def _subjects(client: Client, principals: Iterable[str]) -> dict[str, str]:
    """The subjects of those principals of which it is known still, as far as the caller may ask."""
    found = dict[str, str]()
    for name in principals:
        try:
            found[name] = (await client.audit.GetPrincipal(v1.GetPrincipalRequest(name=name))).subject
        except NotecaseError as error:
            if error.reason != "PRINCIPAL_NOT_FOUND":
                raise
    return found
