"""Commits in few words, for tests that speak of stores."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import pytest
from notecase import v1
from notecase_server.errors import NotecaseError, reason_name
from notecase_server.store.contract import (
    Answer,
    Commit,
    Committed,
    Once,
    Query,
    RunRecord,
    Scope,
    SessionEdit,
    SessionKey,
    Store,
)


def session_key(tenant: str, session: str) -> SessionKey:
    """A session whose uid follows from its name."""
    return SessionKey(tenant, session, str(uuid5(NAMESPACE_OID, session)))


def reborn(key: SessionKey) -> SessionKey:
    """Another session of the same name, for when the first is gone."""
    return key._replace(uid=str(uuid5(NAMESPACE_OID, key.uid)))


KEY = session_key("acme", "case")
STATE = KEY.state
USER_STATE = Scope("acme", "user", "ada")
APP_STATE = Scope("acme", "app", "")
EVERYTHING = Query(1000)
SESSION = Answer("session")
NOTHING = Answer("nothing")

AGENT = v1.Agent(name="agents/sherlock", llm=v1.LlmAgent(instruction="Deduce."))
RECORD = RunRecord(b"digest", AGENT)
LENS = v1.ToolBinding(digest=b"\x01" * 32, function="lens")
"""What calls of the tool "lens" are bound to."""


class ManualClock:
    """Advances only when the test says so."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000_000

    def __call__(self) -> int:
        return self.now


@contextmanager
def refused(reason: str) -> Iterator[pytest.ExceptionInfo[NotecaseError]]:
    """The block must raise a NotecaseError of that reason."""
    with pytest.raises(NotecaseError) as caught:
        yield caught
    assert reason_name(caught.value.reason) == reason


def value(plain: object) -> v1.Value:
    match plain:
        case bool():
            return v1.Value(bool_value=plain)
        case int():
            return v1.Value(int_value=plain)
        case str():
            return v1.Value(string_value=plain)
        case list():
            return v1.Value(list_value=v1.ValueList(values=[value(each) for each in plain]))
    raise TypeError(plain)


def plain(stored: v1.Value) -> object:
    """The opposite of `value`."""
    kind = stored.WhichOneof("kind")
    if kind == "list_value":
        return [plain(each) for each in stored.list_value.values]
    return getattr(stored, str(kind))


def put(key: str, what: object, if_version: int | None = None) -> v1.StateOp:
    return v1.StateOp(key=key, set=value(what), if_version=if_version)


def increment(key: str, by: int) -> v1.StateOp:
    return v1.StateOp(key=key, increment=by)


def append(key: str, what: object) -> v1.StateOp:
    return v1.StateOp(key=key, append=value(what))


def remove(key: str, if_version: int | None = None) -> v1.StateOp:
    op = v1.StateOp(key=key, if_version=if_version)
    op.remove.SetInParent()
    return op


def changed(*ops: v1.StateOp, state: str = "") -> v1.Event:
    return v1.Event(state_changed=v1.StateChanged(state=state, ops=ops))


def said(name: str, text: str = "hello", run: str = "") -> v1.Event:
    message = v1.Message(
        name=name,
        run=run,
        role=v1.Message.ROLE_USER,
        status=v1.Message.STATUS_COMPLETED,
        parts=[v1.Part(text=text)],
    )
    return v1.Event(run=run, message_added=message)


def replied(name: str, run: str, text: str = "elementary") -> v1.Event:
    event = said(name, text, run)
    event.message_added.role = v1.Message.ROLE_ASSISTANT
    return event


def called(name: str, run: str, *call_ids: str) -> v1.Event:
    """A reply that asks for tools."""
    event = replied(name, run)
    event.message_added.status = v1.Message.STATUS_IN_PROGRESS
    for call_id in call_ids:
        event.message_added.parts.add().tool_call.CopyFrom(
            v1.ToolCall(call_id=call_id, tool="lens", outcome=v1.ToolCall.OUTCOME_PENDING)
        )
    return event


def finished(call_id: str, run: str) -> v1.Event:
    outcome = v1.ToolCall(call_id=call_id, tool="lens", outcome=v1.ToolCall.OUTCOME_FAILED, error="broken")
    return v1.Event(run=run, tool_finished=outcome)


def dispatched(call_id: str, run: str, client: bool = True) -> v1.Event:
    outcome = v1.ToolCall.OUTCOME_RUNNING
    call = v1.ToolCall(call_id=call_id, tool="lens", outcome=outcome, client_executed=client, attempt=1)
    return v1.Event(run=run, tool_started=call)


def asked(
    input_id: str, call_id: str, run: str, kind: v1.InputRequest.Kind.ValueType = v1.InputRequest.KIND_APPROVAL
) -> v1.Event:
    call = v1.ToolCall(call_id=call_id, tool="lens", binding=LENS)
    return v1.Event(run=run, input_requested=v1.InputRequest(input_id=input_id, kind=kind, call=call))


def answered(
    input_id: str,
    run: str,
    decision: v1.InputResponse.Decision.ValueType = v1.InputResponse.DECISION_APPROVE,
    remember: v1.InputResponse.Remember.ValueType = v1.InputResponse.REMEMBER_ONCE,
) -> v1.Event:
    response = v1.InputResponse(input_id=input_id, decision=decision, remember=remember)
    return v1.Event(run=run, input_resolved=v1.InputResolved(response=response))


def queued(command_id: str, run: str, text: str = "more") -> v1.Event:
    """What a user said to a run under way."""
    event = v1.Event(run=run, cause_id=command_id)
    event.command_queued.input.messages.add().parts.add().text = text
    return event


def queued_start(run: str, command_id: str = "") -> v1.Event:
    event = v1.Event(run=run, cause_id=command_id or run)
    event.command_queued.start.agent = AGENT.name
    return event


def taken(command_id: str, name: str, run: str) -> v1.Event:
    """What was queued becomes a message."""
    event = said(name, run=run)
    event.cause_id = command_id
    return event


def summarized(first: int, last: int, previous: int = 0, run: str = "") -> v1.Event:
    summary = v1.Summarized(first_sequence=first, last_sequence=last, text=f"up to {last}", previous=previous)
    return v1.Event(run=run, summarized=summary)


def rewound(to_sequence: int) -> v1.Event:
    return v1.Event(rewound=v1.Rewound(to_sequence=to_sequence))


def moved(run: str, state: v1.Run.State.ValueType) -> v1.Event:
    return v1.Event(run=run, run_state_changed=v1.RunStateChanged(state=state))


def used(run: str, model: str = "m", tokens: int = 1) -> v1.Event:
    return v1.Event(run=run, usage=v1.Usage(model=model, model_calls=1, input_tokens=tokens, output_tokens=2 * tokens))


def started(run: str, labels: Mapping[str, str] | None = None, agent: str = AGENT.name) -> v1.Event:
    return v1.Event(run=run, run_started=v1.RunStarted(agent=agent, agent_revision=1, labels=labels))


def ended(run: str, state: v1.Run.State.ValueType = v1.Run.STATE_SUCCEEDED) -> v1.Event:
    return v1.Event(run=run, run_state_changed=v1.RunStateChanged(state=state))


def once(
    request_id: str, answer: Answer = SESSION, digest: bytes = b"body", rpc: str = "Rpc", tenant: str = "acme"
) -> Once:
    return Once(tenant, "", rpc, request_id, digest, answer)


def edit(*, expiry: bool = False, **fields: Any) -> SessionEdit:
    """Sets these fields of a session; with `expiry`, when it expires to what they say of it."""
    return SessionEdit(() if expiry else tuple(fields), v1.Session(**fields), expiry)


async def create(store: Store, key: SessionKey = KEY, **fields: Any) -> Committed:
    """A session of users/ada, unless `fields` say otherwise."""
    return await store.commit(Commit(key=key, create=v1.Session(**{"user": "users/ada", **fields})))


async def add(store: Store, *events: v1.Event, key: SessionKey = KEY, **conditions: Any) -> Committed:
    return await store.commit(Commit(key=key, events=events, **conditions))


async def start(
    store: Store,
    run: str,
    *events: v1.Event,
    key: SessionKey = KEY,
    labels: Mapping[str, str] | None = None,
    agent: str = AGENT.name,
    **conditions: Any,
) -> Committed:
    """Starts a run as the engine does: claimed, in one commit with `events`."""
    return await add(store, started(run, labels, agent), *events, key=key, claim=True, start=RECORD, **conditions)


async def contents(store: Store, key: SessionKey = KEY) -> dict[str, Any]:
    """All that can be read of a session."""
    session = await store.get_session(key)
    user = session.user.removeprefix("users/") if session else ""
    scopes = [key.state, Scope(key.tenant, "user", user), Scope(key.tenant, "app", "")]
    return {
        "session": session,
        "events": await store.read_events(key, 0),
        "messages": (await store.list_messages(key, EVERYTHING)).rows,
        "runs": (await store.list_runs(key.tenant, key, EVERYTHING)).rows,
        "active": sorted(run.run.name for run in await store.active_runs() if run.key == key),
        "state": [(await store.list_state(scope, EVERYTHING))[0] for scope in scopes],
    }


def names(rows: Sequence[Any]) -> list[str]:
    return [row.name for row in rows]
