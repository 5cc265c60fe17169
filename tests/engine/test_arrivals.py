"""What a record of an import may hold is known before it is parsed: while the parser is at work, nothing else is."""

from collections.abc import Callable

import pytest
from notecase import v1
from notecase_server.engine.arrivals import MOST_VALUE_BYTES, MOST_WITHIN, _Judge
from notecase_server.errors import NotecaseError

from tests.hostile.making import empties, varint, wide_list, wire

BEGIN = b"notecase\x02\x02\x0a\x00"
"""The magic word, the format and an empty header."""

BROKEN = b"\x0a\x7f"
"""Says that 127 bytes follow, where none do: the parser refuses whatever has it."""


def said_of(record: bytes) -> str:
    """What a file with that record is refused for; empty where it is not."""
    try:
        _Judge().feed(BEGIN + varint(len(record)) + record)
    except NotecaseError as error:
        return error.message
    return ""


def event(payload: bytes, number: int) -> bytes:
    return wire(2, b"\x08\x01" + wire(number, payload))


def field(name: str) -> int:
    return v1.Event.DESCRIPTOR.fields_by_name[name].number


def ops(*values: bytes) -> bytes:
    """An event that sets keys to values, as bytes."""
    key = v1.StateOp(key="k").SerializeToString()
    number = v1.StateOp.DESCRIPTOR.fields_by_name["set"].number
    within = v1.StateChanged.DESCRIPTOR.fields_by_name["ops"].number
    return event(b"".join(wire(within, key + wire(number, value)) for value in values), field("state_changed"))


def queued(*values: bytes) -> bytes:
    """A queued start with that state."""
    number = v1.StartRun.DESCRIPTOR.fields_by_name["state"].number
    start = b"".join(wire(number, wire(1, b"k") + wire(2, value)) for value in values)
    within = v1.CommandQueued.DESCRIPTOR.fields_by_name["start"].number
    return event(wire(within, start), field("command_queued"))


def parts(count: int, part: bytes = b"") -> bytes:
    within = v1.Message.DESCRIPTOR.fields_by_name["parts"].number
    return event(wire(within, part) * count, field("message_added"))


@pytest.mark.parametrize("holder", [ops, queued])
def test_a_record_with_more_state_than_an_event_has_is_not_parsed(holder: Callable[..., bytes]) -> None:
    much = empties(MOST_VALUE_BYTES // 8)
    assert "cannot be decoded" in said_of(holder(much, BROKEN))
    assert f"{MOST_VALUE_BYTES} bytes of state" in said_of(holder(much, much, much, much, BROKEN))


@pytest.mark.parametrize("part", [b"", wire(1, b"x"), BROKEN], ids=["empty", "text", "broken"])
def test_a_record_with_more_items_than_an_event_has_is_not_parsed(part: bytes) -> None:
    assert f"{MOST_WITHIN} parts" in said_of(parts(MOST_WITHIN + 1, part))


@pytest.mark.parametrize("again", [b"\x28\x01", wire(1000, b"")], ids=["a number", "unknown"])
def test_a_record_of_very_many_fields_is_not_looked_at_to_its_end(again: bytes) -> None:
    assert f"{MOST_WITHIN} parts" in said_of(wire(2, again * 300_000 + BROKEN))


@pytest.mark.parametrize(
    "body",
    [b"\x0b" * 50_000, b"\x12", wire(2, b"\xff" * 50_000), wire(2, b"\x0a" + varint(1 << 62) + b"x" * 50_000)],
    ids=["groups", "cut", "a number without end", "a length beyond the record"],
)
def test_what_is_no_record_is_refused(body: bytes) -> None:
    assert "cannot be decoded" in said_of(body)


def test_as_much_as_an_event_has_is_taken() -> None:
    """A MiB of state, and the longest message."""
    text = v1.Value(string_value="x" * 900_000)
    assert "" == said_of(ops(wide_list(9_998).SerializeToString(), text.SerializeToString()))
    message = v1.Message(parts=[v1.Part(text="x" * 900, citations=[v1.Citation(uri="u", title="t")])] * 1000)
    record = v1.ExportRecord(event=v1.Event(sequence=1, message_added=message))
    assert "" == said_of(record.SerializeToString())
