"""AuditService: parse, call, render."""

from typing import Any

from notecase import v1

from notecase_server import errors
from notecase_server.rpc.caller import caller
from notecase_server.rpc.validate import Check
from notecase_server.store.contract import PrincipalStore


class AuditsService(v1.AuditServiceServicer):
    def __init__(self, store: PrincipalStore) -> None:
        self.store = store

    async def GetPrincipal(self, request: v1.GetPrincipalRequest, context: Any) -> v1.Principal:
        who, check = caller.get(), Check()
        principal_id = check.principal("name", request.name)
        check.done()
        found = await self.store.get_principal(who.tenant, principal_id)
        if found is None or (who.user and found.user != who.user):
            raise errors.not_found("principal", request.name)
        return found
