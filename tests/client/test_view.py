"""Views of the same log are equal, however its events were split, repeated or resumed."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from notecase import Block, Gap, SessionView, from_value, text_of, to_value, v1

SESSION = "sessions/s"
RUN = f"{SESSION}/runs/r"


def message(number: int, text: str = "") -> v1.Message:
    made = v1.Message(name=f"{SESSION}/messages/m{number}", role=v1.Message.ROLE_ASSISTANT, run=RUN)
    made.status = v1.Message.STATUS_COMPLETED
    if text:
        made.parts.add(text=text)
    return made


def delta(number: int, start: int, text: str, block: int = 0) -> v1.Event:
    name, end = f"{SESSION}/messages/m{number}", start + len(text.encode())
    return v1.Event(run=RUN, block_delta=v1.BlockDelta(message=name, block=block, start=start, text=text, end=end))


def numbered(*events: v1.Event) -> list[v1.Event]:
    """Events of the log with their sequence, passing ones as they are."""
    sequence = 0
    for event in events:
        if event.WhichOneof("payload") not in {"block_delta", "message_discarded"}:
            sequence += 1
            event.sequence = sequence
            event.run = RUN
    return list(events)


def started() -> v1.Event:
    return v1.Event(run_started=v1.RunStarted(agent="agents/a", agent_revision=2, labels={"k": "v"}))


def ended(state: v1.Run.State.ValueType = v1.Run.STATE_SUCCEEDED) -> v1.Event:
    return v1.Event(run_state_changed=v1.RunStateChanged(state=state))


def view_of(events: list[v1.Event], view: SessionView | None = None) -> SessionView:
    view = view or SessionView()
    for event in events:
        view.apply(event)
    return view


# Texts of one to four bytes a code point, and what lies between them.
texts = st.text(st.sampled_from("aß€😀é\n"), max_size=30)


@st.composite
def split(draw: st.DrawFn, number: int, text: str, block: int = 0) -> list[v1.Event]:
    """The text as deltas, cut anywhere between code points, and sometimes sent again from its beginning."""
    cuts = sorted({0, *draw(st.lists(st.integers(0, len(text)), max_size=6)), len(text)})
    events = []
    for start, end in zip(cuts, cuts[1:] or cuts, strict=False):
        if draw(st.booleans()) and start:
            events.append(delta(number, 0, text[:start], block))
        events.append(delta(number, len(text[:start].encode()), text[start:end], block))
    return events


@st.composite
def logs(draw: st.DrawFn) -> list[v1.Event]:
    """A session's whole stream: notes, a run with replies made of deltas, calls, repeats, a takeover, and its end."""
    events = [started()]
    for number in range(draw(st.integers(1, 4))):
        text = draw(texts)
        events += draw(split(number, text))
        match draw(st.sampled_from(["added", "discarded", "taken over", "call", "note"])):
            case "added":
                events.append(v1.Event(message_added=message(number, text)))
                events.append(v1.Event(usage=v1.Usage(input_tokens=3, output_tokens=number, model_calls=1, model="m")))
            case "discarded":
                events.append(v1.Event(message_discarded=v1.MessageDiscarded(message=message(number).name)))
            case "taken over":
                changed = v1.RunStateChanged(state=v1.Run.STATE_RUNNING, attempt=number + 2)
                events.append(v1.Event(run_state_changed=changed))
            case "call":
                asked = message(number, text)
                asked.status = v1.Message.STATUS_IN_PROGRESS
                call = v1.ToolCall(call_id=f"c{number}", tool="t", outcome=v1.ToolCall.OUTCOME_PENDING)
                asked.parts.add(tool_call=call)
                events.append(v1.Event(message_added=asked))
                call.outcome = v1.ToolCall.OUTCOME_FAILED
                events.append(v1.Event(tool_finished=call))
            case "note":
                ops = [v1.StateOp(key="count", increment=number), v1.StateOp(key="seen", append=to_value(text))]
                events.append(v1.Event(state_changed=v1.StateChanged(state=f"{SESSION}/state", ops=ops)))
    if draw(st.booleans()):
        events.append(ended())
    return numbered(*events)


def resumed(events: list[v1.Event], seen: int, after: int) -> Iterator[v1.Event]:
    """What a server sends to a stream that attaches after `after`, at the moment `seen` events had happened."""
    past = view_of(events[:seen])
    yield from (event for event in events[:seen] if event.sequence > after)
    for name, blocks in past.open.items():
        for index, block in blocks.items():
            whole = v1.BlockDelta(message=name, block=index, text=block.text, end=block.end)
            yield v1.Event(run=RUN, block_delta=whole)
    yield from events[seen:]


@given(logs(), st.data())
def test_a_cut_and_a_resume_anywhere_rebuild_the_same_view(events: list[v1.Event], data: st.DataObject) -> None:
    """The connection breaks after any event, and the view attaches after any sequence it has, while more happened."""
    cut = data.draw(st.integers(0, len(events)), "cut")
    seen = data.draw(st.integers(cut, len(events)), "seen")
    view = view_of(events[:cut])
    after = data.draw(st.integers(0, view.last_sequence or 0), "after")
    view.attach(v1.Attached(session=SESSION, last_sequence=max((event.sequence for event in events[:seen]), default=0)))
    view_of(list(resumed(events, seen, after)), view)
    assert view == view_of(events)


@given(logs())
def test_passing_events_leave_no_trace(events: list[v1.Event]) -> None:
    """The log alone rebuilds the view of those who watched it happen, but for the blocks that are open still."""
    watched = view_of(events)
    watched.open.clear()
    assert view_of([event for event in events if event.sequence]) == watched


@given(st.data(), texts.filter(bool))
def test_deltas_rebuild_the_text_to_the_byte(data: st.DataObject, text: str) -> None:
    """However a text is split, its block holds it and its length in bytes."""
    view = view_of(data.draw(split(0, text)))
    assert view.open == {message(0).name: {0: Block("text", text, len(text.encode()))}}


@pytest.mark.parametrize(
    "broken",
    [
        [delta(0, 3, "late")],
        [delta(0, 0, "abc"), delta(0, 2, "c")],
        [delta(0, 0, "abc"), delta(0, 4, "e")],
        [delta(0, 0, "€"), delta(0, 1, "counted in code points")],
        [delta(0, 0, "abc"), delta(0, 3, "d", block=1)],
        [delta(0, 0, "abc"), delta(1, 3, "d")],
    ],
    ids=["no block", "overlap", "hole", "code points", "another block", "another message"],
)
def test_a_missing_slice_is_a_gap(broken: list[v1.Event]) -> None:
    """The view keeps what it had, so that a resume can go on from it."""
    view = view_of(broken[:-1])
    before = view_of(broken[:-1])
    with pytest.raises(Gap):
        view.apply(broken[-1])
    assert view == before


def test_a_delta_that_miscounts_its_bytes_is_a_gap() -> None:
    """A wrong end would make the next slice look right."""
    wrong = delta(0, 0, "abc")
    wrong.block_delta.end = 4
    with pytest.raises(Gap):
        SessionView().apply(wrong)


def test_a_delta_of_an_unknown_kind_is_passed_over() -> None:
    """A newer server may stream more than this client knows, which is no gap."""
    strange = v1.BlockDelta.FromString(v1.BlockDelta(message="m", end=4).SerializeToString() + b"\xfa\x01\x04abcd")
    view = SessionView()
    assert view.apply(v1.Event(block_delta=strange))
    assert view == SessionView()


def test_a_hole_in_the_log_is_a_gap_and_a_repeat_is_nothing() -> None:
    """Sequences are dense, and what was applied once is not applied again."""
    first, second, third = numbered(
        started(), v1.Event(usage=v1.Usage(output_tokens=5, model_calls=1)), v1.Event(usage=v1.Usage(output_tokens=7))
    )
    view = view_of([first])
    with pytest.raises(Gap):
        view.apply(third)
    assert view.last_sequence == 1
    assert [view.apply(event) for event in (second, second, first, third)] == [True, False, False, True]
    assert view.run is not None
    assert view.run.usage.output_tokens == 12


def test_a_view_may_begin_at_any_event() -> None:
    """Made with None it takes the first event as its beginning, and is dense from there."""
    view = SessionView(None)
    assert view.apply(v1.Event(sequence=41, message_added=message(0, "hi")))
    assert view.last_sequence == 41
    with pytest.raises(Gap):
        view.apply(v1.Event(sequence=43))


@pytest.mark.parametrize(
    "forgetting",
    [
        v1.Event(message_discarded=v1.MessageDiscarded(message=message(0).name)),
        v1.Event(sequence=1, message_added=message(0, "whole")),
        v1.Event(sequence=1, run_state_changed=v1.RunStateChanged(state=v1.Run.STATE_RUNNING, attempt=2)),
    ],
    ids=["discarded", "added", "run state"],
)
def test_open_blocks_are_forgotten(forgetting: v1.Event) -> None:
    """By the end of their message, its repeat, or whatever happens to the run."""
    view = view_of([delta(0, 0, "ab"), delta(0, 0, "cd", block=1)])
    view.apply(forgetting)
    assert view.open == {}


def test_another_messages_blocks_stay_open() -> None:
    """Only a change of the run closes all."""
    view = view_of([delta(0, 0, "ab"), delta(1, 0, "cd"), v1.Event(sequence=1, message_added=message(0))])
    assert view.open == {message(1).name: {0: Block("text", "cd", 2)}}


def test_attaching_forgets_open_blocks() -> None:
    """The new stream sends them again whole."""
    view = view_of([delta(0, 0, "ab")])
    view.attach(v1.Attached(session=SESSION))
    assert view.open == {}


def test_a_tool_call_block_knows_its_call() -> None:
    """Arguments grow under the call's id and tool."""
    name = message(0).name
    first = v1.BlockDelta(message=name, arguments='{"a', end=3, call_id="c", tool="t")
    rest = v1.BlockDelta(message=name, start=3, arguments='":1}', end=7, call_id="c", tool="t")
    view = view_of([v1.Event(block_delta=first), v1.Event(block_delta=rest)])
    assert view.open[name] == {0: Block("arguments", '{"a":1}', 7, "c", "t")}


def test_the_outcome_of_a_call_is_folded_into_its_message() -> None:
    """A message is in progress until the last of its calls has an outcome."""
    asked = message(0)
    asked.status = v1.Message.STATUS_IN_PROGRESS
    for call_id in ("one", "two"):
        asked.parts.add(tool_call=v1.ToolCall(call_id=call_id, outcome=v1.ToolCall.OUTCOME_PENDING))
    one = v1.ToolCall(call_id="one", outcome=v1.ToolCall.OUTCOME_FAILED, error="no")
    two = v1.ToolCall(call_id="two", outcome=v1.ToolCall.OUTCOME_CANCELLED)
    events = numbered(v1.Event(message_added=asked), v1.Event(tool_finished=one), v1.Event(tool_finished=two))
    view = view_of(events[:2])
    held = view.messages[asked.name]
    assert (held.parts[0].tool_call, held.status, held.update_sequence) == (one, v1.Message.STATUS_IN_PROGRESS, 2)
    view.apply(events[2])
    assert (held.parts[1].tool_call, held.status, held.update_sequence) == (two, v1.Message.STATUS_COMPLETED, 3)
    assert events[0].message_added.parts[0].tool_call.outcome == v1.ToolCall.OUTCOME_PENDING  # the event is not touched


def _changed(*ops: v1.StateOp, state: str = f"{SESSION}/state") -> v1.Event:
    return v1.Event(state_changed=v1.StateChanged(state=state, ops=ops))


_OPS = [
    v1.StateOp(key="set", set=to_value({"a": [1]})),
    v1.StateOp(key="count", increment=2),
    v1.StateOp(key="list", append=to_value("x")),
    v1.StateOp(key="gone", set=to_value(1)),
]


def test_state_is_folded_from_its_operations() -> None:
    """In a view of the whole log, a missing key counts as 0 or the empty list, as in the server."""
    remove = v1.StateOp(key="gone")
    remove.remove.SetInParent()
    again = [v1.StateOp(key="count", increment=-5), v1.StateOp(key="list", append=to_value(None)), remove]
    view = view_of(numbered(_changed(*_OPS), _changed(*again)))
    values = {key: from_value(value) for key, value in view.state.items()}
    assert values == {"set": {"a": [1]}, "count": -3, "list": ["x", None]}


def test_a_view_of_part_of_the_log_claims_no_state_it_cannot_know() -> None:
    """What an unseen value was incremented to is not guessed."""
    view = SessionView(7)
    view.apply(v1.Event(sequence=8, state_changed=v1.StateChanged(state=f"{SESSION}/state", ops=_OPS)))
    assert sorted(view.state) == ["gone", "set"]


def test_a_view_that_begins_anywhere_knows_when_it_began_at_the_beginning() -> None:
    """Then nothing was before, and a missing key is known to be missing."""
    assert sorted(view_of(numbered(_changed(*_OPS)), SessionView(None)).state) == ["count", "gone", "list", "set"]


def test_state_of_others_is_not_the_sessions() -> None:
    """Changes of the user's and the app's state pass by."""
    op = v1.StateOp(key="k", set=to_value(1))
    passing = v1.Event(state_changed=v1.StateChanged(state="app/state", ops=[op]))
    assert view_of([*numbered(_changed(op, state="users/u/state")), passing]).state == {}


def test_a_run_is_folded_to_its_end() -> None:
    """Start, usage by model, attempts, the last completed reply, error and end come from the events alone."""
    cut_off = message(2, "cut o")
    cut_off.status = v1.Message.STATUS_INCOMPLETE
    error = v1.Error(reason=v1.ERROR_REASON_MODEL_ERROR, message="No.")
    events = numbered(
        started(),
        v1.Event(message_added=v1.Message(name="u", role=v1.Message.ROLE_USER, status=v1.Message.STATUS_COMPLETED)),
        v1.Event(message_added=message(1, "reply")),
        v1.Event(usage=v1.Usage(input_tokens=1, cached_input_tokens=2, output_tokens=3, model_calls=1, model="m")),
        v1.Event(run_state_changed=v1.RunStateChanged(state=v1.Run.STATE_RUNNING, attempt=2)),
        v1.Event(usage=v1.Usage(reasoning_tokens=4, model_calls=1, model="n")),
        v1.Event(message_added=cut_off),
        v1.Event(run_state_changed=v1.RunStateChanged(state=v1.Run.STATE_FAILED, error=error)),
    )
    events[-1].create_time.FromSeconds(9)
    run = view_of(events).run
    assert run is not None
    assert (run.name, run.agent, run.agent_revision, dict(run.labels)) == (RUN, "agents/a", 2, {"k": "v"})
    assert (run.first_sequence, run.last_sequence, run.attempt) == (1, 8, 2)
    assert (run.state, run.error, run.end_time.seconds) == (v1.Run.STATE_FAILED, error, 9)
    assert text_of(run.reply) == "reply"
    assert run.usage == v1.Usage(
        input_tokens=1, cached_input_tokens=2, output_tokens=3, reasoning_tokens=4, model_calls=2, model=""
    )


def test_a_run_joined_in_its_middle_counts_nothing_twice() -> None:
    """The server's word on the run holds up to its newest event; events go on from there."""
    told = v1.Run(
        name=RUN, state=v1.Run.STATE_RUNNING, first_sequence=2, last_sequence=9, usage=v1.Usage(output_tokens=5)
    )
    view = SessionView(7)
    view.attach(v1.Attached(session=SESSION, run=told, last_sequence=9))
    for sequence in (8, 9, 10):
        view.apply(v1.Event(sequence=sequence, run=RUN, usage=v1.Usage(output_tokens=1)))
    assert view.run is not None
    assert (view.run.usage.output_tokens, view.run.last_sequence) == (6, 10)
    assert told.usage.output_tokens == 5


def test_a_call_that_is_dispatched_again_is_pending_once_or_not_at_all() -> None:
    """Where it runs now is what counts."""
    call = v1.ToolCall(call_id="c1", tool="weigh", outcome=v1.ToolCall.OUTCOME_RUNNING, client_executed=True, attempt=1)
    view = view_of(numbered(started()))
    assert view.run is not None
    view.apply(v1.Event(sequence=2, run=RUN, tool_started=call))
    view.apply(v1.Event(sequence=3, run=RUN, tool_started=call))
    assert list(view.run.pending_calls) == [call]
    call.client_executed = False
    view.apply(v1.Event(sequence=4, run=RUN, tool_started=call))
    assert list(view.run.pending_calls) == []


def test_a_rewind_leaves_the_reply_that_came_after_it() -> None:
    """In a run that the server described when it was already further."""
    reply = message(1, "Better.")
    reply.sequence = 9
    told = v1.Run(name=RUN, state=v1.Run.STATE_RUNNING, first_sequence=2, last_sequence=9, reply=reply)
    view = SessionView(7)
    view.attach(v1.Attached(session=SESSION, run=told, last_sequence=9))
    view.apply(v1.Event(sequence=8, run=RUN, rewound=v1.Rewound(to_sequence=5)))
    view.apply(v1.Event(sequence=9, run=RUN, message_added=reply))
    assert view.run is not None
    assert view.run.reply == reply


def test_attaching_again_does_not_run_ahead_of_the_events() -> None:
    """A view that follows a run believes its events, not the newer state that the first frame tells."""
    view = view_of(numbered(started()))
    view.attach(v1.Attached(run=v1.Run(name=RUN, state=v1.Run.STATE_SUCCEEDED, first_sequence=1, last_sequence=5)))
    assert view.run is not None
    assert view.run.state == v1.Run.STATE_RUNNING
