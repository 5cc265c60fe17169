"""What of a session the model is shown: the instruction, rendered over the state, the summary of what is long ago, and
the part of the history that fits.

The log is never cut; only the request is.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from notecase import v1

from notecase_server import errors
from notecase_server.engine import template
from notecase_server.engine.session import LiveSession
from notecase_server.engine.summary import Summary, in_effect
from notecase_server.engine.tokens import Gauge
from notecase_server.engine.transcripts import Transcript, is_only_text
from notecase_server.models.contract import ModelRequest
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


class Newest(NamedTuple):
    """The newest messages of a session while its log ended at `head`."""

    head: int
    page: Page[v1.Message]


def read_first(context: v1.Context) -> int:
    """Returns how many of a session's messages are read first for a request; 0 where other runs' are not shown."""
    return 0 if context.stateless else min(context.max_messages or FEW, FEW)


async def build(
    store: Shown,
    key: SessionKey,
    user: str,
    run: str,
    agent: v1.Agent,
    summary: int = 0,
    most_tokens: int = 0,
    newest: Page[v1.Message] | None = None,
    whole: Transcript | None = None,
) -> ModelRequest:
    """Builds the request for the next model call of `run`. `summary` is the sequence of the session's summary;
    `most_tokens` bounds the messages in addition to the agent's own limits; 0 for neither. `newest` is the page of
    `read_first` messages where it has been read already, and `whole` are all messages, where `shows_all` says that they
    are wanted.

    Raises NotecaseError TEMPLATE_ERROR when the instruction exceeds its limits over this state."""
    llm = agent.llm
    instruction = await _instruction(store, key, user, llm.instruction)
    told = None if llm.context.stateless else await in_effect(store, key, summary)
    if whole is not None and told is None:
        messages = _aligned(whole.messages)
        return ModelRequest(llm.model, instruction, messages, llm.generation, only_text=whole.only_text)
    messages = await shown(store, key, llm.context, run, told, most_tokens, newest)
    return ModelRequest(llm.model, instruction, messages, llm.generation, only_text=is_only_text(messages))


def shows_all(context: v1.Context, summary: int, most_tokens: int) -> bool:
    """Whether the model is shown every message of the session, however many there are."""
    limited = context.max_messages or context.max_tokens or most_tokens
    return not (context.stateless or summary or limited)


async def transcript(store: History, live: LiveSession, newest: Page[v1.Message] | None) -> Transcript | None:
    """Returns all messages of a session that has more than its `newest` page, kept from turn to turn; None where that
    page is all, or has not been read."""
    if (found := live.transcript()) is not None:
        return found
    if newest is None or newest.next is None:
        return None
    head, page, messages = live.head, newest, list(newest.rows)
    only_text = is_only_text(messages)
    while page.next is not None:
        page = await store.list_messages(live.key, Query(PAGE, page.next), newest_first=True)
        messages += page.rows
        only_text = only_text and is_only_text(page.rows)
    found = Transcript(messages[::-1], only_text)
    live.keep(found, head)
    return found


async def _instruction(store: StateStore, key: SessionKey, user: str, source: str) -> str:
    parsed = await template.parsed(source)
    scopes = {
        "session": key.state,
        "user": Scope(key.tenant, "user", user.removeprefix("users/")) if user else None,
        "app": Scope(key.tenant, "app", ""),
    }
    values: dict[str, dict[str, v1.Value]] = {}
    for kind, wanted in parsed.keys.items():
        scope = scopes[kind]
        values[kind] = {}
        if scope is None or wanted == frozenset():
            continue
        if wanted is None:
            state, _ = await store.list_state(scope, Query(MAX_KEYS))
        else:
            state = await _named(store, scope, sorted(wanted))
        values[kind] = {name: entry.value for name, entry in state.entries.items()}
    return await parsed.rendered(values)


async def _named(store: StateStore, scope: Scope, keys: Sequence[str]) -> v1.State:
    """Returns these entries of a state. Raises TEMPLATE_ERROR when they are larger than MAX_STATE_BYTES together."""
    state, size = v1.State(), 0
    for at in range(0, len(keys), KEYS_AT_ONCE):
        read = await store.get_state(scope, keys[at : at + KEYS_AT_ONCE])
        if len(keys) <= KEYS_AT_ONCE:
            return read
        size += read.ByteSize()
        if size > MAX_STATE_BYTES:
            told = f"The values of the keys that the instruction names in {scope.kind} state are larger than"
            raise errors.template_error(f"{told} {MAX_STATE_BYTES} bytes together.")
        state.MergeFrom(read)
    return state


async def shown(
    store: History,
    key: SessionKey,
    context: v1.Context,
    run: str,
    summary: Summary | None = None,
    most_tokens: int = 0,
    newest: Page[v1.Message] | None = None,
) -> list[v1.Message]:
    """Returns the summary, then the newest messages that it does not cover and that fit the limits, oldest first: at
    most `most_tokens` of them, too, unless that is 0. They begin with what a user or the system said, and hold the
    newest message of a user with all that follows it, whatever the limits are."""
    told = [summary.message] if summary else []
    covered = summary.last_sequence if summary else 0
    room = _Window(context.max_messages, min(filter(None, (context.max_tokens, most_tokens)), default=0))
    step = StepKey(run) if context.stateless else None
    page = newest
    if page is None:
        page = await store.list_messages(key, Query(read_first(context) or PAGE), newest_first=True, step=step)
    gauge = Gauge(page.rows if room.tokens else ())
    room.used = sum(map(gauge.tokens, told))
    while True:
        for message in page.rows:
            if message.sequence <= covered or not room.take(message, gauge):
                return told + _aligned(room.newest[::-1])
        if page.next is None or room.full:
            return told + _aligned(room.newest[::-1])
        page = await store.list_messages(key, Query(PAGE, page.next), newest_first=True, step=step)


class _Window:
    """What is shown of a history as it is read, newest first. Limits of 0 are none."""

    def __init__(self, messages: int, tokens: int) -> None:
        self.messages = messages
        self.tokens = tokens
        self.used = 0
        """Tokens."""
        self.newest: list[v1.Message] = []
        self._heard = False
        """A message of a user is in."""

    @property
    def full(self) -> bool:
        """Nothing more fits, however short."""
        return self._heard and 0 < self.messages <= len(self.newest)

    def take(self, message: v1.Message, gauge: Gauge) -> bool:
        """Takes the message, or says that it does not fit."""
        if self.tokens:
            self.used += gauge.tokens(message)
        if self._heard and (0 < self.messages <= len(self.newest) or 0 < self.tokens < self.used):
            return False
        self.newest.append(message)
        self._heard = self._heard or message.role == v1.Message.ROLE_USER
        return True


def _aligned(messages: Sequence[v1.Message]) -> list[v1.Message]:
    """The messages, oldest first. A reply whose question was cut off is cut off too, unless nothing else would be
    left."""
    for index, message in enumerate(messages):
        if message.role != v1.Message.ROLE_ASSISTANT:
            return list(messages[index:])
    return list(messages)
