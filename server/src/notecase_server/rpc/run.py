"""The Run stream: one reader carries out commands in their order, one writer sends results and events. SendCommand and
WatchEvents are the same two halves as separate calls.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from copy import deepcopy
from typing import TypeAlias

import msgspec
from notecase import v1

from notecase_server import errors, names
from notecase_server.auth import rights
from notecase_server.engine.admission import Started
from notecase_server.engine.caused import Caused
from notecase_server.engine.content import digest_of
from notecase_server.engine.runs import Runs
from notecase_server.engine.session import LiveSession
from notecase_server.engine.sessions import Sessions
from notecase_server.errors import NotecaseError, Violation
from notecase_server.rpc import validate
from notecase_server.rpc.caller import caller
from notecase_server.rpc.check import Check
from notecase_server.rpc.refusals import Refusals
from notecase_server.rpc.watch import Cursor, Pace
from notecase_server.store.contract import CommandId, Commit, Committed, Duplicate, SessionKey
from notecase_server.store.fold import ENDED
from notecase_server.supervisor import Supervisor

Disposition: TypeAlias = "v1.CommandResult.Disposition.ValueType"
APPLIED, DUPLICATE = v1.CommandResult.DISPOSITION_APPLIED, v1.CommandResult.DISPOSITION_DUPLICATE

MAX_RESULTS = 16
"""Results of one stream that wait for their reader; then its next command is read only when one was taken."""


class Results:
    """The results of one stream's commands, in their order, from who carries them out to who sends them. It is made for
    every stream and stays empty for most, so it holds as little as it can."""

    __slots__ = ("_room", "broken", "waiting")

    def __init__(self) -> None:
        self.waiting: list[v1.CommandResult] = []
        self.broken: Exception | None = None
        """What ended the commands before the caller did."""
        self._room: asyncio.Future[None] | None = None
        """Done when a result was taken, while `put` waits for room."""

    async def put(self, result: v1.CommandResult) -> None:
        """Adds a result, once fewer than MAX_RESULTS wait. One task at a time."""
        while len(self.waiting) >= MAX_RESULTS:
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        self.waiting.append(result)

    def take(self) -> v1.CommandResult:
        """Returns the first one. Raises IndexError when there is none."""
        result = self.waiting.pop(0)
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        return result


Write = Callable[[v1.RunResponse], Awaitable[None]]
"""Sends a frame, and returns once there is room for it."""


class Drain:
    """The server's stop, as streams hear of it."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self.grace: float | None = None
        """Seconds the streams have left; None while the server serves."""
        self.closing = False
        """Runs have stopped: the next frames are the last."""

    def begin(self, grace: float) -> None:
        self.grace = grace
        self._sessions.ring()

    def close(self) -> None:
        self.closing = True
        self._sessions.ring()


class Attachment(msgspec.Struct):
    """A session that a stream is attached to, and what the stream has sent of it."""

    live: LiveSession
    cursor: Cursor
    run: str
    """The run that the stream's commands are for; "" for the one that is active when a command comes."""


Opened: TypeAlias = tuple[Attachment, v1.RunResponse]
"""An attachment, and the first frame of its stream."""


class Streams:
    """What the streams of a server share."""

    def __init__(self, sessions: Sessions, runs: Runs, supervisor: Supervisor, pace: Pace, refusals: Refusals) -> None:
        self.drain = Drain(sessions)
        self._refusals = refusals
        self._sessions = sessions
        self._runs = runs
        self._supervisor = supervisor
        self._pace = pace

    def run(self, tenant: str, requests: AsyncIterator[v1.RunRequest], write: Write) -> Awaitable[None]:
        """The Run RPC. Raises NotecaseError for a bad first frame, and as `watch` does."""
        return self._follow(self._begun(tenant, requests), write, requests)

    async def _begun(self, tenant: str, requests: AsyncIterator[v1.RunRequest]) -> Opened:
        """Carries out the first frame of a Run stream."""
        first = await anext(requests, None)
        kind = first.WhichOneof("command") if first is not None else None
        if first is None or kind not in {"start", "attach"}:
            raise errors.invalid([Violation("command", "the first frame must be start or attach")])
        if kind == "attach":
            attach = first.attach
            after = attach.after_sequence if attach.HasField("after_sequence") else None
            return await self.attach(tenant, attach.name, after, attach.options, attach.if_session_uid, "attach.")
        check = Check()
        if first.command_id:
            check.token_id("command_id", first.command_id)
        validate.start(check, "start", first.start)
        await check.settled()
        user = caller.get().user
        started = await self._runs.admission.start(tenant, claimed(first.start, user), await _caused(first), user)
        return await self._started(started, first.start.options)

    def watch(
        self, tenant: str, name: str, after: int | None, options: v1.WatchOptions, if_session_uid: str, write: Write
    ) -> Awaitable[None]:
        """The WatchEvents RPC. Raises NotecaseError: SESSION_NOT_FOUND, RUN_NOT_FOUND, SEQUENCE_AHEAD, and
        SERVER_DRAINING when the server stops."""
        return self._follow(self.attach(tenant, name, after, options, if_session_uid), write)

    async def attach(
        self,
        tenant: str,
        name: str,
        after: int | None,
        options: v1.WatchOptions,
        if_session_uid: str,
        field: str = "",
    ) -> Opened:
        check = Check()
        session_id, run_id = validate.watch(check, field, name, after or 0, options, if_session_uid)
        check.done()
        key, session = await self._sessions.find(tenant, session_id, if_session_uid, caller.get().user)
        live = self._sessions.seen(key, session)
        if after is not None and after > session.last_sequence:
            raise errors.sequence_ahead(after, session.last_sequence)
        followed = run_id or session.active_run
        row = await self._sessions.store.get_run(key, followed) if followed else None
        if row is None and run_id:
            raise errors.not_found("run", name)
        run = row[0] if row else None
        if after is None:
            after = run.first_sequence - 1 if run and run_id else session.last_sequence
        attached = v1.Attached(
            session=names.session(session_id),
            session_uid=key.uid,
            user=session.user,
            run=names.render_run(key.session, run) if run else None,
            last_sequence=session.last_sequence,
            existing=run is not None,
        )
        cursor = Cursor(live, self._sessions.store, after, session.last_sequence, options, self._pace, followed)
        if run and run.state in ENDED and after >= run.last_sequence and not options.keep_open:
            cursor.finished = True
        commanded = run_id if options.keep_open else followed
        return Attachment(live, cursor, commanded), v1.RunResponse(attached=attached)

    async def _started(self, started: Started, options: v1.WatchOptions) -> Opened:
        run = started.run
        if started.session is None:
            live, session = await self._sessions.watched(started.key)
            head = session.last_sequence
        else:
            live = self._sessions.seen(started.key, started.session)
            head = run.last_sequence  # the run may be ahead already; its later events are new to this stream
        frame = v1.RunResponse()
        attached = frame.attached
        attached.session, attached.session_uid = names.session(started.key.session), started.key.uid
        attached.user, attached.last_sequence, attached.existing = live.user, head, started.existing
        followed, after = run.name, run.first_sequence - 1
        attached.run.CopyFrom(names.render_run(started.key.session, run))
        cursor = Cursor(live, self._sessions.store, after, head, options, self._pace, followed)
        return Attachment(live, cursor, followed), frame

    async def _follow(
        self, attaching: Awaitable[Opened], write: Write, requests: AsyncIterator[v1.RunRequest] | None = None
    ) -> None:
        """Writes the frames of a stream; the commands in `requests` are carried out meanwhile."""
        attachment, attached = await attaching
        results, reader = Results(), None
        if requests is not None:
            reader = self._supervisor.start(self.read(attachment, requests, results), "commands")
        live, cursor = attachment.live, attachment.cursor
        bound = caller.get().principal.user != ""
        announced = False

        def woken() -> bool:
            leaving = self.drain.closing or (self.drain.grace is not None and not announced)
            return bool(results.waiting) or leaving or results.broken is not None

        live.join()
        try:
            await write(attached)
            del attached  # it takes more memory than all else here that an idle stream keeps
            while True:
                while results.waiting:
                    await write(v1.RunResponse(result=results.take()))
                if results.broken is not None:
                    raise results.broken
                if self.drain.grace is not None and not announced:
                    announced = True
                    await write(v1.RunResponse(go_away=_go_away(cursor.sequence, self.drain.grace)))
                frame = await cursor.next(woken)
                if frame is not None:
                    await write(_shown(frame) if bound else frame)
                    del frame
                elif not (woken() or cursor.finished):
                    await write(v1.RunResponse(heartbeat=v1.Heartbeat(last_sequence=cursor.sequence)))
                if cursor.finished:
                    break
                if self.drain.closing:
                    raise errors.draining()
            while results.waiting:
                await write(v1.RunResponse(result=results.take()))
        finally:
            live.leave()
            if reader is not None:
                reader.cancel()

    async def read(self, attachment: Attachment, requests: AsyncIterator[v1.RunRequest], results: Results) -> None:
        """Carries out commands in their order. Their results wait for their reader, and the next command for them."""
        try:
            async for frame in requests:
                await results.put(await self._carry_out(attachment, frame))
                attachment.live.ring()
        except Exception as error:  # noqa: BLE001 - the stream raises it
            results.broken = error
        finally:
            attachment.live.ring()

    async def _carry_out(self, attachment: Attachment, frame: v1.RunRequest) -> v1.CommandResult:
        try:
            check = Check()
            self.check(check, attachment.live.key.session, frame)
            await check.settled()
            result = await self.command(attachment.live.key, frame, attachment.run)
            if frame.HasField("start"):
                attachment.run = ""  # the run before it may be under way still, or its turn may have come
            return result
        except NotecaseError as error:
            if error.reason == v1.ERROR_REASON_INTERNAL:
                raise
            self._refusals.note(error)
            return v1.CommandResult(
                command_id=frame.command_id,
                disposition=v1.CommandResult.DISPOSITION_REFUSED,
                error=error.to_proto(),
            )

    def check(self, check: Check, session: str, frame: v1.RunRequest) -> None:
        """Reports to the check the mistakes of a command in the session of that id."""
        check.token_id("command_id", frame.command_id)
        if frame.HasField("start"):
            validate.start(check, "start", frame.start)
            if session:
                same = frame.start.session == names.session(session)
                check(same, "start.session", f"this is {names.session(session)}; name it")
        else:
            validate.command(check, frame)

    async def command(self, key: SessionKey, frame: v1.RunRequest, run_id: str = "") -> v1.CommandResult:
        """Carries out one command in a session, which `check` found right; `run_id` is the run that is meant, "" the
        active one. A refusal is raised as NotecaseError."""
        kind = frame.WhichOneof("command")
        who = caller.get()
        caused, approver = await _caused(frame), rights.approver(who.principal)
        try:
            match kind:
                case "start":
                    start = deepcopy(claimed(frame.start, who.user))
                    start.if_session_uid = start.if_session_uid or key.uid
                    started = await self._runs.admission.start(key.tenant, start, caused, who.user)
                    done = DUPLICATE if started.existing else _accepted(started.run.state == v1.Run.STATE_QUEUED)
                    return _result(frame, started.run.first_sequence, done)
                case "input":
                    committed, queued = await self._runs.commands.say(key, run_id, frame.input, caused, approver)
                    return _result(frame, committed.session.last_sequence, _accepted(queued))
                case "tool_result":
                    committed = await self._runs.commands.tool_result(key, run_id, frame.tool_result, caused)
                case "input_response":
                    committed = await self._runs.commands.respond(key, run_id, frame.input_response, caused, approver)
                case "cancel":
                    committed = await self._runs.commands.cancel(key, run_id, frame.cancel, caused, approver)
                    if frame.cancel.mode == v1.CancelCommand.MODE_AFTER_TURN and not frame.cancel.call_id:
                        ended = any(run.state in ENDED for run in committed.runs.values())
                        return _result(frame, committed.session.last_sequence, _accepted(queued=not ended))
                case _:
                    committed = await self._update_state(key, frame)
            return _result(frame, committed.session.last_sequence)
        except Duplicate as duplicate:
            return _result(frame, duplicate.sequence, DUPLICATE)

    async def _update_state(self, key: SessionKey, frame: v1.RunRequest) -> Committed:
        update = frame.update_state
        live, session = await self._sessions.watched(key)
        state = ""
        if update.name:
            check = Check()
            scope = check.state("update_state.name", key.tenant, update.name)
            owner = {"session": key.session, "user": session.user.removeprefix("users/"), "app": ""}[scope.kind]
            problem = "must be the state of this session, of its user, or app/state"
            check(scope.id == owner, "update_state.name", problem)
            check.done()
            state = "" if scope.kind == "session" else scope.kind
        change = v1.Event(cause_id=frame.command_id, state_changed=v1.StateChanged(state=state, ops=update.ops))
        return await live.commit(
            Commit(
                key=key,
                command=await _command_id(frame) if frame.command_id else None,
                if_state_version={state: update.if_version} if update.HasField("if_version") else {},
                events=[change],
                principal=caller.get().principal_name,
            )
        )


def claimed(start: v1.StartRun, user: str) -> v1.StartRun:
    """A start whose new session, if it makes one, is of the user that the caller is bound to, "" for none."""
    if user and not start.session:
        start.new_session.user = user
    return start


def _go_away(sequence: int, grace: float) -> v1.GoAway:
    away = v1.GoAway(sequence=sequence, reason="The server is stopping; attach again shortly.")
    away.time_left.FromMilliseconds(round(grace * 1000))
    return away


def _shown(frame: v1.RunResponse) -> v1.RunResponse:
    """Removes from a batch the events that a caller who is bound to a user may not see: the state of the whole
    tenant."""
    events = frame.batch.events
    for index in range(len(events) - 1, -1, -1):
        if not events[index].sequence and events[index].state_changed.state == "app/state":
            del events[index]
    return frame


async def _command_id(frame: v1.RunRequest) -> CommandId:
    return CommandId(frame.command_id, await digest_of(frame.SerializeToString(deterministic=True)))


async def _caused(frame: v1.RunRequest) -> Caused:
    who = caller.get()
    command = await _command_id(frame) if frame.command_id else None
    audit = who.audit() if frame.HasField("input_response") else None
    return Caused(frame.command_id, None, command, who.principal_name, audit)


def _accepted(queued: bool) -> Disposition:
    return v1.CommandResult.DISPOSITION_QUEUED if queued else APPLIED


def _result(frame: v1.RunRequest, sequence: int, disposition: Disposition = APPLIED) -> v1.CommandResult:
    return v1.CommandResult(command_id=frame.command_id, disposition=disposition, sequence=sequence)
