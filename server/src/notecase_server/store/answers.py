"""What a write is answered: made from its result in one place, for the caller and for the record of the request.

Pure, and part of the write's own transaction: a repeat is then answered in the very words of the first time.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from notecase import v1

from notecase_server import names
from notecase_server.store.contract import PAGE_BYTES, Answer, Committed

Result = Committed | v1.Session | v1.State | v1.Agent | v1.Key | v1.Tenant | None
"""What writes return: a commit, a session that was edited or imported, a user's or the app's state, an agent, a key, a
tenant; None for a deletion."""


def of(answer: Answer, result: Result) -> Any:
    """The answer, a message with whole names. What it is made from is not changed."""
    return _ANSWERS[answer.kind](answer, result)


def _nothing(answer: Answer, result: Result) -> Empty:
    return Empty()


def _session(answer: Answer, result: Result) -> v1.Session:
    row = result.session if isinstance(result, Committed) else result
    assert isinstance(row, v1.Session)
    return names.render_session(deepcopy(row))


def _run(answer: Answer, result: Result) -> v1.Run:
    assert isinstance(result, Committed)
    return names.render_run(result.session.name, deepcopy(result.runs[answer.name]))


def _started(answer: Answer, result: Result) -> v1.Run:
    """The run that a start made or queued, where it may have ended another one."""
    assert isinstance(result, Committed)
    (run,) = [
        event.run for event in result.events if event.HasField("run_started") or event.command_queued.HasField("start")
    ]
    return _run(Answer("run", run), result)


def _entry(answer: Answer, result: Result) -> v1.StateEntry:
    return _written(result).entries[answer.name]


def _state(answer: Answer, result: Result) -> v1.State:
    """The state by its whole name. Once the entries hold a page, the others come without their values."""
    written, size = _written(result), 0
    state = v1.State(name=answer.name, version=written.version)
    for key in sorted(written.entries):
        entry, shown = written.entries[key], state.entries[key]
        if size < PAGE_BYTES:
            shown.CopyFrom(entry)
            size += len(key) + entry.ByteSize()
        else:
            shown.version = entry.version
            shown.update_time.CopyFrom(entry.update_time)
    return state


def _messages(answer: Answer, result: Result) -> v1.AppendMessagesResponse:
    assert isinstance(result, Committed)
    added = [
        names.render_message(result.session.name, deepcopy(event.message_added))
        for event in result.events
        if event.HasField("message_added")
    ]
    return v1.AppendMessagesResponse(messages=added, last_sequence=result.events[-1].sequence)


def _agent(answer: Answer, result: Result) -> v1.Agent:
    assert isinstance(result, v1.Agent)
    return deepcopy(result)


def _erased(answer: Answer, result: Result) -> v1.EraseUserResponse:
    return v1.EraseUserResponse(sessions_deleted=answer.erased)


def _made_key(answer: Answer, result: Result) -> v1.CreateKeyResponse:
    """Without the secret, which is kept nowhere."""
    assert isinstance(result, v1.Key)
    return v1.CreateKeyResponse(key=result)


def _tenant(answer: Answer, result: Result) -> v1.Tenant:
    assert isinstance(result, v1.Tenant)
    return result


def _rotated_key(answer: Answer, result: Result) -> v1.RotateKeyResponse:
    assert isinstance(result, v1.Key)
    return v1.RotateKeyResponse(key=result)


def _written(result: Result) -> v1.State:
    """The one state that a write of state changed."""
    if isinstance(result, Committed):
        (state,) = result.state.values()
        return state
    assert isinstance(result, v1.State)
    return result


_ANSWERS: Mapping[str, Callable[[Answer, Result], Message]] = {
    "nothing": _nothing,
    "session": _session,
    "run": _run,
    "started": _started,
    "entry": _entry,
    "state": _state,
    "messages": _messages,
    "agent": _agent,
    "erased": _erased,
    "made_key": _made_key,
    "rotated_key": _rotated_key,
    "tenant": _tenant,
}
