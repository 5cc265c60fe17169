"""SessionService: parse, call, render."""

import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from notecase import v1

from notecase_server import errors, names
from notecase_server.auth import rights
from notecase_server.engine import transfer
from notecase_server.engine.arrivals import Arrival
from notecase_server.rpc import filter as filters
from notecase_server.rpc import validate
from notecase_server.rpc.caller import caller, frame_bytes
from notecase_server.rpc.check import Check
from notecase_server.rpc.desk import (
    LARGE_BYTES,
    NOTHING,
    SESSION,
    Desk,
    caused_by,
    checked,
    listed,
    masked,
    named,
    once,
)
from notecase_server.store.contract import (
    PAGE_BYTES,
    AgentStore,
    And,
    Answer,
    AuditStore,
    Commit,
    Committed,
    Compare,
    Once,
    SessionEdit,
)

M = TypeVar("M", bound=Message)
R = TypeVar("R")

SESSION_FILTER: Mapping[str, filters.FieldKind] = {
    "user": "text",
    "agent": "text",
    "activity": filters.EnumField(v1.Session.Activity, "ACTIVITY_"),
    "display_name": "text",
    "create_time": "time",
    "update_time": "time",
    "labels": "labels",
}
MAX_IMPORT_BYTES = 1 << 30
"""The most bytes of a session's file, not counting content: it is stored on this machine's disk, and a gigabyte is a
million messages."""

EXPIRY_FIELDS = ("expire_time", "ttl", "idle_ttl")
SESSION_FIELDS = ("display_name", "agent", "labels", *EXPIRY_FIELDS)
"""The fields that an update may change, and "remembered" if its mask names it: answers that it leaves out are removed
permanently."""


class DeskStore(AgentStore, AuditStore, Protocol):
    """Data that is read and written in addition to sessions."""


class SessionsService(v1.SessionServiceServicer):
    def __init__(self, desk: Desk, others: DeskStore) -> None:
        self.desk = desk
        self.others = others
        self.store = desk.sessions.store

    async def CreateSession(self, request: v1.CreateSessionRequest, context: Any) -> v1.Session:
        check = checked(request)
        check.chosen_id("session_id", request.session_id)
        validate.new_session(check, "session", request.session)
        validate.first_state(check, "state", request.state)
        await check.settled()
        request.session.user = request.session.user or caller.get().user
        repeat = await once(request, SESSION)
        await self.desk.requests.recall(repeat)
        key = self.desk.sessions.new_key(caller.get().tenant, request.session_id or self.desk.new_id())
        await self._require_agent(request.session.agent)
        change = v1.Event(cause_id=request.request_id)
        for name in sorted(request.state):
            change.state_changed.ops.add(key=name, set=request.state[name])
        events = [change] if request.state else []
        principal = caller.get().principal_name
        commit = Commit(key=key, once=repeat, create=request.session, events=events, principal=principal)
        async with self.desk.patiently(heavy=frame_bytes.get() > LARGE_BYTES):
            return _session_of(await self.desk.sessions.commit(commit))

    async def GetSession(self, request: v1.GetSessionRequest, context: Any) -> v1.Session:
        session = named(request, Check.session)
        who = caller.get()
        _, row = await self.desk.sessions.find(who.tenant, session, user=who.user)
        return names.render_session(row)

    async def ListSessions(self, request: v1.ListSessionsRequest, context: Any) -> v1.ListSessionsResponse:
        about = ("sessions", caller.get().tenant, request.filter)
        query = listed(Check(), self.desk.pages, request, *about, fields=SESSION_FILTER)
        if user := caller.get().user:
            mine = Compare("user", "=", user)
            query = query._replace(where=mine if query.where is None else And((mine, query.where)))
        page = await self.store.list_sessions(caller.get().tenant, query)
        rows = [names.render_session(row) for row in page.rows]
        return v1.ListSessionsResponse(sessions=rows, next_page_token=self.desk.pages.token(page.next, *about))

    async def UpdateSession(self, request: v1.UpdateSessionRequest, context: Any) -> v1.Session:
        check = checked(request)
        session = check.session("session.name", request.session.name)
        mask = masked(check, request.update_mask, request.session, SESSION_FIELDS, by_name=["remembered"])
        check(not any("." in path for path in mask.paths), "update_mask", "names a part of a field; name all of it")
        labels = any(path.partition(".")[0] == "labels" for path in mask.paths)
        validate.session(check, "session", request.session, labels)
        if labels:
            check.needs(rights.LABELS, "session.labels")
        check.done()
        expiry = {path for path in mask.paths if path in EXPIRY_FIELDS}
        given = deepcopy(request.session)
        _set_expiration(given, request.session, expiry)
        edit = SessionEdit(tuple(path for path in mask.paths if path not in expiry), given, bool(expiry))
        repeat = await once(request, SESSION)
        key = await self.desk.session(session, repeat)
        if "agent" in mask.paths:
            await self._require_agent(request.session.agent)
        change = partial(self.store.edit_session, key, edit, request.session.etag)
        audit = caller.get().audit(request.session.name) if "remembered" in edit.paths else None
        return _rendered(await self.desk.surely(repeat, SESSION, change, audit))

    async def DeleteSession(self, request: v1.DeleteSessionRequest, context: Any) -> Empty:
        session = named(request, Check.session)
        repeat, who = await once(request, NOTHING), caller.get()
        await self.desk.requests.recall(repeat)
        key = await self.desk.sessions.find_key(who.tenant, session, who.user)
        await self.desk.sessions.delete(key, request.etag, repeat, who.audit(request.name))
        return Empty()

    async def CompactSession(self, request: v1.CompactSessionRequest, context: Any) -> v1.Session:
        check = checked(request)
        session = check.session("name", request.name)
        validate.kept(check, "keep_recent", request.keep_recent)
        if request.agent:
            check.agent("agent", request.agent)
        check.done()
        caused = await caused_by(request, SESSION)
        key = await self.desk.session(session, caused.once)
        return _session_of(await self.desk.runs.at_rest.compact(key, request.keep_recent, request.agent, caused))

    async def ForkSession(self, request: v1.ForkSessionRequest, context: Any) -> v1.Session:
        check = checked(request)
        session = check.session("name", request.name)
        at_sequence = request.at_sequence if request.HasField("at_sequence") else None
        check(request.at_sequence >= 0, "at_sequence", "is negative")
        check.chosen_id("session_id", request.session_id)
        validate.new_session(check, "session", request.session)
        check(not request.session.user, "session.user", "must not be set: a fork has the user of its source")
        check.done()
        caused = await caused_by(request, SESSION)
        source = await self.desk.session(session, caused.once)
        key = self.desk.sessions.new_key(source.tenant, request.session_id or self.desk.new_id())
        await self._require_agent(request.session.agent)
        async with self.desk.patiently():
            forked = await self.desk.runs.at_rest.fork(source, at_sequence, key, request.session, caused)
        return _session_of(forked)

    async def RewindSession(self, request: v1.RewindSessionRequest, context: Any) -> v1.Session:
        check = checked(request)
        session = check.session("name", request.name)
        check(request.HasField("to_sequence"), "to_sequence", "is required; 0 empties the session")
        check(request.to_sequence >= 0, "to_sequence", "is negative")
        check(request.if_last_sequence >= 0, "if_last_sequence", "is negative")
        check.done()
        expected = request.if_last_sequence if request.HasField("if_last_sequence") else None
        caused = await caused_by(request, SESSION)
        key = await self.desk.session(session, caused.once)
        async with self.desk.patiently():
            return _session_of(await self.desk.runs.at_rest.rewind(key, request.to_sequence, expected, caused))

    async def EraseUser(self, request: v1.EraseUserRequest, context: Any) -> v1.EraseUserResponse:
        named(request, Check.user)
        tenant, audit = caller.get().tenant, caller.get().audit(request.name)
        repeat = await once(request, Answer("erased"))
        record = self.desk.sessions.record(repeat, tenant, Answer("erased"))._replace(audit=audit)
        try:
            gone = await self.desk.sessions.erase_user(tenant, request.name, record)
        finally:
            self.desk.principals.forget()
        return v1.EraseUserResponse(sessions_deleted=gone)

    async def ExportSession(
        self, request: v1.ExportSessionRequest, context: Any
    ) -> AsyncIterator[v1.ExportSessionResponse]:
        session = named(request, Check.session)
        key = await self.desk.session(session)
        audit = caller.get().audit(request.name)
        contents = self.desk.contents if request.with_blobs else None
        async for chunk in transfer.exported(self.store, key, contents):
            if audit is not None:
                await self.others.add_audit([audit])  # before the first byte
                audit = None
            yield v1.ExportSessionResponse(chunk=chunk)

    async def ImportSession(self, request: AsyncIterator[v1.ImportSessionRequest], context: Any) -> v1.Session:
        """The file is stored on disk until it is complete, so its size does not affect memory."""
        async with self.desk.arrivals.file() as arrival:
            file = arrival.file
            most = MAX_IMPORT_BYTES + self.desk.contents.limits.session
            header, digest = await _spooled(request, arrival, most)
            who = caller.get()
            key = self.desk.sessions.new_key(who.tenant, header.session_id or self.desk.new_id())
            repeat = None
            if header.request_id:
                repeat = Once(who.tenant, who.principal.subject, who.method, header.request_id, digest, SESSION)
            await self.desk.requests.recall(repeat)
            async with self.desk.patiently():
                restore = await transfer.read(file, key)
            check = Check()
            validate.session(check, "header", restore.session)
            if check.violations:
                raise errors.import_invalid("has an invalid header")
            await transfer.keep_content(self.desk.contents, file, restore)
            store = self.store
            async with self.desk.patiently():
                made = await self.desk.surely(
                    repeat, SESSION, lambda record: store.restore(replace(restore, once=record))
                )
            return _rendered(made)

    async def _require_agent(self, name: str) -> None:
        parsed = names.parse_agent(name) if name else None
        if parsed and await self.others.get_agent(caller.get().tenant, parsed.agent, parsed.revision) is None:
            raise errors.not_found("agent", name)


def _set_expiration(session: v1.Session, given: v1.Session, fields: Iterable[str]) -> None:
    """One of the fields, or none, applies from now on; an expire_time that was read together with idle_ttl does not."""
    for name in EXPIRY_FIELDS:
        session.ClearField(name)  # type: ignore[arg-type]
    for name in sorted(fields):
        if given.HasField(name):  # type: ignore[arg-type]
            getattr(session, name).CopyFrom(getattr(given, name))
    if session.HasField("idle_ttl"):
        session.ClearField("expire_time")


async def _spooled(
    frames: AsyncIterator[v1.ImportSessionRequest], arrival: Arrival, most: int
) -> tuple[v1.ImportHeader, bytes]:
    """Puts a stream's chunks into its file, and returns its header and the digest of both."""
    header, digest, size = v1.ImportHeader(), hashlib.sha256(), 0
    async for number, frame in _numbered(frames):
        check = Check()
        if frame.HasField("header"):
            header = frame.header
            check(number == 0, "header", "is allowed only in the first frame")
            check.chosen_id("header.session_id", header.session_id)
            check.token_id("header.request_id", header.request_id)
            digest.update(header.SerializeToString(deterministic=True))
        else:
            check(len(frame.chunk) <= PAGE_BYTES, "chunk", f"is larger than {PAGE_BYTES} bytes")
        check.done()
        size += len(frame.chunk)
        if size > most:
            raise errors.too_large("The file", size, most)
        digest.update(frame.chunk)
        await arrival.add(frame.chunk)
    return header, digest.digest()


async def _numbered(frames: AsyncIterator[M]) -> AsyncIterator[tuple[int, M]]:
    number = 0
    async for frame in frames:
        yield number, frame
        number += 1


def _rendered(row: v1.Session) -> v1.Session:
    return names.render_session(deepcopy(row))


def _session_of(done: Committed) -> v1.Session:
    return _rendered(done.session)
