"""AuditService: parse, call, render."""

from collections.abc import Mapping
from typing import Any, Protocol

from notecase import v1

from notecase_server import errors
from notecase_server.rpc import filter as filters
from notecase_server.rpc.caller import caller
from notecase_server.rpc.check import Check
from notecase_server.rpc.desk import Desk, listed, named_tenant, require_known
from notecase_server.store.contract import And, AuditStore, Compare, PrincipalStore, TenantStore

FILTER: Mapping[str, filters.FieldKind] = {
    "principal": "text",
    "method": "text",
    "resource": "text",
    "outcome": "text",
    "create_time": "time",
}

OF_KEYS = And((Compare("method", ">=", "notecase.v1.KeyService/"), Compare("method", "<", "notecase.v1.KeyService0")))
"""The entries of a tenant's audit that an operator sees. The character 0 follows the slash."""


class TrailStore(AuditStore, PrincipalStore, TenantStore, Protocol):
    """Knows who did what, and in which tenants."""


class AuditsService(v1.AuditServiceServicer):
    def __init__(self, desk: Desk, store: TrailStore) -> None:
        self.desk = desk
        self.store = store

    async def GetPrincipal(self, request: v1.GetPrincipalRequest, context: Any) -> v1.Principal:
        who, check = caller.get(), Check()
        principal_id, tenant = check.principal("name", request.name), named_tenant(check, request.tenant)
        check.done()
        found = await self.store.get_principal(tenant, principal_id)
        if found is None or (who.user and found.user != who.user):
            raise errors.not_found("principal", request.name)
        return found

    async def ListAuditEntries(self, request: v1.ListAuditEntriesRequest, context: Any) -> v1.ListAuditEntriesResponse:
        check = Check()
        tenant = named_tenant(check, request.tenant)
        about = ("audit", tenant, request.filter)
        query = listed(check, self.desk.pages, request, *about, fields=FILTER)
        if tenant != caller.get().tenant:
            query = query._replace(where=OF_KEYS if query.where is None else And((OF_KEYS, query.where)))
        page = await self.store.list_audit(tenant, query)
        if not page.rows:
            await require_known(self.store, tenant)
        return v1.ListAuditEntriesResponse(entries=page.rows, next_page_token=self.desk.pages.token(page.next, *about))
