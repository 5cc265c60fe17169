"""StateService: parse, call, render."""

import asyncio
from collections.abc import Sequence
from typing import Any

from notecase import v1

from notecase_server import errors
from notecase_server.auth import rights
from notecase_server.rpc import validate
from notecase_server.rpc.caller import caller, frame_bytes
from notecase_server.rpc.check import Check
from notecase_server.rpc.desk import LARGE_BYTES, Desk, checked, listed, once
from notecase_server.rpc.pages import MAX_PAGE_SIZE
from notecase_server.store import answers
from notecase_server.store.contract import PAGE_BYTES, Answer, Once, Scope, SessionKey, StateStore


class States(v1.StateServiceServicer):
    def __init__(self, desk: Desk, store: StateStore) -> None:
        self.desk = desk
        self.store = store

    async def GetState(self, request: v1.GetStateRequest, context: Any) -> v1.GetStateResponse:
        check = Check()
        scope = check.state("name", caller.get().tenant, request.name)
        _require_own(check, scope)
        check(len(request.keys) <= MAX_PAGE_SIZE, "keys", f"has more than {MAX_PAGE_SIZE} keys")
        at = request.at_sequence
        check(at >= 0, "at_sequence", "is negative")
        check(
            not at or scope.kind == "session",
            "at_sequence",
            "is allowed only for a session's state; others have no log",
        )
        keys = sorted(set(request.keys[:MAX_PAGE_SIZE]))
        state_key = await self._parent(check, scope)
        about = ("state", scope.tenant, scope.kind, state_key.id, str(at), *(repr(key) for key in keys))
        query = listed(check, self.desk.pages, request, *about)
        async with self.desk.patiently(heavy=bool(at)):
            state, page = await self.store.list_state(state_key, query, at, keys)
        token = self.desk.pages.token(page.next, *about)
        answer = v1.GetStateResponse(
            name=request.name, entries=state.entries, version=state.version, next_page_token=token
        )
        if page.size > LARGE_BYTES:
            await asyncio.sleep(0)  # it is serialised in another step
        return answer

    async def PutState(self, request: v1.PutStateRequest, context: Any) -> v1.StateEntry:
        check = checked(request)
        scope = check.state("name", caller.get().tenant, request.name)
        _require_right(check, scope)
        check.key("key", request.key, scope.kind == "session")
        if check(request.value.ByteSize() <= PAGE_BYTES, "value", f"is larger than {PAGE_BYTES} bytes"):
            check.value("value", request.value)
        await check.settled()
        op = v1.StateOp(key=request.key, set=request.value)
        if request.HasField("if_version"):
            op.if_version = request.if_version
        answer = Answer("entry", request.key)
        made: v1.StateEntry = await self._update(scope, [op], None, request, answer)
        return made

    async def UpdateState(self, request: v1.UpdateStateRequest, context: Any) -> v1.State:
        check = checked(request)
        scope = check.state("name", caller.get().tenant, request.name)
        _require_right(check, scope)
        validate.ops(check, "ops", request.ops, scope.kind == "session")
        await check.settled()
        if_version = request.if_version if request.HasField("if_version") else None
        answer = Answer("state", request.name)
        made: v1.State = await self._update(scope, request.ops, if_version, request, answer)
        return made

    async def _parent(self, check: Check, scope: Scope) -> Scope:
        return (await self.desk.parent(check, scope.id)).state if scope.kind == "session" else scope

    async def _found(self, scope: Scope, repeat: Once | None = None) -> tuple[SessionKey | None, Scope]:
        """Returns the scope of a state in the store: a session's has the session's uid. Raises NotecaseError
        SESSION_NOT_FOUND."""
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
        repeat = await once(request, answer)
        key, scope = await self._found(scope, repeat)
        record = repeat if key else self.desk.sessions.record(repeat, scope.tenant, answer)
        async with self.desk.patiently(heavy=frame_bytes.get() > LARGE_BYTES):
            made = await self.desk.sessions.update_state(
                key, scope, ops, if_version, record, request.request_id, caller.get().principal_name
            )
        # The answer may have a page of values: it is made and serialised in steps of their own.
        await asyncio.sleep(0)
        changed = answers.of(answer, made)
        await asyncio.sleep(0)
        return changed


def _require_own(check: Check, scope: Scope) -> None:
    """A caller that is bound to a user has no more to do with `app/state` than others with what needs a role, and other
    users are not there for it: USER_NOT_FOUND."""
    bound = caller.get().principal.user
    if bound and scope.kind == "user" and scope.id != bound:
        raise errors.not_found("user", f"users/{scope.id}")
    check.own(not (bound and scope.kind == "app"), "name")


def _require_right(check: Check, scope: Scope) -> None:
    _require_own(check, scope)
    if scope.kind == "app":
        check.needs(rights.APP_STATE, "name")
