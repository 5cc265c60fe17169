"""Collects the mistakes in a request, field by field, so that one refusal names all of them. The work has a budget: a
list or text of the wrong size is not checked further, and the check ends at MAX_VIOLATIONS.
"""

import asyncio
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from notecase import v1

from notecase_server import errors, names
from notecase_server.auth import rights
from notecase_server.auth.principal import Role
from notecase_server.engine import instructions
from notecase_server.errors import NotecaseError, Violation
from notecase_server.names import AgentName, MessageName, RunName
from notecase_server.rpc.caller import caller, frame_bytes
from notecase_server.store.contract import LAST_SECOND, PAGE_BYTES, Scope
from notecase_server.store.fold import MAX_KEY_BYTES, MAX_VALUE_DEPTH, RESERVED_KEYS

T = TypeVar("T")

MAX_VIOLATIONS = 100
"""Violations reported for one request."""
MAX_VALUES = 10_000
"""Values within the values of one request: each takes about a microsecond, during which no other call is served."""
LIST_PRICE = 2
"""What a list or map counts for among MAX_VALUES."""
BLOB_PRICE = 10
"""How much a reference to content counts towards MAX_VALUES: each costs a read of the store."""
MAX_FETCHED = 100
"""Parts of one request that the store is asked about one by one: content that becomes a blob, and keys of state."""
SETTLED_BYTES = 4 << 10
"""A request of this size or more is carried out in another step of the loop than its check."""
ALONE_BYTES = 64 << 10
"""JSON of this size or more is parsed in a thread."""

MAX_NAME = 512
"""Characters of a resource's name; the longest valid one is shorter."""
MAX_ID_BYTES = 128
"""Bytes of a request_id or command_id: room for any id scheme."""
MAX_TEXT_BYTES = 4 << 10
"""Bytes of a text that a person reads at once, such as a display name or a reason."""
MAX_SCHEMA_BYTES = 64 << 10
MAX_RESULT_BYTES = 512 << 10
"""Bytes of the text of one call's result, which is in every later request to the model. Its media become blobs."""
TEXT_BYTES = {
    **dict.fromkeys(("call_id", "input_id"), MAX_ID_BYTES),
    **dict.fromkeys(("description", "error", "instruction", "output_schema"), MAX_SCHEMA_BYTES),
    **dict.fromkeys(("answer", "edited_arguments"), MAX_RESULT_BYTES),
}
"""Limits of text fields by name; all others have MAX_TEXT_BYTES."""
MAX_LABELS = 64
MAX_LABEL_BYTES = 256
MAX_SECONDS = 100 * 366 * 24 * 60 * 60
"""Seconds of a duration: a hundred years."""

JSON_RULE = "must be JSON text (RFC 8259)"
UID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
LABEL_KEY = re.compile(r"[a-z0-9A-Z]([a-zA-Z0-9._/-]{0,61}[a-zA-Z0-9])?")
MEDIA_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,126}/[a-z0-9][a-z0-9!#$&^_.+-]{0,126}( *;.{0,200})?")
PLAIN = frozenset({"null_value", "bool_value", "int_value", "string_value", "bytes_value"})
"""Kinds of value that are always valid."""


def _is_below(found: Violation, fields: Sequence[str]) -> bool:
    """Whether it is about one of these fields, or a part of one."""
    return f"{found.field}.".startswith(tuple(f"{field}{mark}" for field in fields for mark in ".["))


def _name(parse: Callable[[str], T | None], nothing: T, like: str, ids: str = "") -> Callable[["Check", str, str], T]:
    """Returns a method that checks a resource's name and returns its ids, or `nothing` for a wrong name. `like` is the
    pattern of the name, and `ids` says what its ids consist of."""
    return lambda check, field, name: check.parsed(field, name, parse, like, ids) or nothing


class Check:
    """The violations of one request. Every method takes the field's path first and does nothing if the field is valid.
    `done` raises all violations together; so does the method that finds the last one of the budget.

    Most requests are valid and a call costs as much as its test, so `validate` tests what every start has before it
    calls a method."""

    def __init__(self, most: int = MAX_VIOLATIONS) -> None:
        """`most` is the budget of violations."""
        self.violations: list[Violation] = []
        self.visited = 0
        """Values looked at so far, including those within others."""
        self.fetched = 0
        """Parts so far that the store is asked about one by one."""
        self._most = most
        self._alone: list[tuple[str, str]] = []
        """Fields with long JSON, which `settled` parses."""
        self._templates: list[tuple[str, str]] = []
        """Fields with templates, which `settled` parses."""
        self._refusals: list[NotecaseError] = []
        self._missing: dict[str, Role] = {}
        """Fields that the caller may not set, each with the least role that may."""
        self._bound: dict[str, Role] = {}
        """Fields that the caller may not set since it is bound to a user."""

    def __call__(self, ok: bool, field: str, description: str) -> bool:
        if not ok:
            self.violations.append(Violation(field, description))
            if len(self.violations) >= self._most:
                raise errors.invalid(self.violations)
        return ok

    def done(self) -> None:
        """Raises NotecaseError ROLE_MISSING with all fields that the caller may not set, or INVALID_FIELD with all that
        is wrong; the reason of a part that has its own, such as TEMPLATE_ERROR, when nothing else is."""
        if self._bound:
            raise errors.bound_to_user(max(self._bound.values()).name, self._bound)
        if self._missing:
            raise errors.role_missing(max(self._missing.values()).name, self._missing)
        for field, text in self._alone:
            self(_is_json(text), field, JSON_RULE)
        for refusal in self._refusals:
            if list(refusal.violations) == self.violations:
                raise refusal
        if self.violations:
            raise errors.invalid(self.violations)

    async def settled(self) -> None:
        """As `done`, after a look at long JSON and at templates. Unless the request is small, it returns in another
        step of the loop, so that the times to check a request and to carry it out do not add up."""
        while self._alone:
            field, text = self._alone.pop(0)
            self(await asyncio.to_thread(_is_json, text), field, JSON_RULE)
        for field, source in () if self._missing or self._bound else self._templates:
            with self.taking():
                await instructions.parsed(source, field)
        self.done()
        if frame_bytes.get() >= SETTLED_BYTES:
            await asyncio.sleep(0)

    def needs(self, role: Role, field: str) -> None:
        """Notes a field that may be set only by a caller that has the role and is bound to no user."""
        if caller.get().user:
            self._bound[field] = role
        elif not rights.has(caller.get().principal.role, role):
            self._missing[field] = role

    def own(self, ok: bool, field: str) -> None:
        """Notes a field that a caller bound to a user has set to something that is not its own, as `ok` says."""
        if not ok:
            self._bound[field] = Role.USER

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Adds the violations with which the block is refused. A refusal that names no field goes through."""
        try:
            yield
        except NotecaseError as error:
            if not error.violations:
                raise
            self._refusals.append(error)
            self.violations += error.violations

    def within(
        self, other: "Check", fields: Sequence[str], given: Sequence[str] = (), before: "Check | None" = None
    ) -> None:
        """Adds what `other` found in these fields and below them, except what `before` found in the same place already,
        unless that is in the fields `given` or below them. What is found of a whole message is always added: then
        nothing in it was checked."""
        known = {found for found in before.violations if "." in found.field} if before is not None else set()
        self._refusals += other._refusals
        for found in other.violations:
            if _is_below(found, fields) and (found not in known or _is_below(found, given)):
                self(False, *found)

    def parsed(self, field: str, name: str, parse: Callable[[str], T | None], like: str, ids: str = "") -> T | None:
        """Returns what `parse` makes of a resource's name; None for a wrong one. `like` and `ids` as in `_name`."""
        parsed = parse(name) if 0 < len(name) <= MAX_NAME else None
        if parsed is None:
            given = re.findall(r"\{\w+\}", like)
            where = f", where {given[0] if len(given) == 1 else 'each id'} is {ids}" if ids else ""
            self(False, field, f"must be {like}{where}" + (f", not {name[:80]!r}" if name else ""))
        return parsed

    agent = _name(names.parse_agent, AgentName("", 0), "agents/{agent}", names.ID_SHAPE)
    session = _name(names.parse_session, "", "sessions/{session}", names.ID_SHAPE)
    user = _name(names.parse_user, "", "users/{user}", names.USER_SHAPE)
    run = _name(names.parse_run, RunName("", ""), "sessions/{session}/runs/{run}", names.ID_SHAPE)
    message = _name(names.parse_message, MessageName("", ""), "sessions/{session}/messages/{message}", names.ID_SHAPE)
    key_name = _name(names.parse_key, "", "keys/{key}", names.UUID_SHAPE)
    principal = _name(names.parse_principal, "", "principals/{principal}", names.UUID_SHAPE)
    tenant = _name(names.parse_tenant, "", "tenants/{tenant}", names.ID_SHAPE)
    blob_name = _name(names.parse_blob, "", "blobs/{sha256}")

    def state(self, field: str, tenant: str, name: str) -> Scope:
        like = "sessions/{session}/state, users/{user}/state or app/state"
        found = self.parsed(field, name, lambda text: names.parse_state(tenant, text), like)
        return found or Scope(tenant, "app", "")

    def chosen_id(self, field: str, value: str) -> None:
        """Checks an id that the caller may choose, or leave to the server."""
        self(not value or names.is_id(value), field, names.ID_RULE)

    def uid(self, field: str, value: str) -> None:
        """Checks the uid of a session, where one is given."""
        self(not value or UID.fullmatch(value) is not None, field, "must be a Session.uid, a UUID in lower case")

    def token_id(self, field: str, value: str) -> None:
        """Checks a request_id or command_id."""
        if len(value.encode()) > MAX_ID_BYTES or not value.isprintable():
            self(False, field, f"must be at most {MAX_ID_BYTES} bytes of printable text")

    def fields(self, at: str, message: Any, *called: str) -> None:
        """Checks fields of the message at `at` by their types: text is short, a value of an enum is known (a later
        contract may have more), a duration or time has a date, and a number is not negative."""
        for name in called:
            field, value = f"{at}.{name}", getattr(message, name)
            enum = message.DESCRIPTOR.fields_by_name[name].enum_type
            match value:
                case str():
                    self.text(field, value, TEXT_BYTES.get(name, MAX_TEXT_BYTES))
                case Duration():
                    self.duration(field, value)
                case Timestamp():
                    self.time(field, value)
                case int() if enum is not None:
                    known = value in enum.values_by_number
                    self(known, field, f"is {value}, which this server does not know")
                case _:
                    self(value >= 0, field, "is negative")

    def text(self, field: str, value: str, limit: int = MAX_TEXT_BYTES) -> bool:
        return self(len(value) <= limit and len(value.encode()) <= limit, field, f"is longer than {limit} bytes")

    def media_type(self, field: str, value: str) -> None:
        if len(value) > MAX_TEXT_BYTES or MEDIA_TYPE.fullmatch(value) is None:
            self(False, field, "must be a media type, such as image/png")

    def few(self, field: str, held: Sized, most: int, what: str) -> bool:
        return self(len(held) <= most, field, f"has more than {most} {what}")

    def size(self, field: str, size: int) -> bool:
        return self(size <= PAGE_BYTES, field, f"is larger than {PAGE_BYTES} bytes")

    def fetches(self, field: str, number: int) -> bool:
        """Whether the request may have so many parts more that the store is asked about one by one."""
        self.fetched += number
        few = self.fetched <= MAX_FETCHED
        return self(few, field, f"exceeds the {MAX_FETCHED} parts with content or state keys of one request")

    def json(self, field: str, value: str) -> None:
        """Checks any JSON, long JSON later."""
        if len(value) < ALONE_BYTES:
            self(_is_json(value), field, JSON_RULE)
        else:
            self._alone.append((field, value))

    def json_object(self, field: str, value: str, like: str = "a JSON object") -> bool:
        """Checks a JSON object of at most MAX_SCHEMA_BYTES, "" for none; a longer one is not parsed."""
        short = self.text(field, value, MAX_SCHEMA_BYTES)
        return short and (not value or self(is_json_object(value), field, f"must be {like}"))

    def template(self, field: str, source: str) -> None:
        """Checks a template, later."""
        self._templates.append((field, source))

    def labels(self, field: str, labels: Mapping[str, str]) -> None:
        if not labels:
            return
        self.few(field, labels, MAX_LABELS, "labels")
        self.needs(rights.LABELS, field)
        for key, value in islice(labels.items(), MAX_LABELS):
            if LABEL_KEY.fullmatch(key) is None:
                at = f"{field}[{key[:80]!r}]"
                self(False, at, "a label's key must be 1 to 63 letters, digits and inner . _ / -")
            if len(value.encode()) > MAX_LABEL_BYTES:
                self(False, f"{field}[{key[:80]!r}]", f"is longer than {MAX_LABEL_BYTES} bytes")

    def time(self, field: str, time: Timestamp) -> None:
        fine = 0 <= time.seconds <= LAST_SECOND and 0 <= time.nanos < 1_000_000_000
        self(fine, field, "must be a time from 1970 to 9999")

    def duration(self, field: str, value: Duration) -> bool:
        """Checks a span of time: every deadline that is made with it has a date."""
        fine = 0 <= value.seconds <= MAX_SECONDS and 0 <= value.nanos < 1_000_000_000
        return self(fine, field, "must be 0 to 100 years, with nanos from 0 to 999999999")

    def seconds(self, field: str, message: v1.InvokeRequest | v1.WaitRunRequest) -> float | None:
        """Checks the message's timeout, and returns it in seconds; None when unset."""
        if not message.HasField("timeout"):
            return None
        self.duration(field, message.timeout)
        return in_seconds(message.timeout)

    def key(self, field: str, key: str, session: bool) -> None:
        """Checks a key of state; `session` says whether it is in a session's."""
        size = len(key.encode())
        self(0 < size <= MAX_KEY_BYTES, field, f"must be 1 to {MAX_KEY_BYTES} bytes of UTF-8, not {size}")
        taken = session and key in RESERVED_KEYS
        self(not taken, field, f"{key!r} is reserved for other states in templates; choose another key")

    def value(self, field: str, value: v1.Value, depth: int = 1) -> None:
        if sound := _sound(value, depth, MAX_VALUES - self.visited):
            self.visited += sound
        else:
            self._explain(field, value, depth)

    def _explain(self, field: str, value: v1.Value, depth: int) -> None:
        """Finds the mistakes in a value, with their places."""
        kind = value.WhichOneof("kind")
        self.visited += 1
        match kind:
            case None:
                self(False, field, "has no value; use null_value for null")
            case "blob_value":
                self.visited += BLOB_PRICE - 1
                few = self.visited <= MAX_VALUES
                counted = f"the {MAX_VALUES} values of one request, in which it counts as {BLOB_PRICE}"
                self(few, field, f"exceeds {counted}")
                self.blob(field, value.blob_value)
            case "double_value":
                fine = math.isfinite(value.double_value)
                self(fine, field, f"is {value.double_value}, which JSON and SQL do not have")
            case "list_value" | "map_value":
                self.visited += LIST_PRICE - 1
                held = getattr(value, kind).values
                fine = self(depth <= MAX_VALUE_DEPTH, field, f"is more than {MAX_VALUE_DEPTH} levels deep")
                few = self.visited + len(held) <= MAX_VALUES
                if self(few, field, f"exceeds the {MAX_VALUES} values of one request") and fine:
                    for key, item in enumerate(held) if kind == "list_value" else held.items():
                        if item.WhichOneof("kind") in PLAIN:
                            self.visited += 1
                        else:
                            at = repr(key[:80]) if isinstance(key, str) else key
                            self._explain(f"{field}[{at}]", item, depth + 1)

    def blob(self, field: str, blob: v1.Blob) -> None:
        """Checks a reference to content."""
        self.blob_name(f"{field}.name", blob.name)
        self.content(field, blob)

    def content(self, field: str, content: v1.Blob | v1.InlineData | v1.FileUri) -> None:
        """Checks the metadata of content."""
        self.media_type(f"{field}.media_type", content.media_type)
        if len(filename := content.filename) > MAX_TEXT_BYTES // 4:  # a character has at most four bytes
            self.text(f"{field}.filename", filename)


def in_seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _is_json(text: str, kind: Any = msgspec.Raw) -> bool:
    try:
        msgspec.json.decode(text, type=kind)
    except (ValueError, RecursionError):
        return False
    return True


def is_json_object(text: str) -> bool:
    return _is_json(text, dict[str, msgspec.Raw])


def _sound(value: v1.Value, depth: int, most: int) -> int:
    """What this value and those in it count for; 0 when one may be wrong, or when there are more than
    `most`. No path is made here, which takes longer than the look itself."""
    left, level = most - 1, [value]
    while level:
        inner: list[v1.Value] = []
        for each in level:
            kind = each.WhichOneof("kind")
            if kind in PLAIN or (kind == "double_value" and math.isfinite(each.double_value)):
                continue
            if kind not in {"list_value", "map_value"}:
                return 0
            held = getattr(each, kind).values
            left -= len(held) + LIST_PRICE - 1
            if left < 0 or depth > MAX_VALUE_DEPTH:
                return 0
            inner += held if kind == "list_value" else held.values()
        level, depth = inner, depth + 1
    return most - left
