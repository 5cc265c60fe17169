"""Going back: the events after which a session is as it was at an earlier sequence.

The log is not cut. A mark supersedes the messages since, and what puts the state back is written out as operations, so
that whoever folds the log needs to know nothing of how it was.
"""

from typing import NamedTuple

from notecase import v1

from notecase_server.store.contract import SessionKey, Store
from notecase_server.store.fold import apply_ops

PAGE_OPS = 500
"""Operations in one event: what puts a state back may be more than one event should hold."""


class Rewind(NamedTuple):
    """What to commit while the log's head is still `head`."""

    head: int
    events: list[v1.Event]


async def rewound(store: Store, key: SessionKey, run: v1.Run) -> Rewind:
    """The mark before the run's start, then the state. What went on while it was queued is not its doing, and stays.
    Reads the log: a page at a time, and only its beginning when no state was changed since."""
    changed: set[str] = set()
    head = to_sequence = run.first_sequence - 1
    while events := await store.read_events(key, head):
        for event in events:
            if event.HasField("run_started") and event.run == run.name:
                to_sequence = event.sequence - 1
                changed.clear()
            changed.update(op.key for op in _own_ops(event))
        head = events[-1].sequence
    then: dict[str, v1.StateEntry | None] = {}
    after = 0
    while changed and after < to_sequence and (events := await store.read_events(key, after)):
        for event in events:
            if event.sequence <= to_sequence:
                apply_ops(then, [op for op in _own_ops(event) if op.key in changed], 1, 0)
        after = events[-1].sequence
    ops = []
    for name in sorted(changed):
        op = v1.StateOp(key=name)
        if (entry := then.get(name)) is not None:
            op.set.CopyFrom(entry.value)
        else:
            op.remove.SetInParent()
        ops.append(op)
    mark = v1.Event(rewound=v1.Rewound(to_sequence=to_sequence, run=run.name))
    pages = [ops[start : start + PAGE_OPS] for start in range(0, len(ops), PAGE_OPS)]
    return Rewind(head, [mark, *(v1.Event(state_changed=v1.StateChanged(ops=page)) for page in pages)])


def _own_ops(event: v1.Event) -> list[v1.StateOp]:
    """The operations on the session's own state."""
    return list(event.state_changed.ops) if event.state_changed.state == "" else []
