"""KeyService: parse, call, render."""

from functools import partial
from typing import Any, Protocol

from google.protobuf.empty_pb2 import Empty
from notecase import v1

from notecase_server import errors
from notecase_server.auth.keys import Keys
from notecase_server.rpc.check import Check
from notecase_server.rpc.desk import NOTHING, Desk, checked, listed, named_tenant, once, require_known
from notecase_server.store.contract import Answer, KeyStore, TenantStore

MAX_OVERLAP = 30 * 24 * 60 * 60
"""Seconds."""


class TenantKeyStore(KeyStore, TenantStore, Protocol):
    """Keeps keys, and knows their tenants."""


class KeysService(v1.KeyServiceServicer):
    def __init__(self, desk: Desk, store: TenantKeyStore, keys: Keys) -> None:
        self.desk = desk
        self.store = store
        self.keys = keys

    async def CreateKey(self, request: v1.CreateKeyRequest, context: Any) -> v1.CreateKeyResponse:
        check = checked(request)
        tenant = named_tenant(check, request.tenant)
        check.fields("key", request.key, "display_name", "role", "expire_time")
        role = request.key.role
        if tenant:
            fine = v1.Key.ROLE_VIEWER <= role <= v1.Key.ROLE_ADMIN
            check(fine, "key.role", "must be ROLE_VIEWER, ROLE_USER, ROLE_DEVELOPER or ROLE_ADMIN")
        else:
            check(role == v1.Key.ROLE_OPERATOR, "key.role", "must be ROLE_OPERATOR, unless the key has a tenant")
        if request.key.user:
            check.user("key.user", request.key.user)
            bound = role in {v1.Key.ROLE_VIEWER, v1.Key.ROLE_USER}
            check(bound, "key.role", "must be ROLE_VIEWER or ROLE_USER when the key has a user")
        check.done()
        answer = Answer("made_key")
        repeat = await once(request, answer)
        await self.desk.requests.recall(repeat)
        # Read first: a failure after the key is made would lose its secret.
        is_new = bool(tenant) and await self.store.get_tenant(tenant) is None
        audit = await self.desk.audit_of(tenant, "")
        create = partial(self.keys.create, tenant, request.key)
        key, secret = await self.desk.surely(repeat, answer, create, audit)
        return v1.CreateKeyResponse(key=key, secret=secret, tenant_created=is_new)

    async def GetKey(self, request: v1.GetKeyRequest, context: Any) -> v1.Key:
        check = Check()
        tenant, key_id = named_tenant(check, request.tenant), check.key_name("name", request.name)
        check.done()
        row = await self.store.find_key(key_id)
        if row is None or row.tenant != tenant:
            raise errors.not_found("key", request.name)
        return row.key

    async def ListKeys(self, request: v1.ListKeysRequest, context: Any) -> v1.ListKeysResponse:
        check = Check()
        tenant = named_tenant(check, request.tenant)
        about = ("keys", tenant)
        query = listed(check, self.desk.pages, request, *about)
        page = await self.store.list_keys(tenant, query)
        if not page.rows:
            await require_known(self.store, tenant)
        return v1.ListKeysResponse(keys=page.rows, next_page_token=self.desk.pages.token(page.next, *about))

    async def RevokeKey(self, request: v1.RevokeKeyRequest, context: Any) -> Empty:
        check = checked(request)
        tenant, key_id = named_tenant(check, request.tenant), check.key_name("name", request.name)
        check.done()
        repeat = await once(request, NOTHING)
        audit = await self.desk.audit_of(tenant, request.name)
        await self.desk.surely(repeat, NOTHING, partial(self.keys.revoke, tenant, key_id), audit)
        return Empty()

    async def RotateKey(self, request: v1.RotateKeyRequest, context: Any) -> v1.RotateKeyResponse:
        check = checked(request)
        tenant, key_id = named_tenant(check, request.tenant), check.key_name("name", request.name)
        if check.duration("overlap", request.overlap):
            check(request.overlap.seconds <= MAX_OVERLAP, "overlap", "is longer than 30 days")
        check.done()
        answer = Answer("rotated_key")
        repeat = await once(request, answer)
        overlap = request.overlap.ToMicroseconds()
        audit = await self.desk.audit_of(tenant, request.name)
        rotate = partial(self.keys.rotate, tenant, key_id, overlap)
        key, secret = await self.desk.surely(repeat, answer, rotate, audit)
        return v1.RotateKeyResponse(key=key, secret=secret)
