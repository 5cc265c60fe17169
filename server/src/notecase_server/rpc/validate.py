"""Is it well formed? Every request is looked at here before anything else happens, and all that is wrong is told at
once, within a budget: what has the wrong size or number is not looked into, and MAX_VIOLATIONS end the look.

Whether it may happen at this moment is not asked here.
"""

import asyncio
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from notecase import v1

from notecase_server import errors, names
from notecase_server.auth import rights
from notecase_server.auth.principal import Role
from notecase_server.engine import instructions
from notecase_server.engine.content import MAX_MESSAGE_BYTES, MAX_PART_BYTES, is_large
from notecase_server.engine.summary import BATCH, KEEP_RECENT
from notecase_server.errors import NotecaseError, Violation
from notecase_server.names import AgentName, MessageName, RunName
from notecase_server.rpc.caller import caller
from notecase_server.store.contract import LAST_SECOND, PAGE_BYTES, Scope
from notecase_server.store.fold import MAX_KEY_BYTES, MAX_VALUE_DEPTH, RESERVED_KEYS
from notecase_server.tools import naming
from notecase_server.tools.contract import Toolbox

T = TypeVar("T")

MAX_VIOLATIONS = 100
"""Told of one request; nobody mends more at a time."""
MAX_VALUES = 10_000
"""Values within the values of one request: each takes about a microsecond to look at, while nobody else is served."""
LIST_PRICE = 2
"""What a list or map counts for among them."""
BLOB_PRICE = 10
"""What a reference to content counts for among them: the store is asked for each."""
SETTLED_BYTES = 4 << 10
"""A request from this size on is carried out in another step of the loop than that in which it was looked at."""
ALONE_BYTES = 64 << 10
"""JSON from this size on is looked at by itself, in a thread."""
MAX_PARTS = 1000
"""Of a message or result."""
MAX_ALL_PARTS = 2000
"""Of all messages of one request: each takes some 5 microseconds to look at and to take in."""
MAX_ALL_LABELS = 1000
"""Of all messages of one request."""
MAX_FETCHED = 100
"""Parts of one request for each of which the store is asked: content that becomes a blob, and keys of state."""

MAX_NAME = 512
"""Characters of a resource's name, more than the longest has."""
MAX_FALLBACKS = 8
MAX_LABELS = 64
MAX_LABEL_BYTES = 256
MAX_TEXT_BYTES = 4 << 10
"""Of a display name, a reason, a media type: what a person reads at once."""
MAX_MESSAGES = 100
MAX_OPS = 1000
MAX_KEYS = 1000
MAX_ID_BYTES = 128
"""Of a request_id or command_id: room for any id scheme."""
MAX_SCHEMA_BYTES = 64 << 10
MAX_TOOLS = 128
"""What providers take in one request."""
MAX_CLIENT_TOOLS_BYTES = 256 << 10
"""Limit for all client tools of a run together: every answer about the run holds them."""
MAX_RESULT_BYTES = 512 << 10
"""Of the text of one call's result, which is in every later request. Its media become blobs."""
MAX_RECENT = 500
"""Messages beside a summary, of each kind."""
MAX_BATCH_DELAY = 10.0
"""Seconds."""

MAX_CHUNK_BYTES = 1 << 20
JSON_RULE = "must be JSON text (RFC 8259)"
PARTS = "text, json, file, data, blob or state_key"
MAX_SECONDS = 100 * 366 * 24 * 60 * 60
"""Of any span of time: a hundred years."""

UID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
INPUT_ROLES = (v1.Message.ROLE_USER, v1.Message.ROLE_SYSTEM)
"""Of the messages that callers give to a run."""
LABEL_KEY = re.compile(r"[a-z0-9A-Z]([a-zA-Z0-9._/-]{0,61}[a-zA-Z0-9])?")
PLAIN = frozenset({"null_value", "bool_value", "int_value", "string_value", "bytes_value"})
"""Kinds of value of which any is fine."""
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MEDIA_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,126}/[a-z0-9][a-z0-9!#$&^_.+-]{0,126}( *;.{0,200})?")


def _user() -> str:
    """The user that the caller is bound to, by its whole name."""
    who = caller.get(None)
    return who.user if who is not None and who.principal.user else ""


class Check:
    """Collects what is wrong with one request. Every method takes the field's path first and says nothing when all is
    well; `done` raises them all, and so does every method that finds the last one of the budget. What every start has
    is tested before a method is called: most requests are well formed, and a call costs as much as its test."""

    def __init__(self, most: int = MAX_VIOLATIONS) -> None:
        """`most` is the budget of violations."""
        self.violations: list[Violation] = []
        self.visited = 0
        """Values that were looked at so far, those within others too."""
        self.fetched = 0
        """Parts so far that the store is asked about one by one."""
        self._most = most
        self._alone: list[tuple[str, str]] = []
        """JSON that `settled` looks at, with its field."""
        self._templates: list[tuple[str, str]] = []
        """As `_alone`, of templates."""
        self._refusals: list[NotecaseError] = []
        self._missing: dict[str, Role] = {}
        """Fields that the caller may not set, each with the least role that may."""
        self._bound: dict[str, Role] = {}
        """The same of what a caller may not set that is bound to a user."""

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

    async def settled(self, request: Message) -> None:
        """As `done`, after a look at long JSON and at templates, and, unless the request is small, at the end of a step
        of the loop: what a request takes to look at and what it takes to carry out do not add up."""
        while self._alone:
            field, text = self._alone.pop(0)
            self(await asyncio.to_thread(_is_json, text), field, JSON_RULE)
        for field, source in () if self._missing or self._bound else self._templates:
            with self.taking():
                await instructions.parsed(source, field)
        self.done()
        if request.ByteSize() >= SETTLED_BYTES:
            await asyncio.sleep(0)

    def needs(self, role: Role, field: str) -> None:
        """Takes note of a field that only a caller of that role may set that is bound to no user."""
        if caller.get().user:
            self._bound[field] = role
        elif not rights.has(caller.get().principal.role, role):
            self._missing[field] = role

    def own(self, ok: bool, field: str) -> None:
        """Takes note of a field that a caller that is bound to a user has set to what `ok` says is not its own."""
        if not ok:
            self._bound[field] = Role.USER

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Takes in the violations for which the block is refused. A refusal that names no field goes through."""
        try:
            yield
        except NotecaseError as error:
            if not error.violations:
                raise
            self._refusals.append(error)
            self.violations += error.violations

    def within(self, other: "Check", fields: Iterable[str]) -> None:
        """Takes in what `other` found in these fields and below them."""
        below = tuple(f"{field}{mark}" for field in fields for mark in ".[")
        self._refusals += other._refusals
        for found in other.violations:
            if f"{found.field}.".startswith(below):
                self(False, *found)

    def _parsed(self, field: str, name: str, parse: Callable[[str], T | None], like: str, ids: str = "") -> T | None:
        """`like` is the pattern of the name, and `ids` says what its ids consist of."""
        parsed = parse(name) if 0 < len(name) <= MAX_NAME else None
        if parsed is None:
            given = re.findall(r"\{\w+\}", like)
            where = f", where {given[0] if len(given) == 1 else 'each id'} is {ids}" if ids else ""
            self(False, field, f"must be {like}{where}" + (f", not {name[:80]!r}" if name else ""))
        return parsed

    def agent(self, field: str, name: str) -> AgentName:
        return self._parsed(field, name, names.parse_agent, "agents/{agent}", names.ID_SHAPE) or AgentName("", 0)

    def session(self, field: str, name: str) -> str:
        return self._parsed(field, name, names.parse_session, "sessions/{session}", names.ID_SHAPE) or ""

    def user(self, field: str, name: str) -> str:
        return self._parsed(field, name, names.parse_user, "users/{user}", names.USER_SHAPE) or ""

    def run(self, field: str, name: str) -> RunName:
        like = "sessions/{session}/runs/{run}"
        return self._parsed(field, name, names.parse_run, like, names.ID_SHAPE) or RunName("", "")

    def message(self, field: str, name: str) -> MessageName:
        like = "sessions/{session}/messages/{message}"
        return self._parsed(field, name, names.parse_message, like, names.ID_SHAPE) or MessageName("", "")

    def state(self, field: str, tenant: str, name: str) -> Scope:
        like = "sessions/{session}/state, users/{user}/state or app/state"
        found = self._parsed(field, name, lambda text: names.parse_state(tenant, text), like)
        return found or Scope(tenant, "app", "")

    def chosen_id(self, field: str, value: str) -> None:
        """An id that the caller may choose, or leave to the server."""
        self(not value or names.is_id(value), field, names.ID_RULE)

    def uid(self, field: str, value: str) -> None:
        """The uid of a session, where one is given."""
        self(not value or UID.fullmatch(value) is not None, field, "must be a Session.uid, a UUID in lower case")

    def token_id(self, field: str, value: str) -> None:
        """A request_id or command_id."""
        if len(value.encode()) > MAX_ID_BYTES or not value.isprintable():
            self(False, field, f"must be at most {MAX_ID_BYTES} bytes of printable text")

    def text(self, field: str, value: str, limit: int = MAX_TEXT_BYTES) -> bool:
        return self(len(value) <= limit and len(value.encode()) <= limit, field, f"is longer than {limit} bytes")

    def json(self, field: str, value: str, like: str) -> bool:
        """A JSON object of at most MAX_SCHEMA_BYTES, "" for none; what is longer is not parsed."""
        short = self.text(field, value, MAX_SCHEMA_BYTES)
        return short and (not value or self(_is_json_object(value), field, f"must be {like}"))

    def choice(self, field: str, message: Message, name: str) -> None:
        """The value of an enum. A later contract may have more of them than this server."""
        number, enum = getattr(message, name), message.DESCRIPTOR.fields_by_name[name].enum_type
        known = enum is not None and number in enum.values_by_number
        self(known, f"{field}.{name}", f"is {number}, which this server does not know")

    def time(self, field: str, time: Timestamp) -> None:
        fine = 0 <= time.seconds <= LAST_SECOND and 0 <= time.nanos < 1_000_000_000
        self(fine, field, "must be a time from 1970 to 9999")

    def key_name(self, field: str, name: str) -> str:
        """The key's id."""
        return self._parsed(field, name, names.parse_key, "keys/{key}", names.UUID_SHAPE) or ""

    def principal(self, field: str, name: str) -> str:
        """The principal's id."""
        return self._parsed(field, name, names.parse_principal, "principals/{principal}", names.UUID_SHAPE) or ""

    def tenant(self, field: str, name: str) -> str:
        """The tenant's id."""
        return self._parsed(field, name, names.parse_tenant, "tenants/{tenant}", names.ID_SHAPE) or ""

    def labels(self, field: str, labels: Mapping[str, str]) -> None:
        if not labels:
            return
        self(len(labels) <= MAX_LABELS, field, f"has more than {MAX_LABELS} labels")
        self.needs(rights.LABELS, field)
        for key, value in islice(labels.items(), MAX_LABELS):
            if LABEL_KEY.fullmatch(key) is None:
                at = f"{field}[{key[:80]!r}]"
                self(False, at, "a label's key must be 1 to 63 letters, digits and inner . _ / -")
            if len(value.encode()) > MAX_LABEL_BYTES:
                self(False, f"{field}[{key[:80]!r}]", f"is longer than {MAX_LABEL_BYTES} bytes")

    def seconds(self, field: str, message: v1.InvokeRequest | v1.WaitRunRequest) -> float | None:
        """The field's duration; None when unset."""
        if not message.HasField("timeout"):
            return None
        self.duration(field, message.timeout)
        return message.timeout.seconds + message.timeout.nanos / 1e9

    def duration(self, field: str, value: Duration) -> bool:
        """A span of time: every deadline that is made with it has a date."""
        fine = 0 <= value.seconds <= MAX_SECONDS and 0 <= value.nanos < 1_000_000_000
        return self(fine, field, "must be 0 to 100 years, with nanos from 0 to 999999999")

    # ---- state

    def key(self, field: str, key: str, session: bool) -> None:
        size = len(key.encode())
        self(0 < size <= MAX_KEY_BYTES, field, f"must be 1 to {MAX_KEY_BYTES} bytes of UTF-8, not {size}")
        taken = session and key in RESERVED_KEYS
        self(not taken, field, f"{key!r} is reserved for other states in templates; choose another key")

    def value(self, field: str, value: v1.Value, depth: int = 1) -> None:
        if sound := _sound(value, depth, MAX_VALUES - self.visited):
            self.visited += sound
        else:
            self._tell(field, value, depth)

    def _tell(self, field: str, value: v1.Value, depth: int) -> None:
        """Finds what is wrong with a value, and where."""
        kind = value.WhichOneof("kind")
        self.visited += 1
        match kind:
            case None:
                self(False, field, "has no value; use null_value for null")
            case "blob_value":
                self.visited += BLOB_PRICE - 1
                few = self.visited <= MAX_VALUES
                self(
                    few,
                    field,
                    f"exceeds the {MAX_VALUES} values of one request, in which it counts as {BLOB_PRICE}",
                )
                self.blob(field, value.blob_value)
            case "double_value":
                fine = math.isfinite(value.double_value)
                self(fine, field, f"is {value.double_value}, which JSON and SQL do not have")
            case "list_value":
                self.visited += LIST_PRICE - 1
                inner = value.list_value.values
                if self._inner(field, len(inner), depth):
                    for index, item in enumerate(inner):
                        if item.WhichOneof("kind") in PLAIN:
                            self.visited += 1
                        else:
                            self._tell(f"{field}[{index}]", item, depth + 1)
            case "map_value":
                self.visited += LIST_PRICE - 1
                entries = value.map_value.values
                if self._inner(field, len(entries), depth):
                    for key, item in entries.items():
                        if item.WhichOneof("kind") in PLAIN:
                            self.visited += 1
                        else:
                            self._tell(f"{field}[{key[:80]!r}]", item, depth + 1)

    def _inner(self, field: str, number: int, depth: int) -> bool:
        """Whether the values within a value are to be looked at."""
        fine = self(depth <= MAX_VALUE_DEPTH, field, f"is more than {MAX_VALUE_DEPTH} levels deep")
        few = self.visited + number <= MAX_VALUES
        return self(few, field, f"exceeds the {MAX_VALUES} values of one request") and fine

    def first_state(self, field: str, state: Mapping[str, v1.Value]) -> None:
        """Keys to set in a session."""
        if not self(len(state) <= MAX_OPS, field, f"has more than {MAX_OPS} keys"):
            return
        size = sum(value.ByteSize() for value in state.values())
        if not self(size <= PAGE_BYTES, field, f"is larger than {PAGE_BYTES} bytes"):
            return
        for key, value in state.items():
            self.key(f"{field}[{key[:80]!r}]", key, session=True)
            self.value(f"{field}[{key[:80]!r}]", value)

    def ops(self, field: str, ops: Sequence[v1.StateOp], session: bool) -> None:
        if not self(0 < len(ops) <= MAX_OPS, field, f"must be 1 to {MAX_OPS} operations"):
            return
        if not self(sum(op.ByteSize() for op in ops) <= PAGE_BYTES, field, f"is larger than {PAGE_BYTES} bytes"):
            return
        seen: set[str] = set()
        for index, op in enumerate(ops):
            at = f"{field}[{index}]"
            self.key(f"{at}.key", op.key, session)
            self(op.key not in seen, f"{at}.key", "is named twice in one batch")
            seen.add(op.key)
            match op.WhichOneof("op"):
                case None:
                    self(False, at, "has no operation; use set, remove, increment or append")
                case "set":
                    self.value(f"{at}.set", op.set)
                case "append":
                    self.value(f"{at}.append", op.append, depth=2)

    # ---- messages

    def messages(
        self, field: str, messages: Sequence[v1.Message], roles: Collection[v1.Message.Role.ValueType]
    ) -> None:
        if len(messages) > MAX_MESSAGES:
            self(False, field, f"has more than {MAX_MESSAGES} messages")
            return
        messages = messages[:]  # each look into a repeated field makes its messages anew
        parts = labels = 0
        for message in messages:
            parts += min(len(message.parts), MAX_PARTS + 1)
            labels += len(message.labels)
        if parts > MAX_ALL_PARTS:
            self(False, field, f"has more than {MAX_ALL_PARTS} parts in all")
        elif labels > MAX_ALL_LABELS:
            self(False, field, f"has more than {MAX_ALL_LABELS} labels in all")
        else:
            for index, message in enumerate(messages):
                self._message(f"{field}[{index}]", message, roles)

    def _message(self, field: str, message: v1.Message, roles: Collection[v1.Message.Role.ValueType]) -> None:
        if message.role and message.role not in roles:
            known = [v1.Message.Role.Name(role) for role in roles]
            self(False, f"{field}.role", f"must be {' or '.join(known)}")
        if user := _user():
            self.own(message.author in {"", user}, f"{field}.author")
            self.own(message.role in {v1.Message.ROLE_UNSPECIFIED, v1.Message.ROLE_USER}, f"{field}.role")
        if message.author:
            speaks = names.parse_user(message.author) is not None or names.parse_agent(message.author) is not None
            self(speaks, f"{field}.author", "must be users/{user} or agents/{agent}")
        if message.labels:
            self.labels(f"{field}.labels", message.labels)
        parts = message.parts[: MAX_PARTS + 1]
        if not parts:
            self(False, f"{field}.parts", "is empty; a message needs at least one part")
        if len(parts) > MAX_PARTS:
            self(False, f"{field}.parts", f"has more than {MAX_PARTS} parts")
            return
        fetched, whole = 0, message.ByteSize()
        size = whole
        for part in parts:
            kind = part.WhichOneof("kind")
            if kind == "data" or (whole > MAX_PART_BYTES and is_large(part)):
                fetched += 1
                size -= part.ByteSize()
            elif kind == "state_key":
                fetched += 1
        if fetched and not self._fetched(f"{field}.parts", fetched):
            return
        if size > MAX_MESSAGE_BYTES:
            self(False, field, "is larger than 960 KiB, without the parts that become blobs")
            return
        for index, part in enumerate(parts):
            if not part.text or part.citations:
                self._part(f"{field}.parts[{index}]", part)

    def _fetched(self, field: str, number: int) -> bool:
        """Whether there is room for so many parts more that become blobs or name a key of state."""
        self.fetched += number
        told = f"exceeds the {MAX_FETCHED} parts with content or state keys of one request"
        return self.fetched <= MAX_FETCHED or self(False, field, told)

    def _part(self, field: str, part: v1.Part) -> None:
        self(not part.citations, f"{field}.citations", "are allowed only in messages of models")
        match part.WhichOneof("kind"):
            case "text":
                self(part.text != "", f"{field}.text", "is empty")
            case "json":
                if len(text := part.json) < ALONE_BYTES:
                    self(_is_json(text), f"{field}.json", JSON_RULE)
                else:
                    self._alone.append((f"{field}.json", text))
            case "file":
                fine = (
                    len(part.file.uri) <= MAX_TEXT_BYTES
                    and re.match(r"[a-z][a-z0-9+.-]*:\S", part.file.uri) is not None
                )
                self(fine, f"{field}.file.uri", "must be an absolute URI, such as https://example.org/plan.png")
                self._media_type(f"{field}.file.media_type", part.file.media_type)
                self.text(f"{field}.file.filename", part.file.filename)
            case "data":
                self(part.data.data != b"", f"{field}.data.data", "is empty")
                self._media_type(f"{field}.data.media_type", part.data.media_type)
                self.text(f"{field}.data.filename", part.data.filename)
            case "blob":
                self.blob(f"{field}.blob", part.blob)
            case "state_key":
                self.key(f"{field}.state_key", part.state_key, session=True)
            case None:
                self(False, field, f"is empty; use {PARTS}")
            case other:
                self(False, field, f"{other} is allowed only in messages of models; use {PARTS}")

    def blob(self, field: str, blob: v1.Blob) -> None:
        """A reference to content."""
        self._parsed(f"{field}.name", blob.name, names.parse_blob, "blobs/{sha256}")
        self._media_type(f"{field}.media_type", blob.media_type)
        self.text(f"{field}.filename", blob.filename)

    def blob_name(self, field: str, name: str) -> str:
        return self._parsed(field, name, names.parse_blob, "blobs/{sha256}") or ""

    def upload(self, first: v1.UploadBlobRequest) -> None:
        """The first frame of an upload."""
        self.token_id("upload_id", first.upload_id)
        self(first.offset >= 0, "offset", "is negative")
        self(first.upload_id != "" or first.offset == 0, "offset", "needs an upload_id")
        self(first.blob.size_bytes >= 0, "blob.size_bytes", "is negative")
        if first.blob.name:
            self.blob_name("blob.name", first.blob.name)
        if first.blob.media_type:
            self._media_type("blob.media_type", first.blob.media_type)
        self.text("blob.filename", first.blob.filename)

    def chunk(self, frame: v1.UploadBlobRequest) -> None:
        self(len(frame.chunk) <= MAX_CHUNK_BYTES, "chunk", f"has {len(frame.chunk)} bytes; at most {MAX_CHUNK_BYTES}")

    def _media_type(self, field: str, media_type: str) -> None:
        fine = len(media_type) <= MAX_TEXT_BYTES and MEDIA_TYPE.fullmatch(media_type) is not None
        self(fine, field, "must be a media type, such as image/png")

    # ---- agents, sessions, runs

    def agent_body(self, agent: v1.Agent, providers: Iterable[str], toolbox: Toolbox) -> None:
        if not self(agent.ByteSize() <= PAGE_BYTES, "agent", f"is larger than {PAGE_BYTES} bytes"):
            return
        self.text("agent.display_name", agent.display_name)
        self.text("agent.description", agent.description, 64 << 10)
        self.labels("agent.labels", agent.labels)
        if agent.output_key:
            self.key("agent.output_key", agent.output_key, session=True)
        if not self(agent.HasField("llm"), "agent.llm", "is required; an agent is a model with an instruction"):
            return
        llm = agent.llm
        self.text("agent.llm.model", llm.model)
        self._providers(llm, [name for name in providers if name])
        self(0 <= llm.max_model_calls <= 1000, "agent.llm.max_model_calls", "must be 0 (for 10) to 1000")
        self.context("agent.llm.context", llm.context)
        self._generation("agent.llm.generation", llm.generation)
        self.text("agent.llm.output_schema", llm.output_schema, MAX_SCHEMA_BYTES)
        self.tools("agent.llm.tools", llm.tools)
        for index, tool in enumerate(llm.tools[:MAX_TOOLS]):
            at = f"agent.llm.tools[{index}]"
            if tool.HasField("server"):
                known_functions = tool.server.function in toolbox.functions
                self(known_functions, f"{at}.server.function", f"this server has {', '.join(toolbox.functions)}")
            elif tool.HasField("mcp"):
                known_servers = ", ".join(toolbox.mcp_servers) or "none"
                self(tool.mcp.server in toolbox.mcp_servers, f"{at}.mcp.server", f"this server has {known_servers}")

    def _providers(self, llm: v1.LlmAgent, known: Sequence[str]) -> None:
        """Those that an agent names. One behind another of the same model would only be another repeat."""
        told = f"this server has {', '.join(known)}"
        self(not llm.provider or llm.provider in known, "agent.llm.provider", told)
        at = "agent.llm.fallbacks"
        if not self(len(llm.fallbacks) <= MAX_FALLBACKS, at, f"has more than {MAX_FALLBACKS}"):
            return
        seen = {(llm.provider or known[0], llm.model)}
        for index, fallback in enumerate(llm.fallbacks):
            named = (fallback.provider or known[0], fallback.model)
            self(named[0] in known, f"{at}[{index}].provider", told)
            self.text(f"{at}[{index}].model", fallback.model)
            self(named not in seen, f"{at}[{index}]", "appears twice, or is the agent's own")
            seen.add(named)

    def context(self, field: str, context: v1.Context) -> None:
        self(context.max_messages >= 0, f"{field}.max_messages", "is negative")
        self(context.max_tokens >= 0, f"{field}.max_tokens", "is negative")
        if not context.HasField("summary"):
            return
        self(not context.stateless, f"{field}.summary", "cannot be set together with stateless")
        self.kept(f"{field}.summary.keep_recent", context.summary.keep_recent)
        self.kept(f"{field}.summary.batch", context.summary.batch)
        self.text(f"{field}.summary.model", context.summary.model)
        self.text(f"{field}.summary.instruction", context.summary.instruction, MAX_SCHEMA_BYTES)
        uncovered = (context.summary.keep_recent or KEEP_RECENT) + (context.summary.batch or BATCH)
        fine = not 0 < context.max_messages < uncovered
        self(
            fine,
            f"{field}.max_messages",
            f"must be at least {uncovered}: fewer would hide messages that no summary covers yet",
        )

    def kept(self, field: str, number: int) -> None:
        """A number of messages that are shown or left as they are."""
        self(0 <= number <= MAX_RECENT, field, f"must be 0 (for the default) to {MAX_RECENT}")

    def tools(self, field: str, tools: Sequence[v1.Tool], only_client: bool = False) -> None:
        if not self(len(tools) <= MAX_TOOLS, field, f"has more than {MAX_TOOLS} tools"):
            return
        seen: set[str] = set()
        bounded = True
        for index, tool in enumerate(tools):
            at = f"{field}[{index}]"
            kind = tool.WhichOneof("implementation")
            unnamed = kind == "mcp" and not tool.name
            fine = unnamed or TOOL_NAME.fullmatch(tool.name) is not None
            self(fine, f"{at}.name", "must be 1 to 64 letters, digits, '_' or '-'")
            self(unnamed or tool.name not in seen, f"{at}.name", "appears twice")
            seen.add(tool.name)
            self(kind is not None, at, "has no implementation; set client, server or mcp")
            self(
                not only_client or kind == "client", at, "must be a client tool; other tools are declared by the agent"
            )
            self.text(f"{at}.description", tool.description, MAX_SCHEMA_BYTES)
            self.json(f"{at}.parameters", tool.parameters, "a JSON Schema of an object")
            self.choice(at, tool, "on_interrupt")
            self.choice(at, tool, "approver")
            self.duration(f"{at}.timeout", tool.timeout)
            few = len(tool.mcp.tools) <= MAX_TOOLS
            self(few, f"{at}.mcp.tools", f"has more than {MAX_TOOLS} names; leave it empty for all tools")
            lengths = {*map(len, tool.mcp.tools[:MAX_TOOLS])}
            short = lengths.isdisjoint({0}) and max(lengths, default=0) <= naming.OWN_LENGTH
            bounded &= self(short, f"{at}.mcp.tools", f"must be names of 1 to {naming.OWN_LENGTH} characters") and few
        if bounded:
            self._mcp_names(field, tools)

    def _mcp_names(self, field: str, tools: Sequence[v1.Tool]) -> None:
        """Whether tools of an MCP server get a name that another tool has, as far as the declarations tell."""
        taken = {tool.name: f"{field}[{index}]" for index, tool in enumerate(tools) if not tool.HasField("mcp")}
        whole: dict[str, bool] = {}
        for index, tool in enumerate(tools):
            if not tool.HasField("mcp"):
                continue
            at, server, listed = f"{field}[{index}]", tool.mcp.server, len(tool.mcp.tools) > 0
            for name in naming.declared(tool):
                fine = name not in taken
                self(fine, f"{at}.mcp.tools", f"has the name {name!r}, as {taken.get(name)} has; set a prefix")
                taken.setdefault(name, at)
            if not tool.name:
                fine = server not in whole or (listed and not whole[server])
                self(
                    fine, f"{at}.mcp.server", "appears twice without a prefix, so that its names appear twice; set one"
                )
                whole[server] = whole.get(server, False) or not listed

    def limits(self, field: str, limits: v1.Limits) -> None:
        self.duration(f"{field}.timeout", limits.timeout)
        self.duration(f"{field}.input_timeout", limits.input_timeout)
        for name in ("max_model_calls", "max_tool_calls", "max_total_tokens"):
            self(getattr(limits, name) >= 0, f"{field}.{name}", "is negative")

    def cancel(self, field: str, cancel: v1.CancelCommand) -> None:
        self.choice(field, cancel, "mode")
        self.text(f"{field}.reason", cancel.reason)
        self.text(f"{field}.call_id", cancel.call_id, MAX_ID_BYTES)

    def command(self, frame: v1.RunRequest) -> None:
        """A command to a session, other than `start`; what of it needs the session is looked at where it is read."""
        match frame.WhichOneof("command"):
            case "input":
                self.choice("input", frame.input, "when")
                self(len(frame.input.messages) > 0, "input.messages", "is empty")
                self.messages("input.messages", frame.input.messages, INPUT_ROLES)
            case "tool_result":
                self._tool_result("tool_result", frame.tool_result)
            case "input_response":
                self._input_response("input_response", frame.input_response)
            case "cancel":
                self.cancel("cancel", frame.cancel)
            case "update_state":
                name, kind = frame.update_state.name, "session"
                if name:
                    kind = self.state("update_state.name", "", name).kind
                if kind == "app":
                    self.needs(rights.APP_STATE, "update_state.name")
                self.ops("update_state.ops", frame.update_state.ops, session=kind == "session")
            case "attach":
                self(False, "command", "attach is allowed only in the first frame of a Run stream")
            case None:
                kinds = "start, input, tool_result, input_response, update_state or cancel"
                self(False, "command", f"has no command; use {kinds}")

    def _tool_result(self, field: str, result: v1.ToolResult) -> None:
        self(result.call_id != "", f"{field}.call_id", "is missing")
        self.text(f"{field}.call_id", result.call_id, MAX_ID_BYTES)
        self.text(f"{field}.error", result.error, MAX_SCHEMA_BYTES)
        self(not (result.error and result.result), f"{field}.error", "cannot be set together with a result")
        if not self(len(result.result) <= MAX_PARTS, f"{field}.result", f"has more than {MAX_PARTS} parts"):
            return
        fetched = sum(part.WhichOneof("kind") in {"data", "state_key"} for part in result.result)
        if fetched and not self._fetched(f"{field}.result", fetched):
            return
        size = sum(part.ByteSize() for part in result.result if not part.HasField("data"))
        if not self(size <= MAX_RESULT_BYTES, f"{field}.result", f"has {size} bytes; at most {MAX_RESULT_BYTES}"):
            return
        for index, part in enumerate(result.result):
            if not part.HasField("text"):  # an empty text is a result
                self._part(f"{field}.result[{index}]", part)

    def _input_response(self, field: str, response: v1.InputResponse) -> None:
        self(response.input_id != "", f"{field}.input_id", "is missing")
        self.text(f"{field}.input_id", response.input_id, MAX_ID_BYTES)
        self(response.decision != 0, f"{field}.decision", "is missing")
        self.choice(field, response, "decision")
        self.choice(field, response, "remember")
        self.text(f"{field}.answer", response.answer, MAX_RESULT_BYTES)
        self.text(f"{field}.reason", response.reason)
        short = self.text(f"{field}.edited_arguments", response.edited_arguments, MAX_RESULT_BYTES)
        if response.edited_arguments and short:
            approves = response.decision == v1.InputResponse.DECISION_APPROVE
            self(approves, f"{field}.edited_arguments", "needs DECISION_APPROVE")
            self(_is_json_object(response.edited_arguments), f"{field}.edited_arguments", "must be a JSON object")

    def _generation(self, at: str, generation: v1.Generation) -> None:
        for field in ("temperature", "top_p"):
            value = getattr(generation, field)
            self(math.isfinite(value) and value >= 0, f"{at}.{field}", "must be a number of at least 0")
        if generation.HasField("max_output_tokens"):
            self(generation.max_output_tokens > 0, f"{at}.max_output_tokens", "must be 1 or more")
        self(len(generation.stop) <= 16, f"{at}.stop", "has more than 16 sequences")
        for index, stop in enumerate(generation.stop[:16]):
            self(0 < len(stop) <= 256, f"{at}.stop[{index}]", "must be 1 to 256 characters")
        self.text(f"{at}.reasoning_effort", generation.reasoning_effort)
        self.json(f"{at}.extra", generation.extra, "a JSON object")

    def session_body(self, field: str, session: v1.Session, labels: bool = True) -> None:
        """`labels` says whether those of the session are set, or only came along."""
        self.text(f"{field}.display_name", session.display_name)
        if labels:
            self.labels(f"{field}.labels", session.labels)
        if session.agent:
            self.agent(f"{field}.agent", session.agent)
        if session.user:
            self.user(f"{field}.user", session.user)
            self.own(_user() in {"", session.user}, f"{field}.user")
        self.time(f"{field}.expire_time", session.expire_time)
        for name in ("ttl", "idle_ttl"):
            if session.HasField(name):
                span = getattr(session, name)
                if self.duration(f"{field}.{name}", span):
                    self(span.seconds > 0 or span.nanos > 0, f"{field}.{name}", "must be more than 0")
        both = session.HasField("idle_ttl") and session.HasField("ttl")
        self(not both, f"{field}.ttl", "cannot be set together with idle_ttl")

    def new_session(self, field: str, session: v1.Session) -> None:
        """As session_body, of one that is to be made."""
        self.session_body(field, session)
        both = session.HasField("idle_ttl") and session.HasField("expire_time")
        self(not both, f"{field}.expire_time", "cannot be set together with idle_ttl")

    def start(self, field: str, start: v1.StartRun) -> None:
        if start.if_session_uid:
            self.uid(f"{field}.if_session_uid", start.if_session_uid)
            self(start.session != "", f"{field}.if_session_uid", "needs a session that exists")
        if start.session:
            if not names.SESSION.fullmatch(start.session):
                self.session(f"{field}.session", start.session)
            if start.HasField("new_session"):
                self(False, f"{field}.new_session", "cannot be set together with session")
        elif start.HasField("new_session"):
            if start.new_session.name:
                self.session(f"{field}.new_session.name", start.new_session.name)
            self.new_session(f"{field}.new_session", start.new_session)
        if start.agent and not names.AGENT.fullmatch(start.agent):
            self.agent(f"{field}.agent", start.agent)
        if start.run_id:
            self.chosen_id(f"{field}.run_id", start.run_id)
        if start.state:
            self.first_state(f"{field}.state", start.state)
        if start.HasField("settings"):
            self._settings(f"{field}.settings", start.settings)
        if start.state or start.client_tools:
            held = sum(map(_entry_bytes, start.state.items())) + sum(tool.ByteSize() for tool in start.client_tools)
            self(held <= PAGE_BYTES, field, f"has a state and client_tools of more than {PAGE_BYTES} bytes together")
        if start.labels:
            self.labels(f"{field}.labels", start.labels)
        self.messages(f"{field}.messages", start.messages, INPUT_ROLES)
        if start.HasField("if_last_sequence"):
            self(start.if_last_sequence >= 0, f"{field}.if_last_sequence", "is negative")
        if start.HasField("rewind_to_sequence"):
            at = f"{field}.rewind_to_sequence"
            self(start.rewind_to_sequence >= 0, at, "is negative")
            self(start.session != "", at, "needs a session that exists")
            waits = start.on_busy in {v1.StartRun.ON_BUSY_QUEUE, v1.StartRun.ON_BUSY_ROLLBACK}
            self(not waits, at, "needs ON_BUSY_REJECT or ON_BUSY_INTERRUPT")
        if start.on_busy:
            self.choice(field, start, "on_busy")
        if start.HasField("options"):
            self.options(f"{field}.options", start.options)
        if start.client_tools:
            self._client_tools(f"{field}.client_tools", start.client_tools)
        if start.HasField("limits"):
            self.limits(f"{field}.limits", start.limits)
        if start.HasField("disconnect"):
            self.duration(f"{field}.disconnect.cancel_after", start.disconnect.cancel_after)

    def _client_tools(self, at: str, tools: Sequence[v1.Tool]) -> None:
        self.own(not _user(), at)
        few = self(len(tools) <= MAX_TOOLS, at, f"has more than {MAX_TOOLS} tools")
        size = sum(tool.ByteSize() for tool in tools) if few else 0
        if self(size <= MAX_CLIENT_TOOLS_BYTES, at, f"are together larger than {MAX_CLIENT_TOOLS_BYTES} bytes") and few:
            self.tools(at, tools, only_client=True)

    def _settings(self, field: str, settings: v1.RunSettings) -> None:
        self.needs(rights.RUN_SETTINGS, field)
        if not self(settings.ByteSize() <= PAGE_BYTES, field, f"is larger than {PAGE_BYTES} bytes"):
            return
        self.text(f"{field}.model", settings.model)
        self._generation(f"{field}.generation", settings.generation)
        self._templates.append((f"{field}.instruction", settings.instruction))

    def options(self, field: str, options: v1.WatchOptions) -> None:
        at = f"{field}.max_batch_delay"
        if self.duration(at, options.max_batch_delay):
            delay = options.max_batch_delay.seconds + options.max_batch_delay.nanos / 1e9
            self(delay <= MAX_BATCH_DELAY, at, f"must be 0 to {MAX_BATCH_DELAY:g} seconds")

    def watch(self, field: str, name: str, after: int, options: v1.WatchOptions, if_session_uid: str) -> RunName:
        """The session and the run, "" when a session is named."""
        self.uid(f"{field}if_session_uid", if_session_uid)
        self(after >= 0, f"{field}after_sequence", "is negative")
        self.options(f"{field}options", options)
        run = names.parse_run(name)
        if run is None:
            session = self._parsed(
                f"{field}name", name, names.parse_session, "sessions/{session} or sessions/{session}/runs/{run}"
            )
            return RunName(session or "", "")
        return run


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (ValueError, RecursionError):
        return False
    return True


def _is_json_object(text: str) -> bool:
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):
        return False
    return True


def _sound(value: v1.Value, depth: int, most: int) -> int:
    """What this value and those in it count for; 0 when one may be wrong, or when there are more than
    `most`. No path is made here, which takes longer than the look itself."""
    left, level = most - 1, [value]
    while level:
        inner: list[v1.Value] = []
        for each in level:
            kind = each.WhichOneof("kind")
            if kind in PLAIN:
                continue
            if kind == "list_value":
                listed = each.list_value.values
                left -= len(listed) + LIST_PRICE - 1
            elif kind == "map_value":
                mapped = each.map_value.values
                left -= len(mapped) + LIST_PRICE - 1
            elif kind == "double_value" and math.isfinite(each.double_value):
                continue
            else:
                return 0
            if left < 0 or depth > MAX_VALUE_DEPTH:
                return 0
            inner += listed if kind == "list_value" else mapped.values()
        level, depth = inner, depth + 1
    return most - left


def _entry_bytes(entry: tuple[str, v1.Value]) -> int:
    return len(entry[0].encode()) + entry[1].ByteSize()
