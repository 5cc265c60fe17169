"""What was stored before uids and bindings, as it is now: the one conversion of a file of the first schema and of an
export in the first format.

Events stay as they are, byte for byte. What was remembered of answers is dropped: it named only a tool, and an answer
holds for what a call is bound to. So a tool is asked about once more.
"""

from collections.abc import Iterable

from notecase import v1

from notecase_server.store import bindings
from notecase_server.store.fold import open_calls


def session(body: bytes, uid: str) -> v1.Session:
    """Returns a session's row."""
    made = v1.Session.FromString(body)
    made.DiscardUnknownFields()
    made.uid = uid
    return made


def run(body: bytes) -> v1.Run:
    """Returns the row of a run."""
    made = v1.Run.FromString(body)
    forget(made)
    return made


def forget(run: v1.Run) -> None:
    """Drops what a run remembered of answers."""
    run.DiscardUnknownFields()
    run.ClearField("remembered")


def bind_run(agent: v1.Agent, run: v1.Run) -> None:
    """Binds the calls that the row of a run shows. `agent` is the revision that the run began with."""
    _bind(agent, run, run.pending_calls)
    _bind(agent, run, (request.call for request in run.pending_inputs if request.HasField("call")))


def bind_message(agent: v1.Agent, run: v1.Run, message: v1.Message) -> bool:
    """Binds the open calls of a message of that run; says whether there are any."""
    calls = open_calls(message)
    _bind(agent, run, calls)
    return bool(calls)


def _bind(agent: v1.Agent, run: v1.Run, calls: Iterable[v1.ToolCall]) -> None:
    for call in calls:
        binding = bindings.by_name(agent, run, call.tool)
        if binding is not None:
            call.binding.CopyFrom(binding)
