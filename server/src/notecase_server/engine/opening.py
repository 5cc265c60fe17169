"""Makes the events of a start, and determines what a start needs: its agent, and the history before it. Pure."""

from collections.abc import Callable, Sequence
from copy import deepcopy

import msgspec
from notecase import v1

from notecase_server import errors
from notecase_server.engine.rewind import Back
from notecase_server.errors import Violation
from notecase_server.store.contract import SessionKey
from notecase_server.tools import naming

COMPLETED = v1.Message.STATUS_COMPLETED
INTERRUPT, ROLLBACK = v1.StartRun.ON_BUSY_INTERRUPT, v1.StartRun.ON_BUSY_ROLLBACK


class Meant(msgspec.Struct, frozen=True):
    """The data that a start needs, as of one moment."""

    key: SessionKey
    session: v1.Session
    """The session's row, or the session to create."""
    agent: v1.Agent | None
    """The one that is named by the start, or else by the session."""


def agent_of(meant: Meant, start: v1.StartRun) -> v1.Agent:
    """The agent of a start, as its settings change it. Raises NotecaseError AGENT_NOT_FOUND, and INVALID_FIELD when
    none is named, or has a tool by the name of one that the start brings."""
    if not (start.agent or meant.session.agent):
        raise errors.invalid([Violation("start.agent", "neither the start nor the session names an agent")])
    if meant.agent is None:
        raise errors.not_found("agent", start.agent or meant.session.agent)
    if start.client_tools:
        taken = {name for tool in meant.agent.llm.tools for name in naming.declared(tool)}
        clashes = [
            Violation(f"start.client_tools[{index}].name", f"the agent already declares a tool {tool.name!r}")
            for index, tool in enumerate(start.client_tools)
            if tool.name in taken
        ]
        if clashes:
            raise errors.invalid(clashes)
    return _changed(meant.agent, start.settings) if start.HasField("settings") else meant.agent


def _changed(agent: v1.Agent, settings: v1.RunSettings) -> v1.Agent:
    """Returns the agent with the settings of a run in place of its own."""
    changed = deepcopy(agent)
    if settings.HasField("model"):
        changed.llm.model = settings.model
    if settings.HasField("instruction"):
        changed.llm.instruction = settings.instruction
    if settings.HasField("generation"):
        changed.llm.generation.CopyFrom(settings.generation)
    return changed


def without_values(settings: v1.RunSettings) -> v1.RunSettings:
    """Returns settings with their fields set to nothing: the values are not for all who may read the log."""
    return v1.RunSettings(
        model="" if settings.HasField("model") else None,
        instruction="" if settings.HasField("instruction") else None,
        generation=v1.Generation() if settings.HasField("generation") else None,
    )


def ahead(session: v1.Session, start: v1.StartRun) -> str:
    """Returns the run that a start has to wait for: the active one, or one that is queued and whose turn comes first,
    unless the start is one that does not wait. "" for none."""
    if session.active_run or start.on_busy in {INTERRUPT, ROLLBACK}:
        return session.active_run
    return session.queued_commands[0].run if session.queued_commands else ""


def expected(start: v1.StartRun) -> int | None:
    """Returns the sequence at which the log must end when a start is committed; None for any."""
    return start.if_last_sequence if start.HasField("if_last_sequence") else None


def opening(
    start: v1.StartRun, user: str, agent: v1.Agent, run_id: str, cause_id: str, new_id: Callable[[], str]
) -> list[v1.Event]:
    """Returns the events that start a run: the start, the given state, the messages."""
    events = [v1.Event()]
    started = events[0].run_started
    started.agent, started.agent_revision = agent.name, agent.revision
    if start.client_tools:
        started.client_tools.extend(start.client_tools)
    if start.labels:
        started.labels.update(start.labels)
    if start.HasField("limits"):
        started.limits.CopyFrom(start.limits)
    if start.HasField("disconnect"):
        started.disconnect.CopyFrom(start.disconnect)
    if start.HasField("settings") and (paths := [one.name for one, _ in start.settings.ListFields()]):
        started.settings.paths.extend(paths)
    if start.state:
        ops = [v1.StateOp(key=name, set=value) for name, value in sorted(start.state.items())]
        events.append(v1.Event(state_changed=v1.StateChanged(ops=ops)))
    for message in incoming(new_id, start.messages, user):
        message.run = run_id
        events.append(v1.Event(message_added=message))
    for event in events:
        event.run = run_id
        event.cause_id = cause_id
    return events


def incoming(new_id: Callable[[], str], messages: Sequence[v1.Message], user: str) -> list[v1.Message]:
    """Returns a caller's message as it is stored: complete, with an id, and by the session's user unless it names its
    author."""
    made = []
    for given in messages:
        role, author = given.role or v1.Message.ROLE_USER, given.author or user
        message = v1.Message(name=new_id(), role=role, author=author, status=COMPLETED)
        message.parts.MergeFrom(given.parts)
        if given.labels:
            message.labels.update(given.labels)
        made.append(message)
    return made


def way_of(start: v1.StartRun) -> Back | None:
    """Returns how far the session goes back when a start takes the place of a run; None for not at all."""
    if start.on_busy == ROLLBACK:
        return Back(None)
    if not start.HasField("rewind_to_sequence"):
        return None
    return Back(start.rewind_to_sequence, "start.rewind_to_sequence")


def goes_back(start: v1.StartRun) -> bool:
    """Returns whether a start may take the session back to an earlier sequence."""
    return start.HasField("rewind_to_sequence") or start.on_busy == ROLLBACK


def is_answer(message: v1.Message) -> bool:
    """Returns whether nothing is left to say after this message: a whole reply that called no tools, whose results need
    one."""
    calls = any(part.HasField("tool_call") for part in message.parts)
    return message.role == v1.Message.ROLE_ASSISTANT and message.status == COMPLETED and not calls
