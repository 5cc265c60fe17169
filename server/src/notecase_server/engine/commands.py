"""Carries out callers' commands to an active run: results, answers, input, cancels. Also waits for the run's end."""

import asyncio
from collections.abc import Iterable, Sequence
from copy import deepcopy
from itertools import islice
from typing import TypeAlias

from notecase import v1

from notecase_server import errors, names
from notecase_server.engine import ledger, results
from notecase_server.engine.caused import NOBODY, Caused
from notecase_server.engine.content import MAX_MESSAGE_BYTES
from notecase_server.engine.halt import Halt
from notecase_server.engine.opening import incoming
from notecase_server.engine.roster import QUEUED, Roster
from notecase_server.engine.run_log import WAITING, RunLog
from notecase_server.engine.services import Services
from notecase_server.engine.sessions import Sessions
from notecase_server.errors import NotecaseError, Violation
from notecase_server.store.contract import Commit, Committed, RunRecord, SessionKey
from notecase_server.store.fold import ENDED
from notecase_server.tools.contract import Outcome

Approver: TypeAlias = "v1.Tool.Approver.ValueType"
"""As which approver the caller counts: see ledger.RANKS."""


class Commands:
    """Carries out the commands of one process, each to its end although its caller goes away."""

    def __init__(self, sessions: Sessions, services: Services, roster: Roster, poll_seconds: float) -> None:
        self._sessions = sessions
        self._services = services
        self._store = services.store
        self._roster = roster
        self._whole = services.supervisor.whole
        self._poll_seconds = poll_seconds

    # ---- answers

    async def tool_result(self, key: SessionKey, run_id: str, result: v1.ToolResult, caused: Caused) -> Committed:
        """Gives a dispatched call its outcome. Raises CALL_NOT_PENDING when the call waits for none, whatever its run
        does by now."""
        return await self._whole(self._tool_result(key, run_id, result, caused))

    async def _tool_result(self, key: SessionKey, run_id: str, result: v1.ToolResult, caused: Caused) -> Committed:
        late = errors.call_not_pending(result.call_id)
        async with self._roster.worker(key, run_id, caused, late) as worker:
            for call in worker.log.run.pending_calls:
                if call.call_id == result.call_id:
                    outcome = await self._outcome(worker.log, result.result, result.error)
                    return await worker.log.command([ledger.finished(call, outcome)], caused)
            raise late

    async def respond(
        self, key: SessionKey, run_id: str, response: v1.InputResponse, caused: Caused, approver: Approver
    ) -> Committed:
        """Answers an approval or a question. Raises INPUT_NOT_PENDING when the input is not open (any more), whatever
        the state of the run, and ROLE_MISSING when the caller may not answer it."""
        return await self._whole(self._respond(key, run_id, response, caused, approver))

    async def _respond(
        self, key: SessionKey, run_id: str, response: v1.InputResponse, caused: Caused, approver: Approver
    ) -> Committed:
        late = errors.input_not_pending(response.input_id)
        checked = response.decision != ledger.ANSWER
        while True:
            async with self._roster.worker(key, run_id, caused, late) as worker:
                asked = [each for each in worker.log.run.pending_inputs if each.input_id == response.input_id]
                if not asked:
                    raise late
                (request,) = asked
                if (refused := ledger.refusal(asked, approver, "input_response.input_id")) is not None:
                    raise refused
                _check_decision(request, response)
                caused = _told(caused, names.run(key.session, worker.log.run.name), request, response)
                if checked or not request.schema:
                    call = worker.log.call(request.call.call_id)
                    _check_edit(worker.log.message, call, response)
                    answer = None
                    if response.decision == ledger.ANSWER and not ledger.asked_by_tool(request):
                        answer = await self._outcome(worker.log, [v1.Part(text=response.answer)])
                    return await worker.log.command(ledger.answered(request, response, call, answer), caused)
            # Another process judges, and the session is not held up meanwhile; what is asked under an id never changes.
            await self._services.schemas.require_valid("input_response.answer", request.schema, response.answer)
            checked = True

    async def _outcome(self, run_log: RunLog, parts: Sequence[v1.Part], error: str = "") -> Outcome:
        """What a caller says as the result of a call, as it fits into the message that holds the call."""
        live, message = run_log.live, run_log.message
        held = await results.kept(self._services.contents, live.key, message, parts, of_run=False)
        return results.fitting(run_log.message, Outcome(held, error))

    # ---- input

    async def say(
        self, key: SessionKey, run_id: str, said: v1.UserInput, caused: Caused, approver: Approver
    ) -> tuple[Committed, bool]:
        """Commits a user's input to an active run. Returns the commit, and whether it only queued the input. While an
        approval is open that the caller may not answer, the input denies nothing and is queued behind it.

        Raises RUN_ENDED and QUEUE_FULL, and ROLE_MISSING for an interrupt that would withdraw such an approval."""
        return await self._whole(self._say(key, run_id, said, caused, approver))

    async def _say(
        self, key: SessionKey, run_id: str, said: v1.UserInput, caused: Caused, approver: Approver
    ) -> tuple[Committed, bool]:
        async with self._roster.worker(key, run_id, caused) as worker:
            run_log = worker.log
            refused = ledger.refusal(run_log.run.pending_inputs, approver, "input")
            if refused is not None and said.when == v1.UserInput.WHEN_INTERRUPT:
                raise refused
            kept = await self._services.contents.kept(key, said.messages)
            messages = incoming(self._services.new_id, kept, run_log.live.user)
            added = [v1.Event(message_added=message, cause_id=caused.cause_id) for message in messages]
            if said.when == v1.UserInput.WHEN_INTERRUPT:
                halt = Halt(
                    said=added,
                    by=approver,
                    reason="The user interrupted.",
                    caused=caused,
                )
                self._roster.halt(worker, halt)
            else:
                denied: list[v1.Event] = []
                if refused is None and run_log.run.state == WAITING and not run_log.run.pending_calls:
                    denied = ledger.withdrawn(run_log.run, run_log.message, words([said]), deny=True)
                    if not ledger.left_open(run_log.message, denied):
                        return await run_log.command([*denied, *added], caused), False
                event = v1.Event(cause_id=caused.cause_id or self._services.new_id())
                event.command_queued.approver = approver
                event.command_queued.input.CopyFrom(said)
                if refused is not None:
                    event.command_queued.input.when = v1.UserInput.WHEN_FOLLOW_UP
                del event.command_queued.input.messages[:]
                event.command_queued.input.messages.extend(messages)
                return await run_log.command([event, *denied], caused), True
        return await self._halted(key, halt), False

    # ---- cancels

    async def cancel(
        self,
        key: SessionKey,
        run_id: str,
        cancel: v1.CancelCommand,
        caused: Caused = NOBODY,
        approver: Approver = v1.Tool.APPROVER_ADMIN,
    ) -> Committed:
        """Stops a run, "" the session's active one, or one of its calls; returns the commit that made it durable.

        Raises Replayed and Duplicate for a repeat, and NotecaseError: SESSION_NOT_FOUND; RUN_NOT_FOUND and RUN_ENDED;
        for a call CALL_NOT_PENDING when it is not open, whatever its run does by now, and ROLE_MISSING when it waits
        for another approver than the caller counts as."""
        return await self._whole(self._cancel(key, run_id, cancel, caused, approver))

    async def _cancel(
        self, key: SessionKey, run_id: str, cancel: v1.CancelCommand, caused: Caused, approver: Approver
    ) -> Committed:
        if run_id and not cancel.call_id and (queued := await self._cancel_queued(key, run_id, cancel, caused)):
            return queued
        late = errors.call_not_pending(cancel.call_id) if cancel.call_id else None
        async with self._roster.worker(key, run_id, caused, late) as worker:
            if cancel.call_id:
                call = worker.log.call(cancel.call_id)
                asked = [each for each in worker.log.run.pending_inputs if each.call.call_id == cancel.call_id]
                if (refused := ledger.refusal(asked, approver, "cancel.call_id")) is not None:
                    raise refused
                committed = await worker.log.command(ledger.dropped(worker.log.run, call, cancel.reason), caused)
                worker.stop_call(call.call_id)
                return committed
            if cancel.mode == v1.CancelCommand.MODE_AFTER_TURN:
                return await worker.log.command(_after_turn(worker.log, cancel), caused)
            halt = Halt(reason=cancel.reason, cause_id=caused.cause_id, caused=caused)
            self._roster.halt(worker, halt)
        return await self._halted(key, halt)

    async def _halted(self, key: SessionKey, halt: Halt) -> Committed:
        try:
            return await halt.done
        except NotecaseError as error:
            if error.reason == v1.ERROR_REASON_RUN_ENDED:  # by a repeat of this very command, perhaps
                await self._store.recall(halt.caused.once)
                await self._store.recall_command(key, halt.caused.command)
            raise

    async def _cancel_queued(
        self, key: SessionKey, run_id: str, cancel: v1.CancelCommand, caused: Caused
    ) -> Committed | None:
        """Ends a run that has not begun; None when there is no such run."""
        async with self._sessions.live(key).held():
            active = await self._store.active_run(key, run_id)
            if active is None or active.run.state != QUEUED:
                return None
            return await self._cancel_run(key, run_id, cancel, caused)

    async def cancel_unstarted(
        self, key: SessionKey, run_id: str, cancel: v1.CancelCommand, caused: Caused, approver: Approver
    ) -> Committed:
        """Puts the end of a run on record whose start has not arrived; one that has just arrived is cancelled as by
        `cancel`. Raises SESSION_NOT_FOUND."""
        try:
            return await self._cancel_run(key, run_id, cancel, caused, RunRecord(b"", v1.Agent()))
        except NotecaseError as error:
            if error.reason != v1.ERROR_REASON_ALREADY_EXISTS:
                raise
        return await self.cancel(key, run_id, cancel, caused, approver)

    async def _cancel_run(
        self, key: SessionKey, run_id: str, cancel: v1.CancelCommand, caused: Caused, start: RunRecord | None = None
    ) -> Committed:
        change = v1.RunStateChanged(state=v1.Run.STATE_CANCELLED, reason=cancel.reason)
        event = v1.Event(run=run_id, cause_id=caused.cause_id, run_state_changed=change)
        return await self._sessions.live(key).commit(
            Commit(
                key=key,
                once=caused.once,
                command=caused.command,
                events=[event],
                principal=caused.principal,
                start=start,
            )
        )

    # ---- waiting

    async def wait(self, key: SessionKey, run_id: str, seconds: float | None, after: int = 0) -> v1.Run:
        """Returns the run once it has ended or waits, or as it is after that many seconds. A wait that began by
        sequence `after` does not count. Raises NotecaseError RUN_NOT_FOUND, and SESSION_NOT_FOUND once the session is
        deleted."""
        live = self._sessions.live(key)
        loop = asyncio.get_running_loop()
        until = None if seconds is None else loop.time() + seconds
        while True:
            seen = live.head  # the session's, which others move too
            row = await self._store.get_run(key, run_id)
            if live.deleted:
                raise errors.not_found("session", names.session(key.session))
            if row is None:
                raise errors.not_found("run", names.run(key.session, run_id))
            left = self._poll_seconds if until is None else min(self._poll_seconds, until - loop.time())
            rests = row[0].state in ENDED or (row[0].state == WAITING and row[0].last_sequence > after)
            if rests or left <= 0:
                return row[0]
            while live.head <= seen and left > 0 and not live.deleted:
                before = loop.time()
                await live.soon.wait(left)
                left -= loop.time() - before


def _after_turn(run_log: RunLog, cancel: v1.CancelCommand) -> list[v1.Event]:
    """The events by which the run ends after its turn: at once, when nothing of the turn is left."""
    queued = v1.Event()
    queued.command_queued.cancel.CopyFrom(cancel)
    events = [queued, *ledger.withdrawn(run_log.run, run_log.message, cancel.reason)]
    if run_log.run.state == WAITING and not ledger.left_open(run_log.message, events):
        events.append(run_log.ending(v1.Run.STATE_CANCELLED, reason=cancel.reason))
    return events


def _check_decision(request: v1.InputRequest, response: v1.InputResponse) -> None:
    kinds = {
        v1.InputRequest.KIND_APPROVAL: {ledger.APPROVE, ledger.DENY},
        v1.InputRequest.KIND_QUESTION: {ledger.ANSWER, ledger.DENY},
        v1.InputRequest.KIND_INTERRUPTED_CALL: {ledger.APPROVE, ledger.DENY, ledger.ANSWER},
    }
    allowed = kinds[request.kind] | ({ledger.CANCEL} if ledger.asked_by_tool(request) else set())
    if response.decision not in allowed:
        told = " or ".join(sorted(v1.InputResponse.Decision.Name(decision) for decision in allowed))
        raise errors.invalid([Violation("input_response.decision", f"this asks for {told}")])


def _check_edit(message: v1.Message | None, call: v1.ToolCall, response: v1.InputResponse) -> None:
    """PAYLOAD_TOO_LARGE for arguments with which the reply would no longer fit into a page."""
    if response.edited_arguments and message is not None:
        more = len(response.edited_arguments.encode()) - len(call.arguments.encode())
        if more > 0 and (size := message.ByteSize() + more) > MAX_MESSAGE_BYTES:
            raise errors.too_large("The reply with the edited arguments", size, MAX_MESSAGE_BYTES)


def _told(caused: Caused, run: str, request: v1.InputRequest, response: v1.InputResponse) -> Caused:
    """Says in the audit what of which run is answered, and how. Answers to questions are not in it."""
    if caused.audit is None or request.kind == v1.InputRequest.KIND_QUESTION:
        return caused._replace(audit=None)
    entry = deepcopy(caused.audit.entry)
    entry.resource, entry.input_id = run, response.input_id
    entry.outcome = v1.InputResponse.Decision.Name(response.decision).removeprefix("DECISION_")
    return caused._replace(audit=caused.audit._replace(entry=entry))


def words(said: Iterable[v1.UserInput]) -> str:
    """Returns the beginning of the users' text, as the reason for the approvals that it denies."""
    most = ledger.MAX_REASON_BYTES
    texts = (part.text[:most] for each in said for message in each.messages for part in message.parts if part.text)
    return " ".join(islice(texts, most))
