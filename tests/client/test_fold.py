"""The client's view of a session is the server's own fold of the log, though neither knows the other."""

import copy
from collections.abc import Sequence
from typing import Any

from google.protobuf.empty_pb2 import Empty
from hypothesis import given, settings
from hypothesis import strategies as st
from notecase import SessionView, v1
from notecase_server import names
from notecase_server.errors import NotecaseError
from notecase_server.store import fold
from notecase_server.store.contract import Commit, RunRecord

from tests.store.build import session_key

KEY = session_key("acme", "s")
RUNS = st.sampled_from(["r1", "r1", "r1", "r2", "r3"])
"""Mostly the one that begins, so that much happens to it."""
NUMBERS = st.integers(0, 7)
OPS = st.one_of(
    st.builds(lambda key, by: v1.StateOp(key=key, increment=by), st.sampled_from("ab"), NUMBERS),
    st.builds(lambda by: v1.StateOp(key="c", append=v1.Value(int_value=by)), NUMBERS),
    st.builds(lambda key, to: v1.StateOp(key=key, set=v1.Value(int_value=to)), st.sampled_from("ab"), NUMBERS),
    st.builds(lambda key: v1.StateOp(key=key, remove=Empty()), st.sampled_from("abc")),
)
ACTIONS = st.one_of(
    st.tuples(st.just("start"), RUNS),
    st.tuples(st.just("queue run"), RUNS),
    st.tuples(st.just("queue input"), RUNS),
    st.tuples(st.just("take up"), RUNS, NUMBERS),
    st.tuples(st.just("end after turn"), RUNS),
    st.tuples(st.just("say"), RUNS | st.just("")),
    st.tuples(st.just("reply"), RUNS),
    st.tuples(st.just("call"), RUNS),
    st.tuples(st.just("dispatch"), RUNS, NUMBERS, st.booleans()),
    st.tuples(st.just("finish"), RUNS, NUMBERS),
    st.tuples(st.just("ask"), RUNS, NUMBERS, st.sampled_from([1, 2, 3])),
    st.tuples(st.just("resolve"), RUNS, NUMBERS, st.sampled_from([0, 1, 2, 3]), st.sampled_from([0, 1, 2, 3])),
    st.tuples(st.just("use"), RUNS, st.sampled_from(["small", "large"])),
    st.tuples(st.just("pause"), RUNS, st.sampled_from([v1.Run.STATE_RUNNING, v1.Run.STATE_WAITING]), st.integers(0, 3)),
    st.tuples(st.just("end"), RUNS, st.sampled_from(sorted(fold.ENDED))),
    st.tuples(st.just("rewind"), RUNS, NUMBERS),
    st.tuples(st.just("seal"), RUNS, NUMBERS),
    st.tuples(st.just("change state"), st.sampled_from(["", "user", "app"]), st.lists(OPS, min_size=1, max_size=3)),
)


class Log:
    """A session as a store has it, from the server's fold, and its log as a watcher receives it."""

    def __init__(self) -> None:
        session = fold.new_session(KEY, v1.Session(user="users/ada"), 0)
        self.rows = fold.Rows(session, 0)
        self.events: list[v1.Event] = []
        self._now = 1_700_000_000_000_000

    def add(self, event: v1.Event, *, seconds: float = 1) -> bool:
        """Commits an event in stored form, so much later; False when the fold refuses it."""
        rows = copy.deepcopy(self.rows)
        rows.open.clear()  # refers to calls within the messages that were copied; a store loads rows for each commit
        self._now += round(seconds * 1_000_000)
        try:
            early = event.run not in rows.runs and event.run_state_changed.state == v1.Run.STATE_CANCELLED
            record = RunRecord(b"", v1.Agent()) if early else None
            done = fold.apply(rows, Commit(key=KEY, events=[event], start=record), self._now)
        except NotecaseError:
            return False
        self.rows = rows
        told = v1.Event.FromString(done.events[0].SerializeToString())
        self.events.append(names.render_event(KEY.session, "users/ada", told))
        return True

    def run(self, run_id: str) -> v1.Run:
        """A run as the server tells it, with its reply."""
        run = v1.Run.FromString(self.rows.runs[run_id].SerializeToString())
        if run.HasField("reply"):
            run.reply.CopyFrom(self.rows.messages[run.reply.name])
        return names.render_run(KEY.session, run)

    def active(self) -> v1.Run:
        active = self.rows.session.active_run
        return self.run(active) if active else v1.Run()

    def told(self) -> dict[str, Any]:
        """What the service answers about the session."""
        messages = [v1.Message.FromString(row.SerializeToString()) for row in self.rows.messages.values()]
        session = names.render_session(v1.Session.FromString(self.rows.session.SerializeToString()))
        scope = fold.state_scope(KEY, "", "")
        entries = self.rows.state.get(scope, {})
        return {
            "last_sequence": session.last_sequence,
            "messages": [names.render_message(KEY.session, message) for message in messages],
            "runs": {names.run(KEY.session, name): self.run(name) for name in self.rows.runs},
            "state": {key: entry.value for key, entry in entries.items() if entry is not None},
            "queued": list(session.queued_commands),
            "remembered": dict(session.remembered),
            "run": self.active() if session.active_run else None,
        }


def seen(view: SessionView) -> dict[str, Any]:
    """The same of a view."""
    under_way = view.run if view.run and view.run.state in {v1.Run.STATE_RUNNING, v1.Run.STATE_WAITING} else None
    return {
        "last_sequence": view.last_sequence,
        "messages": list(view.messages.values()),
        "runs": view.runs,
        "state": view.state,
        "queued": view.queued,
        "remembered": view.remembered,
        "run": under_way,
    }


def event(action: Sequence[Any], number: int, log: Log) -> v1.Event:
    """The event of an action in stored form. `number` makes ids that are new; the action's own picks among the old."""
    kind, run, *rest = action
    made = v1.Event(run=run)
    calls = [call for row in log.rows.messages.values() for call in fold.open_calls(row)]
    match kind:
        case "start":
            started = made.run_started
            started.agent, started.agent_revision = "agents/a", number
            started.labels["n"] = str(number)
            started.client_tools.add(name=f"tool{number}", client=v1.ClientTool())
            started.limits.max_tool_calls = number
        case "queue run":
            made.cause_id = f"q{number}"
            made.command_queued.start.agent = "agents/b"
            made.command_queued.start.labels["queued"] = "yes"
        case "queue input":
            made.cause_id = f"q{number}"
            made.command_queued.input.messages.add(parts=[v1.Part(text="later")])
        case "take up":
            queued = log.rows.session.queued_commands
            made.cause_id = queued[rest[0] % len(queued)].command_id if queued else "unknown"
            made.message_added.CopyFrom(_message(number, run, v1.Message.ROLE_USER))
        case "end after turn":
            made.command_queued.cancel.mode = v1.CancelCommand.MODE_AFTER_TURN
        case "say" | "reply":
            role = v1.Message.ROLE_USER if kind == "say" else v1.Message.ROLE_ASSISTANT
            made.message_added.CopyFrom(_message(number, run, role))
        case "call":
            made.message_added.CopyFrom(_message(number, run, v1.Message.ROLE_ASSISTANT))
            made.message_added.status = v1.Message.STATUS_IN_PROGRESS
            for letter in "ab":
                call = made.message_added.parts.add().tool_call
                call.call_id, call.tool = f"{letter}{number}", f"tool{number % 2}"
                call.outcome = v1.ToolCall.OUTCOME_PENDING
        case "dispatch":
            made.tool_started.CopyFrom(calls[rest[0] % len(calls)] if calls else v1.ToolCall())
            made.tool_started.attempt += 1
            made.tool_started.client_executed = rest[1]
            made.tool_started.outcome = v1.ToolCall.OUTCOME_RUNNING
        case "finish":
            made.tool_finished.CopyFrom(calls[rest[0] % len(calls)] if calls else v1.ToolCall())
            made.tool_finished.outcome = v1.ToolCall.OUTCOME_SUCCEEDED
            made.tool_finished.result.add(text=f"result {number}")
        case "ask":
            made.input_requested.input_id, made.input_requested.kind = f"i{number}", rest[1]
            made.input_requested.call.tool = f"tool{rest[0]}"
        case "resolve":
            pending = log.rows.runs[run].pending_inputs if run in log.rows.runs else []
            asked = [one.input_id for one in pending] or ["unknown"]
            made.input_resolved.response.input_id = asked[rest[0] % len(asked)]
            made.input_resolved.response.decision = rest[1]
            made.input_resolved.response.remember = rest[2]
        case "use":
            made.usage.CopyFrom(v1.Usage(model=rest[0], model_calls=1, input_tokens=number, reasoning_tokens=1))
        case "pause" if log.rows.session.active_run == run:
            made.run_state_changed.state, made.run_state_changed.attempt = rest
        case "pause" | "end":
            made.run_state_changed.state = rest[0] if rest[0] in fold.ENDED else v1.Run.STATE_CANCELLED
            if rest[0] == v1.Run.STATE_FAILED:
                made.run_state_changed.error.message = "It failed."
        case "rewind":
            made.run = ""
            made.rewound.to_sequence = max(log.rows.session.last_sequence - rest[0], 0)
            made.rewound.run = run
        case "seal":
            made.run = ""
            every = [
                part.tool_call for row in log.rows.messages.values() for part in row.parts if part.tool_call.call_id
            ]
            made.tool_finished.CopyFrom(every[rest[0] % len(every)] if every else v1.ToolCall())
            made.tool_finished.outcome = v1.ToolCall.OUTCOME_CANCELLED
        case "change state":
            made.run = ""
            made.state_changed.CopyFrom(v1.StateChanged(state=run, ops=rest[0]))
    return made


def _message(number: int, run: str, role: v1.Message.Role.ValueType) -> v1.Message:
    parts = [v1.Part(text=f"número {number}")]
    return v1.Message(name=f"m{number}", run=run, role=role, parts=parts, status=v1.Message.STATUS_COMPLETED)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTIONS, min_size=5, max_size=40), st.data())
def test_the_view_is_what_the_server_would_tell(actions: list[tuple[Any, ...]], data: st.DataObject) -> None:
    """After every entry of any log: messages, runs, state, queue and decisions; and the active run also in a view that
    begins anywhere, from an `Attached` that may be ahead."""
    log, whole = Log(), SessionView()
    snapshots = [v1.Run()]
    for number, action in enumerate([("start", "r1"), *actions]):
        if log.add(event(action, number, log), seconds=data.draw(st.sampled_from([0, 0.5, 3]))):
            whole.apply(log.events[-1])
            snapshots.append(log.active())
            assert log.told() == seen(whole)
    after = data.draw(st.integers(0, len(log.events)), "after")
    told_at = data.draw(st.integers(after, len(log.events)), "told at")
    part = SessionView(after)
    part.attach(v1.Attached(run=snapshots[told_at], last_sequence=told_at))
    for one in log.events[after:]:
        part.apply(one)
    if followed := names.parse_run(snapshots[told_at].name):
        assert log.run(followed.run) == part.runs[snapshots[told_at].name]
