"""Decides about the calls of a run: which may run, which wait for a person or a caller, and the one outcome of each.
Pure: it turns the state of a run into the events for its calls, which the worker commits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from notecase import v1

from notecase_server import errors
from notecase_server.engine.arguments import arguments_of
from notecase_server.errors import NotecaseError
from notecase_server.store import bindings
from notecase_server.store.bindings import declared
from notecase_server.store.fold import OPEN_OUTCOMES, open_calls
from notecase_server.tools import naming
from notecase_server.tools.contract import ASK_USER, Function, Outcome

RETRY, FAIL = v1.Tool.ON_INTERRUPT_RETRY, v1.Tool.ON_INTERRUPT_FAIL
WITHDRAWN = v1.InputResponse.DECISION_UNSPECIFIED
APPROVE, DENY, ANSWER, CANCEL = (
    v1.InputResponse.DECISION_APPROVE,
    v1.InputResponse.DECISION_DENY,
    v1.InputResponse.DECISION_ANSWER,
    v1.InputResponse.DECISION_CANCEL,
)


RANKS = {
    v1.Tool.APPROVER_USER: 0,
    v1.Tool.APPROVER_UNSPECIFIED: 1,
    v1.Tool.APPROVER_DEVELOPER: 2,
    v1.Tool.APPROVER_ADMIN: 3,
}
"""Approvers in the order of their rights: each may also answer for those before it."""


MAX_REASON_BYTES = 1024
"""Of the reason that a call is given for its end: each of a reply's calls may be given the same one, and a message with
all of them still fits into an answer."""


class Bound(NamedTuple):
    """A name that the model may call, and its tool."""

    tool: v1.Tool
    name: str
    description: str
    parameters: str
    binding: v1.ToolBinding
    """What a call of this name is bound to."""

    @property
    def asks(self) -> bool:
        return self.binding.function == ASK_USER


def called_by_caller(tool: v1.Tool) -> Function:
    """Returns how a tool that the caller runs is shown to a model; nothing here implements it."""
    return Function(tool.name, tool.description, tool.parameters, v1.ToolBinding())


def bind(agent: v1.Agent, run: v1.Run, found: Sequence[Sequence[Function]]) -> dict[str, Bound]:
    """Returns what the model may call, by name. `found` has the functions behind each declared tool, in order.

    Raises NotecaseError TOOL_ERROR when two have one name: the one left out may be the one that needs approval; and for
    more tools than a run may have."""
    if (number := sum(map(len, found))) > naming.MOST:
        told = f"This run has {number} tools, of which at most {naming.MOST} are allowed"
        raise errors.tool_error(f"{told}; list those of MCP servers that are to be used (`mcp.tools`).")
    bound: dict[str, Bound] = {}
    for index, (tool, functions) in enumerate(zip(declared(agent, run), found, strict=True)):
        declaration = bindings.declared_as(agent, tool, index)
        for name, description, parameters, implementation in functions:
            if name in bound:
                raise errors.tool_error(_clash(name, bound[name].binding, implementation))
            binding = bindings.implemented(declaration, index, implementation)
            bound[name] = Bound(tool, name, description, parameters, binding)
    return bound


def _clash(name: str, *bindings: v1.ToolBinding) -> str:
    one, other = map(_described, bindings)
    advice = "Give the tools of an MCP server a prefix (`name`), or list those to be used (`mcp.tools`)."
    return f"Two tools of this run have the name {name!r}: {one}, and {other}. {advice}"


def _described(binding: v1.ToolBinding) -> str:
    match binding.WhichOneof("implementation"):
        case "function":
            return f"the function {binding.function!r}"
        case "mcp":
            return f"{binding.mcp.tool!r} of the MCP server {binding.mcp.server!r}"
        case _:
            return "a client tool"


def declaration(agent: v1.Agent, run: v1.Run, call: v1.ToolCall) -> v1.Tool:
    """Returns the declaration that a call was bound to; an empty one when there was no tool of its name."""
    return declaration_of(declared(agent, run), call)


def declaration_of(tools: Sequence[v1.Tool], call: v1.ToolCall) -> v1.Tool:
    """As `declaration`, of the tools that the run has."""
    index = call.binding.declaration
    return tools[index] if call.HasField("binding") and 0 <= index < len(tools) else v1.Tool()


def is_client(call: v1.ToolCall) -> bool:
    """Returns whether the caller runs what the call was bound to."""
    return call.HasField("binding") and call.binding.WhichOneof("implementation") is None


def remembered(session: v1.Session, run: v1.Run) -> dict[bytes, bool]:
    """Returns the remembered answers for calls of this run: by the digest of a call's binding, whether it is approved.
    The newest answer counts."""
    answers = sorted((*session.remembered.values(), *run.remembered.values()), key=lambda answer: answer.sequence)
    return {answer.digest: answer.approved for answer in answers if answer.agent == run.agent and answer.digest}


NAME_SHOWN = 100
"""Characters of a tool's name in an error."""

LATEST = 253_402_300_799_999_999
"""Microseconds since 1970 at the end of the year 9999: a protobuf Timestamp goes no further."""


def expire(request: v1.InputRequest, run: v1.Run, now: int) -> None:
    """Gives a request the end that the run's limits set."""
    if run.limits.HasField("input_timeout"):
        request.expire_time.FromMicroseconds(min(now + run.limits.input_timeout.ToMicroseconds(), LATEST))


def no_tool(call: v1.ToolCall) -> Outcome:
    """Returns what becomes of a call of a name that no tool has: a model may write anything there."""
    name = call.tool if len(call.tool) <= NAME_SHOWN else f"{call.tool[:NAME_SHOWN]}…"
    return Outcome(error=f"There is no tool {name!r}.")


def triage(
    calls: Iterable[v1.ToolCall],
    bound: Mapping[str, Bound],
    answers: Mapping[bytes, bool],
    new_id: Callable[[], str],
    expire: Callable[[v1.InputRequest], None],
) -> list[v1.Event]:
    """Returns the events for new calls of a model: dispatched, waiting for a person, or already ended. `answers` are
    the remembered ones, by the digest of a call's binding."""
    events = []
    for call in calls:
        target = bound.get(call.tool)
        arguments = arguments_of(call)
        if target is None:
            events.append(finished(call, no_tool(call)))
        elif arguments is None:
            events.append(finished(call, Outcome(error="The arguments are not a JSON object.")))
        elif target.asks:
            prompt = str(arguments.get("question", ""))
            events.append(_request(call, v1.InputRequest.KIND_QUESTION, prompt, new_id, expire))
        elif not target.tool.requires_approval or answers.get(target.binding.digest) is True:
            events.append(started(call))
        elif answers.get(target.binding.digest) is False:
            events.append(denied(call, "This tool was denied before."))
        else:
            prompt = f"Run {call.tool} with these arguments?"
            events.append(_request(call, v1.InputRequest.KIND_APPROVAL, prompt, new_id, expire, target.tool))
    return events


def _request(
    call: v1.ToolCall,
    kind: v1.InputRequest.Kind.ValueType,
    prompt: str,
    new_id: Callable[[], str],
    expire: Callable[[v1.InputRequest], None],
    tool: v1.Tool | None = None,
) -> v1.Event:
    """Returns the event that asks about a call; `tool` is its declaration where that says who may answer."""
    request = v1.InputRequest(input_id=new_id(), kind=kind, prompt=prompt, call=call)
    request.approver = tool.approver if tool is not None else v1.Tool.APPROVER_UNSPECIFIED
    expire(request)
    return v1.Event(input_requested=request)


def started(call: v1.ToolCall, arguments: str = "") -> v1.Event:
    """Returns the event that dispatches a call, or dispatches it once more; with `arguments` in place of the model's
    when they were edited."""
    event = v1.Event(tool_started=call)
    dispatched = event.tool_started
    dispatched.outcome = v1.ToolCall.OUTCOME_RUNNING
    dispatched.client_executed = is_client(call)
    dispatched.attempt += 1
    dispatched.arguments = arguments or call.arguments
    return event


def finished(call: v1.ToolCall, outcome: Outcome) -> v1.Event:
    """Returns the event by which a call succeeds or fails."""
    state = v1.ToolCall.OUTCOME_FAILED if outcome.error else v1.ToolCall.OUTCOME_SUCCEEDED
    return _ended(call, state, outcome.error, outcome.parts)


def denied(call: v1.ToolCall, reason: str) -> v1.Event:
    return _ended(call, v1.ToolCall.OUTCOME_DENIED, brief(reason) or "It was denied.")


def cancelled(call: v1.ToolCall, reason: str) -> v1.Event:
    return _ended(call, v1.ToolCall.OUTCOME_CANCELLED, brief(reason) or "It was cancelled.")


def brief(reason: str) -> str:
    """Returns a reason as a call is given it: of a long one how it begins."""
    begun = reason[: MAX_REASON_BYTES + 1].encode()
    if len(begun) <= MAX_REASON_BYTES:
        return reason
    return begun[: MAX_REASON_BYTES - len("…".encode())].decode(errors="ignore") + "…"


def _ended(
    call: v1.ToolCall, outcome: v1.ToolCall.Outcome.ValueType, error: str, parts: Sequence[v1.Part] = ()
) -> v1.Event:
    event = v1.Event(tool_finished=call)
    event.tool_finished.outcome = outcome
    event.tool_finished.error = error
    event.tool_finished.result.extend(parts)
    return event


def asked_by_tool(request: v1.InputRequest) -> bool:
    """Returns whether the tool of a running call asks: it continues with the answer, so the answer is not an outcome of
    the call."""
    return request.kind == v1.InputRequest.KIND_QUESTION and request.call.outcome == v1.ToolCall.OUTCOME_RUNNING


def refusal(
    requests: Iterable[v1.InputRequest], approver: v1.Tool.Approver.ValueType, field: str
) -> NotecaseError | None:
    """Returns ROLE_MISSING, about that field of the caller's, when one of the requests needs another approver than the
    caller counts as. Questions need none."""
    needed = [each.approver for each in requests if each.kind != v1.InputRequest.KIND_QUESTION]
    if all(RANKS[each] <= RANKS[approver] for each in needed):
        return None
    role = _ROLES[max(needed, key=lambda each: RANKS[each])]
    bound = approver == v1.Tool.APPROVER_USER
    return errors.bound_to_user(role, [field]) if bound else errors.role_missing(role, [field])


_ROLES = {
    v1.Tool.APPROVER_USER: "USER",
    v1.Tool.APPROVER_UNSPECIFIED: "USER",
    v1.Tool.APPROVER_DEVELOPER: "DEVELOPER",
    v1.Tool.APPROVER_ADMIN: "ADMIN",
}


def answered(
    request: v1.InputRequest, response: v1.InputResponse, call: v1.ToolCall, answer: Outcome | None = None
) -> list[v1.Event]:
    """Returns the events of an answer for its call; `answer` is its text if that is the call's result."""
    events = [v1.Event(input_resolved=v1.InputResolved(response=response))]
    if asked_by_tool(request):
        return events
    if response.decision == DENY:
        reason = brief(response.reason)
        if request.kind == v1.InputRequest.KIND_INTERRUPTED_CALL:
            events.append(finished(call, Outcome(error=reason or "It was interrupted and is treated as failed.")))
        else:
            events.append(denied(call, reason))
    elif response.decision == ANSWER:
        events.append(finished(call, answer or Outcome([v1.Part(text=response.answer)])))
    else:
        events.append(started(call, response.edited_arguments))
    return events


def withdrawn(run: v1.Run, message: v1.Message | None, reason: str, deny: bool = False) -> list[v1.Event]:
    """Returns the events that withdraw every open approval and question, and deny or cancel its call. The call of a
    tool that asks is left alone."""
    calls = {call.call_id: call for call in open_calls(message)} if message else {}
    events, reason = [], brief(reason)
    for request in run.pending_inputs:
        response = v1.InputResponse(input_id=request.input_id, decision=DENY if deny else WITHDRAWN, reason=reason)
        events.append(v1.Event(input_resolved=v1.InputResolved(response=response)))
        call = calls.get(request.call.call_id)
        if call is not None and not asked_by_tool(request):
            events.append(denied(call, reason) if deny else cancelled(call, reason))
    return events


def dropped(run: v1.Run, call: v1.ToolCall, reason: str) -> list[v1.Event]:
    """Returns the events that cancel one call, wherever it runs, and withdraw its inputs."""
    asked = [request for request in run.pending_inputs if request.call.call_id == call.call_id]
    return [*unasked(asked, reason), cancelled(call, reason)]


def unasked(requests: Iterable[v1.InputRequest], reason: str) -> list[v1.Event]:
    """Returns the events that withdraw inputs without changing their calls."""
    told = brief(reason)
    responses = (v1.InputResponse(input_id=each.input_id, decision=WITHDRAWN, reason=told) for each in requests)
    return [v1.Event(input_resolved=v1.InputResolved(response=response)) for response in responses]


def lost(run: v1.Run) -> list[v1.InputRequest]:
    """Returns the questions from tools of a run whose worker is lost: no tool waits for those answers."""
    return [request for request in run.pending_inputs if asked_by_tool(request)]


def sealed(run: v1.Run, message: v1.Message | None, reason: str) -> list[v1.Event]:
    """Returns the events that cancel every open call and withdraw all that is asked."""
    events = withdrawn(run, message, reason)
    done = {event.tool_finished.call_id for event in events}
    if message is not None:
        events += [cancelled(call, reason) for call in open_calls(message) if call.call_id not in done]
    return events


def interrupted(
    calls: Iterable[v1.ToolCall],
    of: Callable[[v1.ToolCall], v1.Tool],
    new_id: Callable[[], str],
    expire: Callable[[v1.InputRequest], None],
) -> list[v1.Event]:
    """Returns the events of a takeover for calls that had started in the lost process."""
    events = []
    for call in calls:
        tool = of(call)
        if tool.on_interrupt == RETRY:
            events.append(started(call))
        elif tool.on_interrupt == FAIL:
            events.append(finished(call, Outcome(error="Its process was lost; it may or may not have taken effect.")))
        else:
            wanted = "Run it again, treat it as failed, or give its result?"
            prompt = f"{call.tool} was running when its process was lost. {wanted}"
            events.append(_request(call, v1.InputRequest.KIND_INTERRUPTED_CALL, prompt, new_id, expire, tool))
    return events


def left_open(message: v1.Message | None, events: Iterable[v1.Event]) -> list[v1.ToolCall]:
    """Returns the calls that are still open once the events are committed, as they are then."""
    calls = {call.call_id: call for call in open_calls(message)} if message else {}
    for event in events:
        for part in event.message_added.parts:
            if part.tool_call.outcome in OPEN_OUTCOMES:
                calls[part.tool_call.call_id] = part.tool_call
        if event.HasField("tool_started"):
            calls[event.tool_started.call_id] = event.tool_started
        elif event.HasField("tool_finished"):
            calls.pop(event.tool_finished.call_id, None)
    return list(calls.values())
