"""`notecase audit`: who did what."""

from collections.abc import Iterable

import click
from notecase import Client, NotecaseError, v1

from notecase_server.cli import ids, output, screen
from notecase_server.cli.ask import ask, name_of
from notecase_server.cli.options import LIMIT, OUTPUT, SERVER, filled


@click.group()
def audit() -> None:
    """List who did what: keys, tenants, deletions, exports, approvals, refusals.

    Needs the key of an admin or operator in NOTECASE_TOKEN.
    """


@audit.command("list")
@click.option(
    "--filter",
    "where",
    default="",
    show_default=False,
    metavar="EXPRESSION",
    help='List only matching entries, for example: outcome = APPROVE AND create_time > "2026-12-01T00:00:00Z". '
    "Fields: "
    "principal, method, resource, outcome and create_time.",
)
@click.option(
    "--tenant",
    default="",
    show_default=False,
    metavar="ID",
    callback=filled,
    shell_complete=ids.of("tenants"),
    help="The tenant whose entries are listed; by default your own. Operators may name another tenant and see "
    "what was done to its keys.",
)
@LIMIT
@OUTPUT
@SERVER
def list_entries(where: str, tenant: str, limit: int, form: str) -> None:
    """List entries, newest first."""

    async def look(client: Client) -> None:
        whose = name_of("tenants", tenant) if tenant else ""
        request = v1.ListAuditEntriesRequest(tenant=whose, filter=where)
        entries = await output.listed(client.audit.ListAuditEntries, request, "entries", limit)
        named = {entry.principal for entry in entries if entry.principal} if form == "table" else ()
        subjects = await _subjects(client, whose, named)
        columns = {
            "TIME": lambda one: screen.moment(one.create_time),
            "SUBJECT": lambda one: screen.one_line(subjects.get(one.principal, one.principal)) or "-",
            "CALLS": lambda one: str(one.call_count),
            "OUTCOME": lambda one: one.outcome,
            "METHOD": lambda one: one.method.removeprefix("notecase.v1.") or "-",
            "RESOURCE": lambda one: screen.one_line(one.resource) or "-",
        }
        output.print_list(entries, form, columns)

    ask(look)


async def _subjects(client: Client, tenant: str, principals: Iterable[str]) -> dict[str, str]:
    """Returns the subjects of those principals that have not been erased."""
    found = dict[str, str]()
    for name in principals:
        try:
            found[name] = (await client.audit.GetPrincipal(v1.GetPrincipalRequest(name=name, tenant=tenant))).subject
        except NotecaseError as error:
            if error.reason != "PRINCIPAL_NOT_FOUND":
                raise
    return found
