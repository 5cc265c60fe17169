"""The unary methods: parse, call, render."""

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from notecase import v1

from notecase_server import errors, names
from notecase_server.engine import transfer
from notecase_server.engine.content import Contents
from notecase_server.engine.runs import Caused, Runs
from notecase_server.engine.schema import Schemas
from notecase_server.engine.session import Sessions
from notecase_server.errors import NotecaseError
from notecase_server.names import RunName
from notecase_server.rpc import filter as filters
from notecase_server.rpc.interceptor import MAX_MESSAGE_BYTES, caller
from notecase_server.rpc.pages import MAX_PAGE_SIZE, ListRequest, Pages
from notecase_server.rpc.run import Streams
from notecase_server.rpc.validate import MAX_SCHEMA_BYTES, Check
from notecase_server.store import answers
from notecase_server.store.contract import (
    ANSWER_BYTES,
    PAGE_BYTES,
    Answer,
    Commit,
    Committed,
    Once,
    Page,
    Query,
    Replayed,
    Scope,
    SessionEdit,
    SessionKey,
    Store,
)
from notecase_server.tools.contract import Toolbox

M = TypeVar("M", bound=Message)
R = TypeVar("R")

SUBJECT = ""
"""Who asks: nobody in particular, as long as callers have no credentials."""

SESSION = Answer("session")
NOTHING = Answer("nothing")

SESSION_FILTER: Mapping[str, filters.FieldKind] = {
    "user": "text",
    "agent": "text",
    "activity": filters.EnumField(v1.Session.Activity, "ACTIVITY_"),
    "display_name": "text",
    "create_time": "time",
    "update_time": "time",
}
AGENT_FILTER: Mapping[str, filters.FieldKind] = {"display_name": "text", "create_time": "time", "update_time": "time"}
RUN_FILTER: Mapping[str, filters.FieldKind] = {
    "state": filters.EnumField(v1.Run.State, "STATE_"),
    "agent": "text",
    "create_time": "time",
}

MAX_IMPORT_BYTES = 1 << 30
"""Of a session's file beside its content: it waits on this machine's disk, and a gigabyte is a million messages."""

EDIT_TRIES = 20
"""How often an update without an etag is merged anew when another one came between."""

AGENT_FIELDS = ("display_name", "description", "llm", "output_key", "labels")
EXPIRY_FIELDS = ("expire_time", "ttl", "idle_ttl")
SESSION_FIELDS = ("display_name", "agent", "labels", *EXPIRY_FIELDS)
"""What an update may change."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What the services of one server share."""

    version: str
    store: Store
    sessions: Sessions
    runs: Runs
    streams: Streams
    providers: tuple[str, ...]
    """The default one first."""
    toolbox: Toolbox
    schemas: Schemas
    pages: Pages
    contents: Contents
    new_id: Callable[[], str]

    async def session(self, session: str, once: Once | None = None, if_uid: str = "") -> SessionKey:
        """The session of this id, after a look whether the request was carried out before: what it was about may be
        gone by now. Raises Replayed, and NotecaseError SESSION_NOT_FOUND and REQUEST_ID_REUSED."""
        await self.store.recall(once)
        key, _ = await self.sessions.find(caller.get().tenant, session, if_uid)
        return key

    async def parent(self, check: Check, session: str) -> SessionKey:
        """The session whose list is asked for, or any key while the check has something to say. SESSION_NOT_FOUND."""
        if check.violations:
            return SessionKey(caller.get().tenant, session, "")
        return await self.session(session)

    async def surely(self, once: Once | None, answer: Answer, write: Callable[[Once], Awaitable[R]]) -> R:
        """Makes a write that no session's log records: see Sessions.surely."""
        record = self.sessions.record(once, caller.get().tenant, answer)
        return await self.sessions.surely(record, write)


def once(request: M, answer: Answer) -> Once | None:
    """The record that makes this request idempotent; None when it carries no request_id."""
    request_id: str = request.request_id  # type: ignore[attr-defined]
    if not request_id:
        return None
    who = caller.get()
    digest = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
    return Once(who.tenant, SUBJECT, who.method, request_id, digest, answer)


def checked(request: Any) -> Check:
    """A Check that has looked at the request_id, for a write."""
    check = Check()
    check.token_id("request_id", request.request_id)
    return check


def masked(check: Check, mask: FieldMask, given: Message, allowed: Iterable[str]) -> FieldMask:
    """The fields that an update changes (AIP-134). Paths that cannot be changed are told to the check and left out."""
    known = list(allowed)
    if list(mask.paths) == ["*"]:
        return FieldMask(paths=known)
    if not mask.paths:
        return FieldMask(paths=[field.name for field, _ in given.ListFields() if field.name in known])
    fine = FieldMask(paths=[path for path in mask.paths if path.partition(".")[0] in known])
    if not fine.IsValidForDescriptor(given.DESCRIPTOR):  # type: ignore[arg-type]
        fine = FieldMask()
    check(len(fine.paths) == len(mask.paths), "update_mask", f"has paths that are not of {', '.join(known)}")
    return fine


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


class Servers(v1.ServerServiceServicer):
    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    async def GetServerInfo(self, request: v1.GetServerInfoRequest, context: Any) -> v1.ServerInfo:
        return v1.ServerInfo(
            version=self.desk.version,
            store=self.desk.store.kind,
            providers=self.desk.providers,
            functions=self.desk.toolbox.functions,
            mcp_servers=self.desk.toolbox.mcp_servers,
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_page_size=MAX_PAGE_SIZE,
            max_runs=self.desk.runs.max_runs,
            max_blob_bytes=self.desk.contents.limits.blob,
            max_session_bytes=self.desk.contents.limits.session,
        )


class Agents(v1.AgentServiceServicer):
    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.store = desk.store

    async def CreateAgent(self, request: v1.CreateAgentRequest, context: Any) -> v1.Agent:
        check = checked(request)
        check.chosen_id("agent_id", request.agent_id)
        check.agent_body(request.agent, self.desk.providers, self.desk.toolbox)
        await self._judge(check, request.agent)
        check.done()
        agent_id = request.agent_id or self.desk.new_id()
        create = partial(self.store.create_agent, caller.get().tenant, agent_id, request.agent)
        return await self.desk.surely(once(request, Answer("agent")), Answer("agent"), create)

    async def GetAgent(self, request: v1.GetAgentRequest, context: Any) -> v1.Agent:
        check = Check()
        agent_id, revision = check.agent("name", request.name)
        check.done()
        agent = await self.store.get_agent(caller.get().tenant, agent_id, revision)
        if agent is None:
            raise errors.not_found("agent", request.name)
        return agent

    async def ListAgents(self, request: v1.ListAgentsRequest, context: Any) -> v1.ListAgentsResponse:
        about = ("agents", caller.get().tenant, request.filter)
        query = listed(Check(), self.desk.pages, request, *about, fields=AGENT_FILTER)
        page = await self.store.list_agents(caller.get().tenant, query)
        return v1.ListAgentsResponse(agents=page.rows, next_page_token=self.desk.pages.token(page.next, *about))

    async def ListAgentRevisions(
        self, request: v1.ListAgentRevisionsRequest, context: Any
    ) -> v1.ListAgentRevisionsResponse:
        check = Check()
        agent_id, _ = check.agent("name", request.name)
        about = ("revisions", caller.get().tenant, request.name)
        query = listed(check, self.desk.pages, request, *about)
        page = await self.store.list_agent_revisions(caller.get().tenant, agent_id, query)
        if not page.rows and query.after is None:
            raise errors.not_found("agent", request.name)
        return v1.ListAgentRevisionsResponse(agents=page.rows, next_page_token=self.desk.pages.token(page.next, *about))

    async def UpdateAgent(self, request: v1.UpdateAgentRequest, context: Any) -> v1.Agent:
        check = checked(request)
        agent_id, revision = check.agent("agent.name", request.agent.name)
        check(revision == 0, "agent.name", "names a revision; an update makes the next one")
        mask = masked(check, request.update_mask, request.agent, AGENT_FIELDS)
        if not {"llm", "llm.output_schema"}.isdisjoint(mask.paths):
            await self._judge(check, request.agent)
        tenant, etag = caller.get().tenant, request.agent.etag
        repeat = self.desk.sessions.record(once(request, Answer("agent")), tenant, Answer("agent"))
        for tries_left in reversed(range(EDIT_TRIES)):
            newest = await self.store.get_agent(tenant, agent_id) if agent_id else None
            if not check.violations:
                await self.store.recall(repeat)
            stale = bool(etag) and etag != (newest.etag if newest is not None else "")
            edited = v1.Agent() if newest is None else _copy(newest)
            mask.MergeMessage(request.agent, edited, replace_message_field=True, replace_repeated_field=True)
            body = Check()
            body.agent_body(edited, self.desk.providers, self.desk.toolbox)
            whole = agent_id and not stale and (newest is not None or request.allow_missing)
            check.within(body, ["agent"] if whole else [f"agent.{path}" for path in mask.paths])
            check.done()
            if newest is None and not request.allow_missing:
                raise errors.not_found("agent", request.agent.name)
            if stale:
                raise errors.etag_mismatch(request.agent.name, newest.etag if newest is not None else "")
            try:
                edit = partial(self.store.edit_agent, tenant, agent_id, edited, newest.revision if newest else 0)
                return await self.desk.sessions.surely(repeat, edit)
            except NotecaseError as error:  # another update came between
                if error.reason != v1.ERROR_REASON_ETAG_MISMATCH or not tries_left:
                    raise
        raise AssertionError("the last try returns or raises")

    async def _judge(self, check: Check, agent: v1.Agent) -> None:
        """Checks what only the process for schemas can tell."""
        if len(agent.llm.output_schema) <= MAX_SCHEMA_BYTES:
            with check.taking():
                await self.desk.schemas.require("agent.llm.output_schema", agent.llm.output_schema)

    async def DeleteAgent(self, request: v1.DeleteAgentRequest, context: Any) -> Empty:
        check = checked(request)
        agent_id, revision = check.agent("name", request.name)
        check(revision == 0, "name", "names a revision; agents are deleted whole")
        check.done()
        delete = partial(self.store.delete_agent, caller.get().tenant, agent_id, request.etag)
        await self.desk.surely(once(request, NOTHING), NOTHING, delete)
        return Empty()


class SessionsService(v1.SessionServiceServicer):
    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    async def CreateSession(self, request: v1.CreateSessionRequest, context: Any) -> v1.Session:
        check = checked(request)
        check.chosen_id("session_id", request.session_id)
        check.new_session("session", request.session)
        check.first_state("state", request.state)
        check.done()
        repeat = once(request, SESSION)
        await self.desk.store.recall(repeat)
        key = self.desk.sessions.new_key(caller.get().tenant, request.session_id or self.desk.new_id())
        await self._require_agent(request.session.agent)
        ops = [v1.StateOp(key=name, set=value) for name, value in sorted(request.state.items())]
        change = v1.Event(cause_id=request.request_id, state_changed=v1.StateChanged(ops=ops))
        events = [change] if ops else []
        return _session_of(
            await self.desk.sessions.commit(Commit(key=key, once=repeat, create=request.session, events=events))
        )

    async def GetSession(self, request: v1.GetSessionRequest, context: Any) -> v1.Session:
        check = Check()
        session = check.session("name", request.name)
        check.done()
        _, row = await self.desk.sessions.find(caller.get().tenant, session)
        return names.render_session(row)

    async def ListSessions(self, request: v1.ListSessionsRequest, context: Any) -> v1.ListSessionsResponse:
        about = ("sessions", caller.get().tenant, request.filter)
        query = listed(Check(), self.desk.pages, request, *about, fields=SESSION_FILTER)
        page = await self.desk.store.list_sessions(caller.get().tenant, query)
        rows = [names.render_session(row) for row in page.rows]
        return v1.ListSessionsResponse(sessions=rows, next_page_token=self.desk.pages.token(page.next, *about))

    async def UpdateSession(self, request: v1.UpdateSessionRequest, context: Any) -> v1.Session:
        check = checked(request)
        session = check.session("session.name", request.session.name)
        check.session_body("session", request.session)
        mask = masked(check, request.update_mask, request.session, SESSION_FIELDS)
        check.done()
        if "agent" in mask.paths:
            await self._require_agent(request.session.agent)
        expiry = {path for path in mask.paths if path in EXPIRY_FIELDS}
        given = _copy(request.session)
        _set_expiration(given, request.session, expiry)
        edit = SessionEdit(tuple(path for path in mask.paths if path not in expiry), given, bool(expiry))
        repeat = once(request, SESSION)
        key = await self.desk.session(session, repeat)
        change = partial(self.desk.store.edit_session, key, edit, request.session.etag)
        return _rendered(await self.desk.surely(repeat, SESSION, change))

    async def DeleteSession(self, request: v1.DeleteSessionRequest, context: Any) -> Empty:
        check = checked(request)
        session = check.session("name", request.name)
        check.done()
        repeat = once(request, NOTHING)
        await self.desk.sessions.delete(await self.desk.session(session, repeat), request.etag, repeat)
        return Empty()

    async def CompactSession(self, request: v1.CompactSessionRequest, context: Any) -> v1.Session:
        check = checked(request)
        session = check.session("name", request.name)
        check.kept("keep_recent", request.keep_recent)
        if request.agent:
            check.agent("agent", request.agent)
        check.done()
        caused = Caused(request.request_id, once(request, SESSION))
        key = await self.desk.session(session, caused.once)
        return _session_of(await self.desk.runs.compact(key, request.keep_recent, request.agent, caused))

    async def ForkSession(self, request: v1.ForkSessionRequest, context: Any) -> v1.Session:
        check = checked(request)
        session = check.session("name", request.name)
        at_sequence = request.at_sequence if request.HasField("at_sequence") else None
        check(request.at_sequence >= 0, "at_sequence", "is negative")
        check.chosen_id("session_id", request.session_id)
        check.new_session("session", request.session)
        check(not request.session.user, "session.user", "a fork's user is its source's")
        check.done()
        repeat = once(request, SESSION)
        source = await self.desk.session(session, repeat)
        key = self.desk.sessions.new_key(source.tenant, request.session_id or self.desk.new_id())
        await self._require_agent(request.session.agent)
        return _session_of(await self.desk.runs.fork(source, at_sequence, key, request.session, repeat))

    async def RewindSession(self, request: v1.RewindSessionRequest, context: Any) -> v1.Session:
        check = checked(request)
        session = check.session("name", request.name)
        check(request.HasField("to_sequence"), "to_sequence", "is missing; 0 empties the session")
        check(request.to_sequence >= 0, "to_sequence", "is negative")
        check(request.if_last_sequence >= 0, "if_last_sequence", "is negative")
        check.done()
        expected = request.if_last_sequence if request.HasField("if_last_sequence") else None
        caused = Caused(request.request_id, once(request, SESSION))
        key = await self.desk.session(session, caused.once)
        return _session_of(await self.desk.runs.rewind(key, request.to_sequence, expected, caused))

    async def EraseUser(self, request: v1.EraseUserRequest, context: Any) -> v1.EraseUserResponse:
        check = checked(request)
        check.user("name", request.name)
        check.done()
        tenant = caller.get().tenant
        record = self.desk.sessions.record(once(request, Answer("erased")), tenant, Answer("erased"))
        gone = await self.desk.sessions.erase_user(tenant, request.name, record)
        return v1.EraseUserResponse(sessions_deleted=gone)

    async def ExportSession(
        self, request: v1.ExportSessionRequest, context: Any
    ) -> AsyncIterator[v1.ExportSessionResponse]:
        check = Check()
        session = check.session("name", request.name)
        check.done()
        key = await self.desk.session(session)
        contents = self.desk.contents if request.with_blobs else None
        async for chunk in transfer.exported(self.desk.store, key, contents):
            yield v1.ExportSessionResponse(chunk=chunk)

    async def ImportSession(self, request: AsyncIterator[v1.ImportSessionRequest], context: Any) -> v1.Session:
        """The file waits on disk until it is whole: its size is no matter of memory."""
        with tempfile.TemporaryFile() as file:
            most = MAX_IMPORT_BYTES + self.desk.contents.limits.session
            header, digest = await _spooled(request, file, most)
            who = caller.get()
            key = self.desk.sessions.new_key(who.tenant, header.session_id or self.desk.new_id())
            repeat = None
            if header.request_id:
                repeat = Once(who.tenant, SUBJECT, who.method, header.request_id, digest, SESSION)
            await self.desk.store.recall(repeat)
            restore = await asyncio.to_thread(transfer.read, file, key)
            check = Check()
            check.session_body("header", restore.session)
            if check.violations:
                raise errors.import_invalid("has a header that no session can have")
            await transfer.keep_content(self.desk.contents, file, restore)
            store = self.desk.store
            made = await self.desk.surely(repeat, SESSION, lambda record: store.restore(replace(restore, once=record)))
            return _rendered(made)

    async def _require_agent(self, name: str) -> None:
        parsed = names.parse_agent(name) if name else None
        if parsed and await self.desk.store.get_agent(caller.get().tenant, parsed.agent, parsed.revision) is None:
            raise errors.not_found("agent", name)


class States(v1.StateServiceServicer):
    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.store = desk.store

    async def GetState(self, request: v1.GetStateRequest, context: Any) -> v1.GetStateResponse:
        check = Check()
        scope = check.state("name", caller.get().tenant, request.name)
        check(len(request.keys) <= MAX_PAGE_SIZE, "keys", f"has more than {MAX_PAGE_SIZE} keys")
        at = request.at_sequence
        check(at >= 0, "at_sequence", "is negative")
        check(not at or scope.kind == "session", "at_sequence", "goes with a session's state; others have no log")
        keys = sorted(set(request.keys))
        state_key = await self._parent(check, scope)
        about = ("state", scope.tenant, scope.kind, state_key.id, str(at), *(repr(key) for key in keys))
        query = listed(check, self.desk.pages, request, *about)
        state, page = await self.store.list_state(state_key, query, at, keys)
        token = self.desk.pages.token(page.next, *about)
        return v1.GetStateResponse(
            name=request.name, entries=state.entries, version=state.version, next_page_token=token
        )

    async def PutState(self, request: v1.PutStateRequest, context: Any) -> v1.StateEntry:
        op = v1.StateOp(key=request.key, set=request.value)
        if request.HasField("if_version"):
            op.if_version = request.if_version
        check = checked(request)
        scope = check.state("name", caller.get().tenant, request.name)
        check.key("key", request.key, scope.kind == "session")
        check.value("value", request.value)
        check(op.ByteSize() <= PAGE_BYTES, "value", f"is larger than {PAGE_BYTES} bytes")
        check.done()
        answer = Answer("entry", request.key)
        made: v1.StateEntry = await self._update(scope, [op], None, request, answer)
        return made

    async def UpdateState(self, request: v1.UpdateStateRequest, context: Any) -> v1.State:
        check = checked(request)
        scope = check.state("name", caller.get().tenant, request.name)
        check.ops("ops", request.ops, scope.kind == "session")
        check.done()
        if_version = request.if_version if request.HasField("if_version") else None
        answer = Answer("state", request.name)
        made: v1.State = await self._update(scope, request.ops, if_version, request, answer)
        return made

    async def _parent(self, check: Check, scope: Scope) -> Scope:
        return (await self.desk.parent(check, scope.id)).state if scope.kind == "session" else scope

    async def _found(self, scope: Scope, repeat: Once | None = None) -> tuple[SessionKey | None, Scope]:
        """A state by its name as it is kept: a session's under the session's uid. SESSION_NOT_FOUND."""
        if scope.kind != "session":
            return None, scope
        key = await self.desk.session(scope.id, repeat)
        return key, key.state

    async def _update(
        self,
        scope: Scope,
        ops: Sequence[v1.StateOp],
        if_version: int | None,
        request: v1.PutStateRequest | v1.UpdateStateRequest,
        answer: Answer,
    ) -> Any:
        """Changes a state, and answers as a repeat is answered."""
        repeat = once(request, answer)
        key, scope = await self._found(scope, repeat)
        record = repeat if key else self.desk.sessions.record(repeat, scope.tenant, answer)
        made = await self.desk.sessions.update_state(key, scope, ops, if_version, record, request.request_id)
        return answers.of(answer, made)


class Messages(v1.MessageServiceServicer):
    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    async def ListMessages(self, request: v1.ListMessagesRequest, context: Any) -> v1.ListMessagesResponse:
        check = Check()
        session = check.session("parent", request.parent)
        known = request.order_by in {"", "sequence", "sequence asc", "sequence desc"}
        check(known, "order_by", 'has to be "sequence" or "sequence desc"')
        key = await self.desk.parent(check, session)
        about = ("messages", key.tenant, key.uid, request.order_by, str(request.show_superseded))
        query = listed(check, self.desk.pages, request, *about)
        page = await self.desk.store.list_messages(
            key, query, request.order_by == "sequence desc", superseded=request.show_superseded
        )
        rows = [names.render_message(key.session, row) for row in page.rows]
        return v1.ListMessagesResponse(messages=rows, next_page_token=self.desk.pages.token(page.next, *about))

    async def GetMessage(self, request: v1.GetMessageRequest, context: Any) -> v1.Message:
        check = Check()
        session, message = check.message("name", request.name)
        check.done()
        row = await self.desk.store.get_message(await self.desk.session(session), message)
        if row is None:
            raise errors.not_found("message", request.name)
        return names.render_message(session, row)

    async def AppendMessages(self, request: v1.AppendMessagesRequest, context: Any) -> v1.AppendMessagesResponse:
        check = checked(request)
        parent = check.session("parent", request.parent)
        check(len(request.messages) > 0, "messages", "is empty")
        roles = [v1.Message.ROLE_USER, v1.Message.ROLE_ASSISTANT, v1.Message.ROLE_SYSTEM]
        check.messages("messages", request.messages, roles)
        check.done()
        answer = Answer("messages")
        repeat = once(request, answer)
        key = await self.desk.session(parent, repeat)
        _, session = await self.desk.sessions.watched(key)
        said = self.desk.runs.incoming(await self.desk.contents.kept(key, request.messages), session.user)
        events = [v1.Event(cause_id=request.request_id, message_added=message) for message in said]
        expected = request.if_last_sequence if request.HasField("if_last_sequence") else None
        commit = Commit(key=key, once=repeat, if_last_sequence=expected, events=events)
        made: v1.AppendMessagesResponse = answers.of(answer, await self.desk.sessions.commit(commit))
        return made


class RunsService(v1.RunServiceServicer):
    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.runs = desk.runs

    def Run(self, request: AsyncIterator[v1.RunRequest], context: Any) -> AsyncIterator[v1.RunResponse]:
        return self.desk.streams.run(caller.get().tenant, request)

    def WatchEvents(self, request: v1.WatchEventsRequest, context: Any) -> AsyncIterator[v1.RunResponse]:
        after = request.after_sequence if request.HasField("after_sequence") else None
        return self.desk.streams.watch(
            caller.get().tenant, request.name, after, request.options, request.if_session_uid
        )

    async def Invoke(self, request: v1.InvokeRequest, context: Any) -> v1.InvokeResponse:
        check = checked(request)
        check.start("start", request.start)
        timeout = check.seconds("timeout", request)
        check.done()
        try:
            caused = Caused(request.request_id, once(request, Answer("started")))
            key, run, _ = await self.runs.start(caller.get().tenant, request.start, caused)
            run_id = run.name
        except Replayed as replayed:
            session, run_id = names.parse_run(v1.Run.FromString(replayed.response).name) or RunName("", "")
            key = await self.desk.session(session)
        row = names.render_run(key.session, await self.runs.wait(key, run_id, timeout))
        answer = v1.InvokeResponse(run=row, reply=row.reply if row.HasField("reply") else None)
        if answer.ByteSize() > ANSWER_BYTES:
            answer.run.ClearField("reply")
        return answer

    async def CreateRun(self, request: v1.CreateRunRequest, context: Any) -> v1.Run:
        check = checked(request)
        check.start("start", request.start)
        check.done()
        caused = Caused(request.request_id, once(request, Answer("started")))
        started = await self.runs.start(caller.get().tenant, request.start, caused)
        return names.render_run(started.key.session, started.run)

    async def GetRun(self, request: v1.GetRunRequest, context: Any) -> v1.Run:
        check = Check()
        session, run = check.run("name", request.name)
        check.done()
        row = await self.desk.store.get_run(await self.desk.session(session), run)
        if row is None:
            raise errors.not_found("run", request.name)
        return names.render_run(session, row[0])

    async def ListRuns(self, request: v1.ListRunsRequest, context: Any) -> v1.ListRunsResponse:
        check = Check()
        session = "" if request.parent == "sessions/-" else check.session("parent", request.parent)
        tenant = caller.get().tenant
        key = await self.desk.parent(check, session) if request.parent != "sessions/-" else None
        about = ("runs", tenant, key.uid if key else "-", request.filter)
        query = listed(check, self.desk.pages, request, *about, fields=RUN_FILTER)
        page: Page[v1.Run] = await self.desk.store.list_runs(tenant, key, query)
        rows = []
        for row in page.rows:
            found = names.parse_run(row.name)
            assert found is not None
            row.name = found.run
            rows.append(names.render_run(found.session, row))
        return v1.ListRunsResponse(runs=rows, next_page_token=self.desk.pages.token(page.next, *about))

    async def WaitRun(self, request: v1.WaitRunRequest, context: Any) -> v1.Run:
        check = Check()
        session, run = check.run("name", request.name)
        timeout = check.seconds("timeout", request)
        check.done()
        row = await self.runs.wait(await self.desk.session(session), run, timeout, request.after_sequence)
        return names.render_run(session, row)

    async def CancelRun(self, request: v1.CancelRunRequest, context: Any) -> v1.Run:
        check = checked(request)
        session, run = check.run("name", request.name)
        check.cancel("cancel", request.cancel)
        check.done()
        answer = Answer("run", run)
        caused = Caused(request.request_id, once(request, answer))
        key = await self.desk.session(session, caused.once)
        try:
            done = await self.runs.cancel(key, run, request.cancel, caused)
        except NotecaseError as error:
            if error.reason != v1.ERROR_REASON_RUN_NOT_FOUND or not request.allow_missing:
                raise
            done = await self.runs.cancel_unstarted(key, run, request.cancel, caused)
        ended: v1.Run = answers.of(answer, done)
        return ended

    async def SendCommand(self, request: v1.SendCommandRequest, context: Any) -> v1.SendCommandResponse:
        check = Check()
        session = check.session("session", request.session)
        run = check.run("run", request.run) if request.run else RunName(session, "")
        if request.run and run.session and session:
            check(run.session == session, "run", "is a run of another session")
        check.uid("if_session_uid", request.if_session_uid)
        self.desk.streams.check(check, session, request.command)
        check.done()
        key = await self.desk.session(session, if_uid=request.if_session_uid)
        return v1.SendCommandResponse(result=await self.desk.streams.command(key, request.command, run.run))


def _set_expiration(session: v1.Session, given: v1.Session, fields: Iterable[str]) -> None:
    """One of the fields, or none, is what holds from now on; what was read back beside idle_ttl is not."""
    for name in EXPIRY_FIELDS:
        session.ClearField(name)  # type: ignore[arg-type]
    for name in sorted(fields):
        if given.HasField(name):  # type: ignore[arg-type]
            getattr(session, name).CopyFrom(getattr(given, name))
    if session.HasField("idle_ttl"):
        session.ClearField("expire_time")


async def _spooled(
    frames: AsyncIterator[v1.ImportSessionRequest], file: BinaryIO, most: int
) -> tuple[v1.ImportHeader, bytes]:
    """Puts a stream's chunks into the file, and returns its header and the digest of both."""
    header, digest, size = v1.ImportHeader(), hashlib.sha256(), 0
    async for number, frame in _numbered(frames):
        check = Check()
        if frame.HasField("header"):
            header = frame.header
            check(number == 0, "header", "goes with the first frame only")
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
        await asyncio.to_thread(file.write, frame.chunk)
    return header, digest.digest()


async def _numbered(frames: AsyncIterator[M]) -> AsyncIterator[tuple[int, M]]:
    number = 0
    async for frame in frames:
        yield number, frame
        number += 1


def _copy(message: M) -> M:
    made = type(message)()
    made.CopyFrom(message)
    return made


def _rendered(row: v1.Session) -> v1.Session:
    return names.render_session(_copy(row))


def _session_of(done: Committed) -> v1.Session:
    return _rendered(done.session)
