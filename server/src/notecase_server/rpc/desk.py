"""What the services of one server share: the parts of the server, and functions that check requests."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from notecase_server import errors, names
from notecase_server.auth.principal import Role
from notecase_server.auth.principals import Principals
from notecase_server.engine.arrivals import Arrivals
from notecase_server.engine.caused import Caused
from notecase_server.engine.content import Contents, digest_of
from notecase_server.engine.places import Places
from notecase_server.engine.runs import Runs
from notecase_server.engine.schema import Schemas
from notecase_server.engine.sessions import Sessions
from notecase_server.rpc import filter as filters
from notecase_server.rpc.caller import audit_row, caller
from notecase_server.rpc.check import Check
from notecase_server.rpc.pages import ListRequest, Pages
from notecase_server.rpc.run import Streams
from notecase_server.store.contract import Answer, AuditRow, Once, Query, RequestStore, SessionKey, TenantStore
from notecase_server.tools.contract import Toolbox

M = TypeVar("M", bound=Message)
R = TypeVar("R")

MAX_PATHS = 100
"""Of a mask: several times the fields there are."""

LARGE_BYTES = 64 << 10
"""A write above this is heavy: some of them in one transaction hold up whatever else is in it."""

LARGE_PAGE = 100
"""Rows above which a page of messages is heavy: a thread reads and parses each of them."""

SESSION = Answer("session")
NOTHING = Answer("nothing")


@dataclass(frozen=True, slots=True)
class Desk:
    """What the services of one server share."""

    version: str
    requests: RequestStore
    sessions: Sessions
    runs: Runs
    max_runs: int
    streams: Streams
    providers: tuple[str, ...]
    """The default one first."""
    toolbox: Toolbox
    schemas: Schemas
    pages: Pages
    contents: Contents
    arrivals: Arrivals
    principals: Principals
    heavy: Places
    """Limits reads of a long past: forks, rewinds, earlier states. Such calls wait for each other, and do not delay
    others."""
    new_id: Callable[[], str]

    async def session(self, session: str, once: Once | None = None, if_uid: str = "") -> SessionKey:
        """Returns the key of the session with this id if the caller may see it. First checks whether the request was
        carried out before, since its session may be gone by now. Raises Replayed, and NotecaseError SESSION_NOT_FOUND
        and REQUEST_ID_REUSED."""
        await self.requests.recall(once)
        who = caller.get()
        key, _ = await self.sessions.find(who.tenant, session, if_uid, who.user)
        return key

    async def parent(self, check: Check, session: str) -> SessionKey:
        """The session of the requested list, or any key if the check has violations. SESSION_NOT_FOUND."""
        if check.violations:
            return SessionKey(caller.get().tenant, session, "")
        return await self.session(session)

    @asynccontextmanager
    async def patiently(self, *, heavy: bool = True) -> AsyncIterator[None]:
        """Waits for a slot for heavy work, tenants in turn, and holds it in the block. Light work does not wait."""
        if not heavy:
            yield
            return
        await self.heavy.wait(caller.get().tenant)
        try:
            yield
        finally:
            self.heavy.give_back()

    async def surely(
        self, once: Once | None, answer: Answer, write: Callable[[Once], Awaitable[R]], audit: AuditRow | None = None
    ) -> R:
        """Makes a write that is not recorded in a session's log, with its entry in the audit: see Sessions.surely."""
        record = self.sessions.record(once, caller.get().tenant, answer)._replace(audit=audit)
        return await self.sessions.surely(record, write)

    async def audit_of(self, tenant: str, resource: str) -> AuditRow | None:
        """Returns the entry of this call in the audit of a tenant, or of the operators for ""."""
        who = caller.get()
        return audit_row(who, tenant, await self.principals.name(who.principal, tenant), resource)


async def once(request: M, answer: Answer) -> Once | None:
    """The record that makes this request idempotent; None when it carries no request_id."""
    request_id: str = request.request_id  # type: ignore[attr-defined]
    if not request_id:
        return None
    who = caller.get()
    digest = await digest_of(request.SerializeToString(deterministic=True))
    return Once(who.tenant, who.principal.subject, who.method, request_id, digest, answer)


async def caused_by(request: M, answer: Answer) -> Caused:
    """Returns the cause of the events that this request leads to."""
    repeat = await once(request, answer)
    return Caused(request.request_id, repeat, principal=caller.get().principal_name)  # type: ignore[attr-defined]


def checked(request: Any) -> Check:
    """A Check that has looked at the request_id, for a write."""
    check = Check()
    check.token_id("request_id", request.request_id)
    return check


def named(request: Any, parse: Callable[[Check, str, str], R]) -> R:
    """Returns the ids in the name of a request that is that name, perhaps with a request_id. `parse` is a method of
    Check. Raises NotecaseError INVALID_FIELD."""
    check = checked(request) if "request_id" in request.DESCRIPTOR.fields_by_name else Check()
    ids = parse(check, "name", request.name)
    check.done()
    return ids


def named_tenant(check: Check, name: str) -> str:
    """The tenant that is meant, empty for the operators. Only an operator may name another than its own."""
    own = caller.get().tenant
    tenant = (check.tenant("tenant", name) if name else "") or own
    if tenant != own:
        check.needs(Role.OPERATOR, "tenant")
    return tenant


async def require_known(store: TenantStore, tenant: str) -> None:
    """Raises NotecaseError TENANT_NOT_FOUND where an operator names a tenant that is not known: it is misspelt."""
    if tenant != caller.get().tenant and await store.get_tenant(tenant) is None:
        raise errors.not_found("tenant", names.tenant(tenant))


def masked(
    check: Check, mask: FieldMask, given: Message, allowed: Iterable[str], by_name: Iterable[str] = ()
) -> FieldMask:
    """Returns the fields that an update changes (AIP-134). Those of `by_name` are included only if the mask names them,
    and not by "*" or without a mask. Paths that cannot be changed are reported to the check and left out."""
    known = list(allowed)
    if not check(len(mask.paths) <= MAX_PATHS, "update_mask", f"has more than {MAX_PATHS} paths"):
        return FieldMask()
    if list(mask.paths) == ["*"]:
        return FieldMask(paths=known)
    if not mask.paths:
        return FieldMask(paths=[field.name for field, _ in given.ListFields() if field.name in known])
    known += by_name
    fine = FieldMask(paths=[path for path in mask.paths if path.partition(".")[0] in known])
    if not fine.IsValidForDescriptor(given.DESCRIPTOR):  # type: ignore[arg-type]
        fine = FieldMask()
    check(len(fine.paths) == len(mask.paths), "update_mask", f"has unknown paths; known are {', '.join(known)}")
    return fine


def merge(mask: FieldMask, given: M, target: M) -> None:
    """Copies the fields of the mask from `given` to `target`. A field that is not set in `given` is cleared (AIP-134),
    also when the message that contains it is not set."""
    mask.MergeMessage(given, target, replace_message_field=True, replace_repeated_field=True)
    for path in mask.paths:
        *parents, leaf = path.split(".")
        given_parent: Any = given
        parent: Any = target
        is_given = is_there = True
        for name in parents:
            is_given, is_there = is_given and given_parent.HasField(name), is_there and parent.HasField(name)
            given_parent, parent = getattr(given_parent, name), getattr(parent, name)
        if is_there and not is_given:
            parent.ClearField(leaf)


def listed(
    check: Check, pages: Pages, request: ListRequest, *about: str, fields: Mapping[str, filters.FieldKind] | None = None
) -> Query:
    """The page that a list request asks for, with its filter on `fields` where the list has one. `about` is all else
    that makes the list another one.

    Raises NotecaseError for all that is wrong, what `check` found before included."""
    where, query = None, Query(1)
    if fields is not None:
        with check.taking():
            where = filters.parse(request.filter, fields)  # type: ignore[attr-defined]
    with check.taking():
        query = pages.query(request, *about, where=where)
    check.done()
    return query
