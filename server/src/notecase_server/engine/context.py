"""What of a session the model is shown: the instruction, rendered over the state, the summary of what is long ago, and
the part of the history that fits.

The log is never cut; only the request is.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import msgspec
from notecase import v1

from notecase_server import errors
from notecase_server.engine import instructions
from notecase_server.engine.session import LiveSession
from notecase_server.engine.summary import Summary, in_effect
from notecase_server.engine.tokens import Gauge
from notecase_server.engine.transcripts import Transcript, Transcripts
from notecase_server.models.contract import MUCH_BYTES, looked_at, texts_of
from notecase_server.store.contract import History, Page, Query, Scope, SessionKey, StateStore, StepKey

PAGE = 500
"""Messages read at a time."""

FEW = 50
"""Messages read first, since they may be enough. They also tell how this conversation's text falls into tokens."""

MAX_KEYS = 1000
"""Entries of one state that a template may see when it names them only at run time."""


KEYS_AT_ONCE = 16
"""Of the keys that a template names, so many are read at once: each may have a page."""

MAX_STATE_BYTES = 16 << 20
"""Of the values of all these keys in one state: several times what a template may do with them."""


class Shown(History, StateStore, Protocol):
    """Holds what a model is shown."""


class Newest(msgspec.Struct, frozen=True):
    """The newest messages of a session while its log ended at `head`."""

    head: int
    page: Page[v1.Message]


class Content(msgspec.Struct, frozen=True):
    """What of a session a request has."""

    instruction: str
    messages: Sequence[v1.Message]
    texts: Sequence[str] | None
    """See ModelRequest.texts."""
    size: int
    """See ModelRequest.size."""


def read_first(context: v1.Context) -> int:
    """Returns how many of a session's messages are read first for a request; 0 where other runs' are not shown."""
    return 0 if context.stateless else min(context.max_messages or FEW, FEW)


def to_read(transcripts: Transcripts, key: SessionKey, session: v1.Session, context: v1.Context) -> int:
    """Returns how many messages the commit of a start is to read for the run's first request: none where all of the
    session's are shown and kept here. Where they are dropped before the request is built, it reads them itself."""
    all_kept = transcripts.holds(key, session.last_sequence) and shows_all(context, session.summary_sequence, 0)
    return 0 if all_kept else read_first(context)


async def build(
    store: Shown,
    live: LiveSession,
    run: str,
    agent: v1.Agent,
    summary: int = 0,
    most_tokens: int = 0,
    newest: Page[v1.Message] | None = None,
) -> Content:
    """Returns what the request for the next model call of `run` has of the session. `summary` is the sequence of the
    session's summary; `most_tokens` bounds the messages in addition to the agent's own limits; 0 for neither. `newest`
    is the page of `read_first` messages where it has been read already.

    Raises NotecaseError TEMPLATE_ERROR when the instruction exceeds its limits over this state."""
    key, context = live.key, agent.llm.context
    instruction = await _instruction(store, key, live.user, agent.llm.instruction)
    if shows_all(context, summary, most_tokens):
        whole = await _transcript(store, live, newest)
        first, texts = _first(whole.messages), whole.texts
        return Content(instruction, whole.messages[first:], texts and texts[first:], whole.size)
    told = None if context.stateless else await in_effect(store, key, summary)
    messages, size = await shown(store, key, context, run, told, most_tokens, newest)
    return Content(instruction, messages, await _texts(messages, size), size)


def shows_all(context: v1.Context, summary: int, most_tokens: int) -> bool:
    """Whether the model is shown every message of the session, however many there are."""
    limited = context.max_messages or context.max_tokens or most_tokens
    return not (context.stateless or summary or limited)


async def _transcript(store: History, live: LiveSession, newest: Page[v1.Message] | None) -> Transcript:
    """Returns all messages of a session, of which `newest` may have been read. Those of a session that has more than a
    first page are kept from turn to turn."""
    if (found := live.transcript()) is not None:
        return found
    head, page = live.head, newest
    if page is None:
        page = await store.list_messages(live.key, Query(FEW), newest_first=True)
    goes_on, messages, size = page.next is not None, list(page.rows), page.size
    while page.next is not None:
        page = await store.list_messages(live.key, Query(PAGE, page.next), newest_first=True)
        messages += page.rows
        size += page.size
    messages.reverse()
    found = Transcript(messages, await _texts(messages, size), size)
    if goes_on:
        live.keep(found, head)
    return found


async def _texts(messages: Sequence[v1.Message], size: int) -> Sequence[str] | None:
    """Returns what `texts_of` does, in a thread for messages of many bytes."""
    return await asyncio.to_thread(texts_of, messages) if size > MUCH_BYTES else texts_of(messages)


async def _instruction(store: StateStore, key: SessionKey, user: str, source: str) -> str:
    parsed = await instructions.parsed(source)
    if parsed is None:
        return _unless_blank(source)
    values: dict[str, dict[str, v1.Value]] = {}
    for kind, wanted in parsed.keys.items():
        values[kind] = {}
        if wanted == frozenset() or (scope := _scope(kind, key, user)) is None:
            continue
        if wanted is None:
            state, _ = await store.list_state(scope, Query(MAX_KEYS))
        else:
            state = await _named(store, scope, sorted(wanted))
        values[kind] = {name: entry.value for name, entry in state.entries.items()}
    return _unless_blank(await parsed.rendered(values))


def _unless_blank(instruction: str) -> str:
    """Returns the instruction, or nothing: providers refuse a message of blanks."""
    return instruction if instruction.strip() else ""


def _scope(kind: str, key: SessionKey, user: str) -> Scope | None:
    if kind == "session":
        return key.state
    if kind == "user":
        return Scope(key.tenant, "user", user.removeprefix("users/")) if user else None
    return Scope(key.tenant, "app", "")


async def _named(store: StateStore, scope: Scope, keys: Sequence[str]) -> v1.State:
    """Returns these entries of a state, all as of one version unless it changes again and again meanwhile. Raises
    TEMPLATE_ERROR when they are larger than MAX_STATE_BYTES together."""
    for last in (False, False, True):
        state, size = v1.State(), 0
        for at in range(0, len(keys), KEYS_AT_ONCE):
            read = await store.get_state(scope, keys[at : at + KEYS_AT_ONCE])
            if at and read.version != state.version and not last:
                break
            size += read.ByteSize()
            if size > MAX_STATE_BYTES and len(keys) > KEYS_AT_ONCE:
                told = f"The values of the keys that the instruction names in {scope.kind} state are larger than"
                raise errors.template_error(f"{told} {MAX_STATE_BYTES} bytes together.")
            state.MergeFrom(read)
        else:
            return state
    raise AssertionError("the last try returns or raises")


async def shown(
    store: History,
    key: SessionKey,
    context: v1.Context,
    run: str,
    summary: Summary | None = None,
    most_tokens: int = 0,
    newest: Page[v1.Message] | None = None,
) -> tuple[list[v1.Message], int]:
    """Returns the summary, then the newest messages that it does not cover and that fit the limits, oldest first: at
    most `most_tokens` of them, too, unless that is 0. They begin with what a user or the system said, unless a reply
    follows what the summary covers, and hold the newest message of a user with all that follows it, whatever the limits
    are. Returns with them how many bytes they have at most."""
    told = [summary.message] if summary else []
    covered = summary.last_sequence if summary else 0
    room = _Window(context.max_messages, min(filter(None, (context.max_tokens, most_tokens)), default=0))
    step = StepKey(run) if context.stateless else None
    page = newest
    if page is None:
        page = await store.list_messages(key, Query(read_first(context) or PAGE), newest_first=True, step=step)
    gauge = await looked_at(page.rows, page.size, partial(Gauge, page.rows if room.tokens else ()))
    size = page.size
    room.used = sum(map(gauge.tokens, told))
    while True:
        all_taken = await looked_at(page.rows, page.size, partial(room.take_all, page.rows, covered, gauge))
        if not all_taken or page.next is None or room.full:
            if all_taken and step is not None and page.next is None and room.answers_others:
                before, bytes_before = await _said_before(store, key, room.newest)
                room.newest, size = room.newest + before, size + bytes_before
            taken = room.newest[::-1]
            return told + (taken if room.joins_summary else taken[_first(taken) :]), size
        page = await store.list_messages(key, Query(PAGE, page.next), newest_first=True, step=step)
        size += page.size


async def _said_before(store: History, key: SessionKey, newest: Sequence[v1.Message]) -> tuple[list[v1.Message], int]:
    """Returns what a run answers that began without messages: the newest message of a user before those of the run, and
    what follows it, at most PAGE messages, newest first; and how many bytes they have at most."""
    found, size = list[v1.Message](), 0
    after: tuple[str | int, ...] | None = (newest[-1].sequence,) if newest else None
    while True:
        page = await store.list_messages(key, Query(FEW, after), newest_first=True)
        size += page.size
        for message in page.rows:
            found.append(message)
            if message.role == v1.Message.ROLE_USER or len(found) == PAGE:
                return found, size
        if page.next is None:
            return found, size
        after = page.next


class _Window:
    """What is shown of a history as it is read, newest first. Limits of 0 are none."""

    def __init__(self, messages: int, tokens: int) -> None:
        self.messages = messages
        self.tokens = tokens
        self.used = 0
        """Tokens."""
        self.newest: list[v1.Message] = []
        self.joins_summary = False
        """The messages taken are all that the summary does not cover."""
        self._heard = False
        """A message of a user is in."""

    @property
    def full(self) -> bool:
        """Nothing more fits, however short."""
        return self._heard and 0 < self.messages <= len(self.newest)

    @property
    def answers_others(self) -> bool:
        """The first message taken is a reply, or none was: what it answers is not among them."""
        return not self.newest or self.newest[-1].role == v1.Message.ROLE_ASSISTANT

    def take_all(self, messages: Sequence[v1.Message], covered: int, gauge: Gauge) -> bool:
        """Takes the messages, up to the first that does not fit or is not behind the sequence `covered`; returns
        whether all were taken."""
        for message in messages:
            if message.sequence <= covered:
                self.joins_summary = True
                return False
            if not self.take(message, gauge):
                return False
        return True

    def take(self, message: v1.Message, gauge: Gauge) -> bool:
        """Takes the message, or says that it does not fit."""
        if self.tokens:
            self.used += gauge.tokens(message)
        if self._heard and (0 < self.messages <= len(self.newest) or 0 < self.tokens < self.used):
            return False
        self.newest.append(message)
        self._heard = self._heard or message.role == v1.Message.ROLE_USER
        return True


def _first(messages: Sequence[v1.Message]) -> int:
    """Returns the index of the first message to show. A reply whose question was cut off is cut off too, unless nothing
    else would be left."""
    for index, message in enumerate(messages):
        if message.role != v1.Message.ROLE_ASSISTANT:
            return index
    return 0
