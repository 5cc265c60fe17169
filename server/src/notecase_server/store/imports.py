"""Replays the log of an import, which is untrusted, through the fold with all its refusals, and makes rows of it. It is
replayed in pieces, each on the rows that the earlier pieces have left. So only one piece of the file is in memory,
however long the log is, and other work waits for at most one piece.
"""

from collections.abc import Set
from operator import methodcaller
from typing import NamedTuple

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from notecase import v1

from notecase_server import errors, names
from notecase_server.errors import NotecaseError
from notecase_server.store import copies, fold
from notecase_server.store.contract import ANSWER_BYTES, LAST_SECOND, Restore, SessionKey
from notecase_server.store.copies import Row
from notecase_server.store.sql.tables import Tables
from notecase_server.store.steps import event_row, load, stretches_of
from notecase_server.store.stretches import Stretch
from notecase_server.store.tables import Batch, EventRow

ARRIVED = b"imported"
"""In place of the digest of a run's start, which is not in the log: no start is a repeat of such a run's."""

OF_RUNS = frozenset(
    {"run_started", "run_state_changed", "command_queued", "tool_started", "input_requested", "input_resolved"}
    | {"summary_failed", "tools_unavailable"}
)
OF_ANY = frozenset({"message_added", "tool_finished", "state_changed", "usage", "rewound", "summarized"})
"""Kinds of events that a log holds: those that are some run's, and those that need not be."""


PIECE = 5
"""Entries of a piece are so many times fewer than the rows that a transaction writes: one takes as long to replay as
several rows to write, and makes some of them."""

FOUND_BYTES = 1024
"""Of a key of state, and of the id of a call, by which rows are found: an index of PostgreSQL refuses some 2.7 KB, and
a key takes twice its bytes there at most. Keys that may be set now are shorter, but tools could once set any."""

KEYS = 500
"""That are asked for at a time: anybody may have written an event that changes more of them than a statement takes."""


class Loaded(NamedTuple):
    """What a piece needs."""

    rows: fold.Rows
    taken: Set[str]
    """Ids that messages before it have, of those that it adds."""
    stretches: list[Stretch]
    """What its rewinds leave behind."""


class Replay:
    """One log on its way from a file into rows."""

    def __init__(self, restore: Restore) -> None:
        self.session = v1.Session(user=restore.session.user)
        """As it is behind what was replayed."""
        self._key = restore.key
        self._events = restore.events()
        self._next: v1.Event | None = None
        self._forgets = restore.forgets
        self._sealing: int | None = None
        self._unended = set[str]()

    def read(self) -> list[v1.Event]:
        """Returns the next piece of the log; empty behind its end. Blocks. Raises NotecaseError IMPORT_INVALID."""
        piece, batch = list[v1.Event](), Batch(max(copies.COPY_ROWS // PIECE, 1), copies.COPY_BYTES)
        self._next = self._next or next(self._events, None)
        while self._next is not None and batch.takes(self._next.ByteSize()):
            piece.append(self._next)
            self._next = next(self._events, None)
        if not piece and self._unended:
            raise errors.import_invalid(f"has an unfinished run, {min(self._unended)!r}")
        return piece

    def load(self, tables: Tables, events: list[v1.Event]) -> "Loaded":
        """Reads what a piece needs. All that came before it must be rows by now. Raises NotecaseError
        IMPORT_INVALID."""
        for event in events:
            if not _looks_back(event):
                raise _cannot_follow(event)
            if problem := _too_long(event):
                raise errors.import_invalid(f"has {problem} in event {event.sequence}")
        key = self._key
        added = [(key.uid, event.message_added.name) for event in events if event.HasField("message_added")]
        taken = {name for _, name in tables.named_messages(key.tenant, added)}
        return Loaded(self._load(tables, events), taken, stretches_of(tables, key, events))

    def rows(self, events: list[v1.Event], loaded: "Loaded") -> list[Row]:
        """Replays a piece, and returns the rows that it makes or changes. Takes long: a store may run steps on its
        loop, and this is none. Raises NotecaseError IMPORT_INVALID."""
        key, scope, rows, taken = self._key, self._key.state, loaded.rows, loaded.taken
        runs, calls = set(rows.runs), set(rows.calls)
        version, unstarted, made = rows.versions.get(scope, 0), set[str](), list[Row]()
        for event in events:
            if event.run not in rows.runs and event.HasField("run_state_changed"):
                unstarted.add(event.run)
            row = _replayed(rows, key, event, taken)
            self.session.log_bytes += len(row.body)
            made.append((len(row.body), methodcaller("add_events", key, [row])))
        self.session.ClearField("remembered")  # an answer holds for the session in which it was given
        self._sealing = rows.sealing
        self._unended -= rows.runs.keys()
        self._unended |= {name for name, run in rows.runs.items() if run.state not in fold.ENDED}
        made += [(0, methodcaller("add_stretches", key, [one])) for one in loaded.stretches]
        made += [
            (message.ByteSize(), methodcaller("put_message", key, message))
            for message in rows.messages.values()
            if message.update_sequence != message.sequence
        ]
        made += [
            (0, methodcaller("put_calls", key, {call_id: holder}))
            for call_id, holder in rows.calls.items()
            if call_id not in calls
        ]
        for name, run in rows.runs.items():
            if self._forgets:
                run.ClearField("remembered")
            digest = b"" if name in unstarted else ARRIVED
            add, put = methodcaller("add_run", key, run, digest), methodcaller("put_run", key, run, True)
            made.append((run.ByteSize(), put if name in runs else add))
        if rows.versions.get(scope, 0) > version:
            made.append((0, methodcaller("put_version", scope, rows.versions[scope])))
        made += [
            (entry.ByteSize() if entry is not None else 0, methodcaller("put_entry", scope, name, entry))
            for name, entry in rows.state.get(scope, {}).items()
            if entry is None or entry.version > version
        ]
        return made

    def _load(self, tables: Tables, events: list[v1.Event]) -> fold.Rows:
        """Reads what the piece needs."""
        key, needs = self._key, fold.needs(events)
        own, values = sorted(needs.keys.get("", ())), needs.values.get("", set())
        needs.keys = {}
        rows = fold.Rows(self.session, 0, sealing=self._sealing)
        rows.runs = {name: found[0] for name in needs.runs if (found := tables.run(key, name)) is not None}
        load(tables, key, needs, rows)
        rows.state[key.state] = {}
        for at in range(0, len(own), KEYS):
            piece = own[at : at + KEYS]
            rows.versions[key.state], found_entries = tables.state(key.state, piece, values.intersection(piece))
            rows.state[key.state] |= found_entries
        return rows


def _replayed(rows: fold.Rows, key: SessionKey, event: v1.Event, taken: Set[str]) -> EventRow:
    """Applies an entry, and returns its row. `taken` are the ids of messages that there were before."""
    kind = event.WhichOneof("payload")
    message = event.message_added.name
    ids = [event.run] if event.run or kind in OF_RUNS else []
    ids += [message] if kind == "message_added" else []
    fits = (
        kind in OF_RUNS | OF_ANY
        and fold.ops_fit(event.state_changed.ops)
        and all(map(names.is_id, ids))
        and message not in rows.messages
        and message not in taken
    )
    body = event.SerializeToString(deterministic=True)
    fits = fits and _times_fit(event) and (kind != "message_added" or len(body) <= ANSWER_BYTES)
    try:
        if fits:
            fold.replay(rows, key, event)
    except (NotecaseError, ValueError):
        fits = False
    if not fits or event.SerializeToString(deterministic=True) != body:
        raise _cannot_follow(event)
    return event_row(event, body)


def _looks_back(event: v1.Event) -> bool:
    """Whether the sequences that an entry names lie before it, as those of a log do: it is asked for what they name."""
    match event.WhichOneof("payload"):
        case "rewound":
            return 0 <= event.rewound.to_sequence < event.sequence
        case "summarized":
            summary = event.summarized
            return 1 <= summary.last_sequence < event.sequence and 0 <= summary.previous < event.sequence
    return True


def _too_long(event: v1.Event) -> str:
    """Says which key or id of an entry is one that not every store can hold; empty where all are fine."""
    if any(len(op.key.encode()) > FOUND_BYTES for op in event.state_changed.ops):
        return f"a key of state of more than {FOUND_BYTES} bytes"
    if any(len(part.tool_call.call_id.encode()) > FOUND_BYTES for part in event.message_added.parts):
        return f"the id of a call of more than {FOUND_BYTES} bytes"
    return ""


def _times_fit(message: Message) -> bool:
    """Whether each time in it is from 1970 to 9999, and each duration one of as many years at most."""
    for described, held in message.ListFields():
        kind = described.message_type
        if kind is None or kind.GetOptions().map_entry or kind.full_name == v1.Value.DESCRIPTOR.full_name:
            continue
        for each in held if described.is_repeated else (held,):
            if isinstance(each, Timestamp | Duration):
                if not (0 <= each.seconds <= LAST_SECOND and 0 <= each.nanos < 1_000_000_000):
                    return False
            elif not _times_fit(each):
                return False
    return True


def _cannot_follow(event: v1.Event) -> NotecaseError:
    return errors.import_invalid(f"has an event {event.sequence} that cannot follow in a log")
