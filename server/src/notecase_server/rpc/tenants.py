"""TenantService: parse, call, render."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Protocol

from google.protobuf.empty_pb2 import Empty
from notecase import v1

from notecase_server import errors, names
from notecase_server.auth.tenants import Tenants
from notecase_server.engine.takeout import Position, Takeout, TakeoutStore
from notecase_server.engine.tenancy import Tenancy
from notecase_server.rpc.caller import caller
from notecase_server.rpc.check import Check
from notecase_server.rpc.desk import NOTHING, Desk, checked, listed, named, once
from notecase_server.store.contract import Answer, AuditStore, Replayed

TENANT = Answer("tenant")


class TenantsStore(TakeoutStore, AuditStore, Protocol):
    """Holds tenants with all that they have, and the audit."""


class TenantsService(v1.TenantServiceServicer):
    def __init__(self, desk: Desk, store: TenantsStore, tenants: Tenants, tenancy: Tenancy) -> None:
        self.desk = desk
        self.store = store
        self.takeout = Takeout(store, desk.contents)
        self.tenants = tenants
        self.tenancy = tenancy

    async def CreateTenant(self, request: v1.CreateTenantRequest, context: Any) -> v1.Tenant:
        check = checked(request)
        check(request.tenant_id != "", "tenant_id", "is missing")
        check.chosen_id("tenant_id", request.tenant_id)
        check.text("tenant.display_name", request.tenant.display_name)
        check.done()
        create = partial(self.store.create_tenant, request.tenant_id, request.tenant.display_name)
        audit = caller.get().audit(names.tenant(request.tenant_id))
        return await self.desk.surely(await once(request, TENANT), TENANT, create, audit)

    async def GetTenant(self, request: v1.GetTenantRequest, context: Any) -> v1.Tenant:
        tenant = named(request, Check.tenant)
        found = await self.store.get_tenant(tenant)
        if found is None:
            raise errors.not_found("tenant", request.name)
        return found

    async def ListTenants(self, request: v1.ListTenantsRequest, context: Any) -> v1.ListTenantsResponse:
        query = listed(Check(), self.desk.pages, request, "tenants")
        page = await self.store.list_tenants(query)
        return v1.ListTenantsResponse(tenants=page.rows, next_page_token=self.desk.pages.token(page.next, "tenants"))

    async def SuspendTenant(self, request: v1.SuspendTenantRequest, context: Any) -> v1.Tenant:
        tenant, row = await self._set(request, v1.Tenant.STATE_SUSPENDED)
        await self.tenancy.rest(tenant)
        return row

    async def ResumeTenant(self, request: v1.ResumeTenantRequest, context: Any) -> v1.Tenant:
        _, row = await self._set(request, v1.Tenant.STATE_ACTIVE)
        return row

    async def _set(
        self, request: v1.SuspendTenantRequest | v1.ResumeTenantRequest, state: v1.Tenant.State.ValueType
    ) -> tuple[str, v1.Tenant]:
        tenant = named(request, Check.tenant)
        try:
            change = partial(self.store.set_tenant_state, tenant, state)
            audit = caller.get().audit(request.name)
            return tenant, await self.desk.surely(await once(request, TENANT), TENANT, change, audit)
        finally:
            self.tenants.changed(tenant)

    async def DeleteTenant(self, request: v1.DeleteTenantRequest, context: Any) -> Empty:
        tenant = named(request, Check.tenant)
        change = partial(self.store.set_tenant_state, tenant, v1.Tenant.STATE_DELETING)
        try:
            await self.desk.surely(await once(request, NOTHING), NOTHING, change, caller.get().audit(request.name))
        except Replayed:  # the call before may have been interrupted
            await self.tenancy.remove(tenant)
            raise
        finally:
            self.tenants.changed(tenant)
        await self.tenancy.remove(tenant)
        return Empty()

    async def ExportTenant(
        self, request: v1.ExportTenantRequest, context: Any
    ) -> AsyncIterator[v1.ExportTenantResponse]:
        check = Check()
        tenant = check.tenant("name", request.name)
        about = ("export", tenant)
        begin: Position = ()
        if request.page_token:
            with check.taking():
                begin = self.desk.pages.position(request.page_token, *about)
        check.done()
        told = False
        async for record in self.takeout.records(tenant, begin):
            if not told:  # the tenant is there, and nothing of it was sent
                await self._tell_export(tenant, request.name)
                told = True
            response = record.response
            if record.position is not None:
                response.page_token = self.desk.pages.token(record.position, *about)
            yield response

    async def _tell_export(self, tenant: str, name: str) -> None:
        """Tells the audit of the tenant, and the operators' own, that the tenant is exported."""
        rows = [await self.desk.audit_of(tenant, name), caller.get().audit(name)]
        await self.store.add_audit([row for row in rows if row is not None])
