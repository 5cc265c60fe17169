"""A rewind marks what it leaves behind, whatever lies there, and writes no message again."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from notecase import v1
from notecase_server.store import fold
from notecase_server.store.contract import Commit, Query, SessionKey
from notecase_server.store.sqlite.store import SqliteStore
from notecase_server.store.stretches import Stretch, last_of, left_behind, superseded_at

from tests.store.build import ManualClock, said
from tests.support.tracing import Trace

KEY = SessionKey("default", "s", "u")


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 1 << 16)), max_size=8))
def test_each_message_is_left_behind_by_the_first_rewind_over_it(steps: list[tuple[int, int]]) -> None:
    """Rewinds after some messages each, to anywhere before; what holds is compared with what each rewind means."""
    known, meant, head = list[Stretch](), dict[int, int](), 0
    for messages, place in steps:
        head += messages + 1
        to_sequence = place % head
        known = sorted([*known, *left_behind(partial(last_of, known), to_sequence, head)])
        for sequence in range(to_sequence + 1, head):
            meant.setdefault(sequence, head)
    assert {at: rewind for at in range(1, head + 1) if (rewind := superseded_at(known, at)) is not None} == meant
    assert all(one.until <= other.after + 1 for one, other in itertools.pairwise(known))


@contextmanager
def counting(store: SqliteStore) -> Iterator[list[int]]:
    """The rows and the bytes of SQL that the writer is given meanwhile."""
    writer = store._connections.writer
    counted, before = [0, 0], writer.total_changes

    def look(statement: str) -> None:
        counted[1] += len(statement)

    with Trace([writer], look).on():
        yield counted
    counted[0] = writer.total_changes - before


@pytest.mark.parametrize("messages", [3, 300])
async def test_a_rewind_costs_the_same_whatever_lies_behind_it(tmp_path: Path, messages: int) -> None:
    store = await SqliteStore.open(tmp_path / "s.db", ManualClock())
    await store.commit(Commit(key=KEY, create=v1.Session(), events=[said("first")]))
    for number in range(messages):
        await store.commit(Commit(key=KEY, events=[said(f"m{number}", "x" * 20_000)]))
    with counting(store) as counted:
        await store.commit(Commit(key=KEY, events=[v1.Event(rewound=v1.Rewound(to_sequence=1))]))
    shown = (await store.list_messages(KEY, Query(1000))).rows
    everything = (await store.list_messages(KEY, Query(1000), superseded=True)).rows
    await store.close()
    assert [message.name for message in shown] == ["first"]
    assert {message.update_sequence for message in everything[1:]} == {messages + 2}
    rows, size = counted
    assert rows == 3, "the session, the event and one stretch"
    assert size < 10_000


@pytest.mark.parametrize("rewinds", [10, 1000])
def test_a_rewind_looks_at_as_many_stretches_as_it_adds(rewinds: int) -> None:
    """However many there are: a log that is rewound to its beginning again and again, then once more."""
    known, looked = list[Stretch](), 0

    def last(before: int) -> Stretch | None:
        nonlocal looked
        looked += 1
        return last_of(known, before)

    for number in range(1, rewinds + 1):
        known = sorted([*known, *left_behind(partial(last_of, known), 0, 3 * number)])
    added = left_behind(last, 0, 3 * rewinds + 3)
    assert (len(added), looked) == (1, 2)


def test_a_rewind_that_is_read_again_looks_at_no_message() -> None:
    """A file to import may have as many rewinds as messages."""

    class Unread(dict[str, v1.Message]):
        def values(self) -> Any:
            raise AssertionError("a rewind looks at every message")

    rows = fold.Rows(v1.Session(), 0, messages=Unread())
    for sequence in range(1, 4):
        event = said(f"m{sequence}")
        event.sequence = sequence
        fold.replay(rows, KEY, event)
    fold.replay(rows, KEY, v1.Event(sequence=4, rewound=v1.Rewound(to_sequence=1)))
    assert rows.sealing == 1
