"""Makes requests: extreme values for every kind of field, names of existing resources, and bytes that are almost
right."""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

INTEGERS = (0, 1, -1, 2, 7, 99, 100, 101, 1000, 1001, 1 << 20)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, math.nan, math.inf, -math.inf, 1e308, 5e-324)
BYTES = (b"", b"\0", b"\xff\xfe", b"notecase", bytes(range(256)), b"x" * 300_000)
SECONDS = (0, 1, -1, 60, 253_402_300_799, 253_402_300_800, 10**12, (1 << 63) - 1, -(1 << 63))
NANOS = (0, 1, -1, 999_999_999, 1_000_000_000, (1 << 31) - 1, -(1 << 31))

TEXTS = (
    *("", " ", "\0", "a\0b", "x", "é", "🔎" * 70, "\u2028", "\ufeff"),
    *("a" * 64, "x" * 257, "y" * 5000, "/" * 40, "%s", "'; --"),
    *("sessions/", "sessions/-", "sessions/..", "sessions/A", "users/", "users/ada"),
    *("app/state", "agents/x@0", "blobs/0", "x@1", "null", "{}", "[]", '"', "{", "true", "-1", "1e400"),
    *('{"type":"object"}', '{"a":1e999}', "[" * 3000, '{"$ref":"#"}'),
    *("{{ draft }}", "{% if %}", "{% for a in (1..9) %}{{ a }}{% endfor %}", "{{ user | join: app }}", "{{ a[", "{%"),
    *("user = x", "(", "NOT", "a.b.c = 1", 'labels."k" = "v"', "create_time > 2026-01-01T00:00:00Z"),
    *("state = RUNNING", "sequence desc", "create_time", "*", "llm.tools", "labels.a", "WzFd.AAAA"),
    *("/say hello", "/call lens {}", "/call ask_user {}", "/call lens {", "/fail midway", "/chunks 40", "/refuse no"),
    *("/reason hm /say so", "/call knock {} /call lens {}", "/stop length /call lens {}"),
    *("text/plain", "image/png", "a/b; c", "https://example.org/plan.png", "data:,x"),
)
"""What some field takes, or nearly takes."""

LIMITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}

UNKNOWN = (
    *(b"\xc0\x3e\x01", b"\xc1\x3e12345678", b"\xc2\x3e\x03abc", b"\xc3\x3e\xc4\x3e", b"\xc3\x3e" * 90),
    *(b"\xff" * 9 + b"\x01", b"\x80" * 20, b"\xc2\x3e\xff\xff\xff\xff\x0f"),
)
"""Field 1000 by each wire type, and tags and lengths that are too long."""

DEEPEST = 8
"""Levels of messages that are filled; what goes deeper is made by copying."""

KEPT = 40
"""Texts of each field that are remembered."""


class World:
    """What the server has said: names, ids and tokens that mean something to it."""

    def __init__(self) -> None:
        self.files: deque[bytes] = deque(maxlen=8)
        """Of exported sessions."""
        self._texts: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=KEPT))

    def hear(self, answer: Message) -> None:
        """Takes in every short text of an answer, by the name of its field."""
        for field, held in answer.ListFields():
            if field.cpp_type == field.CPPTYPE_MESSAGE:
                kind: Any = field.message_type
                if kind.GetOptions().map_entry:
                    continue
                for inner in held if field.is_repeated else [held]:
                    self.hear(inner)
            elif field.cpp_type == field.CPPTYPE_STRING:
                for plain in held if field.is_repeated else [held]:
                    self.keep(field.name, plain)

    def keep(self, field: str, plain: str) -> None:
        texts = self._texts[field]
        if len(plain) <= 600 and plain not in texts:
            texts.append(plain)

    def known(self, field: str) -> Sequence[str]:
        """Earlier values of fields of that name, or of fields whose names such a field accepts."""
        return [plain for name in (field, *ALIASES.get(field, ())) for plain in self._texts.get(name, ())]


ALIASES = {
    "name": ("session", "run", "message", "agent"),
    "session": ("name",),
    "parent": ("name", "session"),
    "run": ("name",),
    "agent": ("name",),
    "author": ("user", "agent"),
    "page_token": ("next_page_token",),
    "if_session_uid": ("uid", "session_uid"),
    "session_id": ("name",),
    "input_id": ("input_id", "cause_id"),
    "command_id": ("cause_id",),
}
"""Fields that take what others say."""


class Maker:
    """Makes values by one source of chance."""

    def __init__(self, chance: Random, world: World) -> None:
        self.chance = chance
        self.world = world

    def filled(self, message: Message, depth: int = 0) -> Message:
        """Fills a message's fields, each or not."""
        described: Any = message.DESCRIPTOR
        for field in described.fields:
            if self.chance.random() < (0.5 if depth < 2 else 0.25):
                self.fill(message, field, depth)
        return message

    def fill(self, message: Message, field: FieldDescriptor, depth: int = 0) -> None:
        """Sets one field to something."""
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            self._fill_map(getattr(message, field.name), kind, depth)
        elif field.is_repeated:
            self._fill_repeated(getattr(message, field.name), field, depth)
        elif kind is not None:
            if depth < DEEPEST:
                inner = getattr(message, field.name)
                inner.SetInParent()
                self._fill_message(inner, depth + 1)
        else:
            setattr(message, field.name, self.plain(field))

    def _fill_message(self, message: Message, depth: int) -> None:
        name = message.DESCRIPTOR.full_name
        if name in {"google.protobuf.Duration", "google.protobuf.Timestamp"}:
            message.seconds, message.nanos = self.chance.choice(SECONDS), self.chance.choice(NANOS)  # type: ignore[attr-defined]
        else:
            self.filled(message, depth)

    def _fill_map(self, held: Any, kind: Descriptor, depth: int) -> None:
        key, value = kind.fields_by_name["key"], kind.fields_by_name["value"]
        for _ in range(self.chance.choice((1, 1, 2, 70))):
            if value.message_type is None:
                held[self.plain(key)] = self.plain(value)
            elif depth < DEEPEST:
                self._fill_message(held[self.plain(key)], depth + 1)

    def _fill_repeated(self, held: Any, field: FieldDescriptor, depth: int) -> None:
        many = self.chance.random() < 0.03
        if field.message_type is None:
            held.extend([self.plain(field) for _ in range(self.chance.choice((1, 2, 3)))] * (1000 if many else 1))
        elif depth < DEEPEST:
            for _ in range(self.chance.choice((1, 1, 2, 3))):
                self._fill_message(held.add(), depth + 1)
            if many:
                held.extend([held[-1]] * 1000)

    def plain(self, field: FieldDescriptor) -> Any:
        """A value that protobuf takes for a field that is no message."""
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
                return self.chance.choice(BYTES)
            case FieldDescriptor.CPPTYPE_STRING:
                return self.text(field.name)
            case FieldDescriptor.CPPTYPE_BOOL:
                return self.chance.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return self.chance.choice(FLOATS)
            case FieldDescriptor.CPPTYPE_ENUM:
                known = [value.number for value in field.enum_type.values]  # type: ignore[union-attr]
                return self.chance.choice((*known, *known, -1, 99, (1 << 31) - 1))
            case kind:
                least, most = LIMITS[kind]
                return max(least, self.chance.choice((*INTEGERS, least, most)))

    def text(self, field: str) -> str:
        """A text of a field of that name: often one that the server knows."""
        known = self.world.known(field)
        if known and self.chance.random() < 0.7:
            return self.chance.choice(known)
        return self.chance.choice(TEXTS)

    def changed(self, message: Message) -> Message:
        """Returns a copy with some field, at any depth, changed, emptied, doubled or multiplied."""
        made = type(message)()
        made.CopyFrom(message)
        at, depth = made, 0
        while self.chance.random() < 0.7:
            inner = [held for _, held in _within(at)]
            if not inner:
                break
            at, depth = self.chance.choice(inner), depth + 1
        described: Any = at.DESCRIPTOR
        fields = list(described.fields)
        if fields:
            field = self.chance.choice(fields)
            if self.chance.random() < 0.25:
                at.ClearField(field.name)
            else:
                self.fill(at, field, depth)
        return made

    def damaged(self, frame: bytes) -> bytes:
        """The bytes of a message with something wrong with them."""
        ways: tuple[Callable[[bytes], bytes], ...] = (
            self._flipped,
            self._cut,
            self._doubled,
            self._inserted,
            self._unknown,
            self._retyped,
        )
        for _ in range(self.chance.choice((1, 1, 2, 4))):
            frame = self.chance.choice(ways)(frame)
        return frame

    def _flipped(self, frame: bytes) -> bytes:
        made = bytearray(frame)
        for _ in range(min(len(made), self.chance.choice((1, 2, 8)))):
            made[self.chance.randrange(len(made))] ^= 1 << self.chance.randrange(8)
        return bytes(made)

    def _cut(self, frame: bytes) -> bytes:
        return frame[: self.chance.randint(0, len(frame))]

    def _doubled(self, frame: bytes) -> bytes:
        start = self.chance.randint(0, len(frame))
        return frame + frame[start : start + self.chance.choice((1, 10, 1000))]

    def _inserted(self, frame: bytes) -> bytes:
        at = self.chance.randint(0, len(frame))
        return frame[:at] + self.chance.randbytes(self.chance.choice((1, 4, 40))) + frame[at:]

    def _unknown(self, frame: bytes) -> bytes:
        """A field that is not declared."""
        return frame + self.chance.choice(UNKNOWN)

    def _retyped(self, frame: bytes) -> bytes:
        """A tag with another wire type."""
        if not frame:
            return b"\x0f"
        return bytes([frame[0] & 0xF8 | self.chance.randrange(8)]) + frame[1:]


def _within(message: Message) -> list[tuple[str, Message]]:
    """The messages that are set in this one."""
    found = []
    for field, held in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is not None:
                found += [(field.name, inner) for inner in list(held.values())[:3]]
        elif field.is_repeated:
            found += [(field.name, inner) for inner in held[:3]]
        else:
            found.append((field.name, held))
    return found


def parsed(kind: type[Message], frame: bytes) -> Message | None:
    try:
        return kind.FromString(frame)
    except DecodeError:
        return None
