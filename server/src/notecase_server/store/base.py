"""A whole Store, given Tables and two ways to run a step on them."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from functools import partial
from typing import TypeVar

from notecase import v1

from notecase_server import names
from notecase_server.store import content, copies, keys, past, principals, steps, tenants
from notecase_server.store.contract import (
    ActiveRun,
    AuditRow,
    CommandId,
    Commit,
    Committed,
    Fork,
    KeyRow,
    Lease,
    Once,
    Page,
    Past,
    Query,
    Quotas,
    Restore,
    Scope,
    SessionEdit,
    SessionKey,
    StepKey,
    Unshared,
)
from notecase_server.store.copies import Copies
from notecase_server.store.imports import Replay
from notecase_server.store.lists import take
from notecase_server.store.sql.tables import Tables
from notecase_server.store.tables import FIRST_PLACE, RunPlace

T = TypeVar("T")

FORGET_BATCH = 1000
"""Entries of the audit dropped in one transaction: few enough that commits wait for some milliseconds only."""


SWEEP, PRINCIPALS, AUDIT, PROBE = "sweep", "principals", "audit", "probe"
"""Names of what steps write to that touches no session in use."""


def _content(tenant: str) -> str:
    """The name of a tenant's content. What refers to content, and what removes it, is not within it."""
    return f"content of {tenant}"


class TableStore(ABC):
    """Every method of the contract but `close`, in terms of `_read` and `_write`. Both raise NotecaseError
    STORE_UNAVAILABLE once the store is closed."""

    quotas = Quotas()
    lease: Lease = Unshared()

    def __init__(self) -> None:
        self._copies = Copies()

    @abstractmethod
    async def _read(self, step: Callable[[Tables], T], alone: bool = False) -> T:
        """Runs a step that only reads, on one consistent state of the rows. `alone` says that it asks them once, which
        is consistent by itself."""

    @abstractmethod
    async def _write(self, step: Callable[[Tables, int], T], within: str = "", *, piece: bool = False) -> T:
        """Runs a step in a transaction, given the time. What it raises undoes it. `within` names what it writes to and
        depends on, a session or a copy by its uid: a store may run steps with different names side by side. One without
        a name runs alone. `piece` says that the step is one of many that a long job consists of, such as a fork: a
        store that runs one step at a time runs those that wait for no such job first."""

    async def commit(self, commit: Commit) -> Committed:
        return await self._write(partial(steps.commit, commit=commit), commit.key.uid)

    async def find_commit(self, key: SessionKey, commit_id: str) -> Committed | None:
        return await self._read(lambda tables: steps.find_commit(tables, key, commit_id))

    async def recall(self, once: Once | None) -> None:
        if once is not None:
            await self._read(lambda tables: steps.recall(tables, once))

    async def recall_command(self, key: SessionKey, command: CommandId | None) -> None:
        if command is not None:
            await self._read(lambda tables: steps.recall_command(tables, key, command))

    async def claim(self, key: SessionKey, epoch: int) -> int:
        return await self._write(lambda tables, _: steps.claim(tables, key, epoch), key.uid)

    async def _of(self, tenant: str, uid: str, step: Callable[[Tables], T], gone: T) -> T:
        """Reads from a session; returns `gone` when there is no such session, even if some of its rows are left."""
        return await self._read(lambda tables: step(tables) if tables.exists(tenant, uid) else gone)

    async def _of_state(self, scope: Scope, at: int, step: Callable[[Tables], T], gone: T) -> T:
        """As `_of`, if the state is a session's. An earlier one is read from the log, and refused with it."""
        if at or scope.kind != "session":
            return await self._read(step)
        return await self._of(scope.tenant, scope.id, step, gone)

    async def read_events(self, key: SessionKey, after: int, limit: int = 1000) -> list[v1.Event]:
        return await self._of(
            key.tenant, key.uid, lambda tables: take(tables.events(key, after, limit), limit).rows, []
        )

    async def read_past(self, key: SessionKey, at: int) -> Past:
        return await self._read(lambda tables: past.read(tables, key, at))

    async def fork(self, fork: Fork) -> Committed:
        with self._copies.under_way(fork.key, fork.past.session.user):
            await self._write(partial(copies.begin_fork, fork=fork))
            last = copies.BEGINNING
            while pieces := await self._read(partial(copies.rows_to_copy, fork=fork, after=last)):
                await self._write(partial(copies.copy_rows, fork=fork, pieces=pieces), fork.key.uid, piece=True)
                await asyncio.sleep(0)  # others have their turn in a store that waits for nothing, too
                last = pieces[-1]
            whole = await self._read(partial(copies.whole, fork=fork))
            await self._write_rows(fork.key, fork.source, copies.put_right(fork.key, whole.past))
            return await self._write(partial(copies.finish_fork, fork=fork, whole=whole))

    async def restore(self, restore: Restore) -> v1.Session:
        with self._copies.under_way(restore.key, restore.session.user):
            await self._write(partial(copies.begin_restore, restore=restore))
            await self._write_rows(restore.key, None, copies.references(restore))
            replay = Replay(restore)
            while events := await asyncio.to_thread(replay.read):
                found = await self._read(partial(replay.load, events=events))
                rows = await asyncio.to_thread(replay.rows, events, found)
                await self._write_rows(restore.key, None, rows)
            return await self._write(partial(copies.finish_restore, restore=restore, replayed=replay.session))

    async def _write_rows(self, key: SessionKey, source: SessionKey | None, rows: Iterable[copies.Row]) -> None:
        """Writes rows of a copy, in bounded transactions."""
        for writes in copies.batches(rows):
            step = partial(copies.write_rows, key=key, source=source, writes=writes)
            await self._write(step, key.uid, piece=True)
            await asyncio.sleep(0)

    async def get_session(self, key: SessionKey) -> v1.Session | None:
        found = await self._read(lambda tables: tables.session(key))
        return found.session if found else None

    async def find_session(self, tenant: str, session: str) -> v1.Session | None:
        found = await self._read(lambda tables: tables.session_of_name(tenant, session))
        return found.session if found else None

    async def find_session_key(self, tenant: str, session: str) -> tuple[SessionKey, str] | None:
        return await self._read(lambda tables: tables.session_key(tenant, session), alone=True)

    async def session_keys(self, tenant: str, user: str, limit: int) -> list[SessionKey]:
        return await self._read(lambda tables: tables.session_keys(tenant, user, limit), alone=True)

    async def read_start(self, tenant: str, session: str, agent: str) -> tuple[v1.Session | None, v1.Agent | None]:
        return await self._read(lambda tables: tables.start_of(tenant, session, agent), alone=True)

    async def list_sessions(self, tenant: str, query: Query) -> Page[v1.Session]:
        return await self._read(lambda tables: take(tables.sessions(tenant, query), query.limit))

    async def edit_session(
        self, key: SessionKey, edit: SessionEdit, if_etag: str = "", once: Once | None = None
    ) -> v1.Session:
        step = partial(steps.edit_session, key=key, edit=edit, if_etag=if_etag, once=once)
        return await self._write(step, key.uid)

    async def delete_session(self, key: SessionKey, if_etag: str = "", once: Once | None = None) -> None:
        await self._write(partial(steps.delete_session, key=key, if_etag=if_etag, once=once), key.uid)

    async def expired_sessions(self, now: int, limit: int) -> list[SessionKey]:
        return await self._read(lambda tables: tables.expired(now, limit))

    async def expire_session(self, key: SessionKey) -> bool:
        return await self._write(partial(steps.expire_session, key=key), key.uid)

    async def sweep_sessions(self, tenant: str | None = None, user: str = "") -> None:
        if tenant is not None:
            await self._copies.end(tenant, user)
        sweep = partial(steps.sweep_sessions, tenant=tenant, user=user, spared=self._copies.scopes)
        while not await self._write(sweep, SWEEP, piece=True):
            pass

    async def erase_state(self, tenant: str, user: str, once: Once | None = None) -> bool:
        erase = partial(steps.erase_state, tenant=tenant, user=user, once=once)
        if not await self._write(partial(erase, last=False)):
            return False
        # Searched in reads, after all rows above are gone, since a tenant may have very many.
        find = partial(content.uploaded_by, tenant=tenant, user=user)
        while found := await self._read(find):
            await self._write(partial(content.forget_uploaders, tenant=tenant, found=found), piece=True)
        return await self._write(partial(erase, last=True))

    async def get_message(self, key: SessionKey, message: str) -> v1.Message | None:
        return await self._of(key.tenant, key.uid, lambda tables: tables.message(key, message), None)

    async def list_messages(
        self,
        key: SessionKey,
        query: Query,
        newest_first: bool = False,
        step: StepKey | None = None,
        superseded: bool = False,
    ) -> Page[v1.Message]:
        return await self._of(
            key.tenant,
            key.uid,
            lambda tables: take(tables.messages(key, query, newest_first, step, superseded), query.limit),
            Page([], None),
        )

    async def get_run(self, key: SessionKey, run: str) -> tuple[v1.Run, bytes] | None:
        return await self._of(key.tenant, key.uid, lambda tables: steps.whole_run(tables, key, run), None)

    async def list_runs(self, tenant: str, session: SessionKey | None, query: Query, user: str = "") -> Page[v1.Run]:
        whole = partial(steps.whole_runs, tenant=tenant, session=session, query=query, user=user)
        return await self._read(lambda tables: take(whole(tables), query.limit))

    async def active_run(self, key: SessionKey, run: str) -> ActiveRun | None:
        return await self._read(lambda tables: tables.active_run(key, run))

    async def active_runs(self, after: ActiveRun | None = None, limit: int = 1 << 40) -> list[ActiveRun]:
        return await self._read(lambda tables: tables.active_runs(after, limit))

    async def idle_runs(self) -> list[ActiveRun]:
        return await self._read(lambda tables: tables.idle_runs())

    async def release_run(self, key: SessionKey, run: str) -> None:
        await self._write(lambda tables, _: tables.put_record(key, run, None, released=True), key.uid)

    async def get_state(self, scope: Scope, keys: Sequence[str], at: int = 0) -> v1.State:
        return await self._of_state(scope, at, partial(steps.named_entries, scope=scope, keys=keys, at=at), v1.State())

    async def list_state(
        self, scope: Scope, query: Query, at: int = 0, keys: Sequence[str] = ()
    ) -> tuple[v1.State, Page[str]]:
        step = partial(steps.page_of_entries, scope=scope, query=query, at=at, keys=keys)
        return await self._of_state(scope, at, step, (v1.State(), Page([], None)))

    async def list_user_states(self, tenant: str, query: Query) -> Page[str]:
        return await self._read(lambda tables: take(tables.users_with_state(tenant, query), query.limit))

    async def update_state(
        self, scope: Scope, ops: Sequence[v1.StateOp], if_version: int | None = None, once: Once | None = None
    ) -> v1.State:
        return await self._write(partial(steps.update_state, scope=scope, ops=ops, if_version=if_version, once=once))

    async def create_agent(self, tenant: str, agent_id: str, agent: v1.Agent, once: Once | None = None) -> v1.Agent:
        return await self._write(partial(steps.create_agent, tenant=tenant, agent_id=agent_id, agent=agent, once=once))

    async def get_agent(self, tenant: str, agent_id: str, revision: int = 0) -> v1.Agent | None:
        return await self._read(lambda tables: tables.agent(tenant, agent_id, revision))

    async def list_agents(self, tenant: str, query: Query) -> Page[v1.Agent]:
        return await self._read(lambda tables: take(tables.agents(tenant, query), query.limit))

    async def list_agent_revisions(self, tenant: str, agent_id: str, query: Query) -> Page[v1.Agent]:
        return await self._read(lambda tables: take(tables.revisions(tenant, agent_id, query), query.limit))

    async def edit_agent(
        self, tenant: str, agent_id: str, agent: v1.Agent, if_revision: int, once: Once | None = None
    ) -> v1.Agent:
        step = partial(steps.edit_agent, tenant=tenant, agent_id=agent_id, agent=agent, if_revision=if_revision)
        return await self._write(partial(step, once=once))

    async def delete_agent(self, tenant: str, agent_id: str, if_etag: str = "", once: Once | None = None) -> None:
        await self._write(partial(steps.delete_agent, tenant=tenant, agent_id=agent_id, if_etag=if_etag, once=once))

    async def sweep_agents(self) -> None:
        while found := await self._read(lambda tables: tables.deleted_agents(1), alone=True):
            (agent,) = found
            after: RunPlace | None = FIRST_PLACE
            while after is not None:
                after = await self._write(partial(steps.retire_revisions, agent=agent, after=after), SWEEP, piece=True)
            while not await self._write(partial(steps.delete_revisions, agent=agent), SWEEP, piece=True):
                pass

    async def put_blob(self, tenant: str, subject: str, sha256: str, data: bytes, *, of_run: bool = False) -> None:
        step = partial(content.put_blob, tenant=tenant, subject=subject, sha256=sha256, data=data, of_run=of_run)
        await self._write(step, _content(tenant))

    async def get_blob(self, tenant: str, sha256: str) -> v1.Blob | None:
        return await self._read(lambda tables: content.get_blob(tables, tenant, sha256))

    async def list_blobs(self, tenant: str, query: Query) -> Page[v1.Blob]:
        return await self._read(lambda tables: take(tables.content.blobs(tenant, query), query.limit))

    async def known_blobs(self, tenant: str, subject: str, user: str, digests: Collection[str]) -> set[str]:
        return await self._read(
            lambda tables: {each for each in digests if tables.content.knows_blob(tenant, each, subject, user)}
        )

    async def touch_blob(self, tenant: str, subject: str, sha256: str) -> v1.Blob | None:
        return await self._write(
            partial(content.touch_blob, tenant=tenant, subject=subject, sha256=sha256), _content(tenant)
        )

    async def read_blob(self, tenant: str, sha256: str, offset: int) -> bytes:
        return await self._read(lambda tables: content.read_blob(tables, tenant, sha256, offset))

    async def open_upload(self, tenant: str, upload_id: str, expire_time: int, size: int = 0) -> v1.Upload:
        return await self._write(
            lambda tables, _: content.open_upload(tables, tenant, upload_id, expire_time, size),
            _content(tenant),
        )

    async def get_upload(self, tenant: str, upload_id: str) -> v1.Upload | None:
        return await self._read(lambda tables: content.get_upload(tables, tenant, upload_id))

    async def add_chunk(self, tenant: str, upload_id: str, offset: int, data: bytes) -> None:
        await self._write(
            lambda tables, _: content.add_chunk(tables, tenant, upload_id, offset, data), _content(tenant)
        )

    async def read_upload(self, tenant: str, upload_id: str, offset: int) -> bytes:
        return await self._read(lambda tables: content.read_upload(tables, tenant, upload_id, offset))

    async def complete_upload(self, tenant: str, subject: str, upload_id: str, size: int, sha256: str) -> v1.Blob:
        complete = partial(content.complete_upload, tenant=tenant, subject=subject, upload_id=upload_id)
        return await self._write(partial(complete, size=size, sha256=sha256), _content(tenant))

    async def drop_upload(self, tenant: str, upload_id: str, if_bytes: int | None = None) -> None:
        await self._write(lambda tables, _: content.drop_upload(tables, tenant, upload_id, if_bytes), _content(tenant))

    async def sweep_blobs(self, now: int, uploaded_before: int, held: Container[tuple[str, str]] = ()) -> int:
        limit = content.SWEEP_ROWS
        await self._all(lambda tables, _: content.expire_uploads(tables, now, limit), limit)
        removed, last = 0, ("", "")
        # A reader searches for them, not the writer, since few of many blobs have no reference.
        find = partial(content.find_loose, before=uploaded_before, limit=limit)
        while found := await self._read(partial(find, after=last)):
            remove = partial(content.remove_loose, found=found, after=last, before=uploaded_before, held=held)
            more, last = await self._write(remove, piece=True)
            removed += more
        await self._all(lambda tables, _: tables.content.delete_chunks(limit), limit, SWEEP)
        return removed

    async def _all(self, step: Callable[[Tables, int], int], limit: int, within: str = "") -> int:
        """Repeats a step that does at most `limit` of something until it finds fewer; returns how many it did."""
        done = 0
        while (more := await self._write(step, within, piece=True)) == limit:
            done += more
        return done + more

    async def add_key(self, row: KeyRow, once: Once | None = None) -> v1.Key:
        return await self._write(partial(keys.add_key, row=row, once=once))

    async def find_key(self, key_id: str) -> KeyRow | None:
        return await self._read(lambda tables: tables.directory.key(key_id))

    async def list_keys(self, tenant: str, query: Query) -> Page[v1.Key]:
        return await self._read(lambda tables: take(tables.directory.keys(tenant, query), query.limit))

    async def rotate_key(
        self, tenant: str, key_id: str, digest: bytes, overlap: int, once: Once | None = None
    ) -> v1.Key:
        step = partial(keys.rotate_key, tenant=tenant, key_id=key_id, digest=digest, overlap=overlap)
        return await self._write(partial(step, once=once))

    async def delete_key(self, tenant: str, key_id: str, once: Once | None = None) -> None:
        await self._write(partial(keys.delete_key, tenant=tenant, key_id=key_id, once=once))

    async def is_keyed(self) -> bool:
        return await self._read(lambda tables: tables.directory.is_keyed())

    async def know_principal(self, tenant: str, principal: v1.Principal) -> v1.Principal:
        return await self._write(partial(principals.know, tenant=tenant, principal=principal), PRINCIPALS)

    async def get_principal(self, tenant: str, principal_id: str) -> v1.Principal | None:
        return await self._read(lambda tables: tables.directory.principal(tenant, names.principal(principal_id)))

    async def add_audit(self, rows: Sequence[AuditRow]) -> None:
        await self._write(partial(steps.add_audit, rows=rows), AUDIT)

    async def list_audit(self, tenant: str, query: Query) -> Page[v1.AuditEntry]:
        return await self._read(lambda tables: take(tables.directory.audit(tenant, query), query.limit))

    async def forget_audit(self, before: int) -> int:
        return await self._all(
            lambda tables, _: tables.directory.forget_audit(before, FORGET_BATCH), FORGET_BATCH, SWEEP
        )

    async def create_tenant(self, tenant: str, display_name: str, once: Once | None = None) -> v1.Tenant:
        return await self._write(partial(tenants.create_tenant, tenant=tenant, display_name=display_name, once=once))

    async def get_tenant(self, tenant: str) -> v1.Tenant | None:
        return await self._read(lambda tables: tables.directory.tenant(tenant))

    async def list_tenants(self, query: Query) -> Page[v1.Tenant]:
        return await self._read(lambda tables: take(tables.directory.tenants(query), query.limit))

    async def set_tenant_state(
        self, tenant: str, state: v1.Tenant.State.ValueType, once: Once | None = None
    ) -> v1.Tenant:
        return await self._write(partial(tenants.set_tenant_state, tenant=tenant, state=state, once=once))

    async def erase_tenant(self, tenant: str) -> bool:
        return await self._write(partial(tenants.erase_tenant, tenant=tenant), piece=True)

    async def probe(self) -> None:
        await self._write(lambda tables, _: tables.touch(), PROBE)

    async def forget_requests(self, before: int) -> int:
        forgotten, last = 0, False
        while not last:
            step = partial(steps.forget_requests, before=before)
            more, last = await self._write(step, SWEEP, piece=True)
            forgotten += more
        return forgotten
