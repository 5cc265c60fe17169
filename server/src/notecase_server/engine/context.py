"""What of a session the model is shown: the instruction, rendered over the state, and the part of the history that
fits.

The log is never cut; only the request is.
"""

from notecase import v1

from notecase_server.engine import template
from notecase_server.models.contract import ModelRequest
from notecase_server.store.contract import Query, Scope, SessionKey, Store

PAGE = 500
"""Messages read at a time."""

MAX_KEYS = 1000
"""Entries of one state that a template may see when it names them only at run time."""

BYTES_PER_TOKEN = 4
"""A round figure for English and code; other scripts take more tokens a character, and more bytes too."""

MESSAGE_TOKENS = 4
"""What providers add for a message's role and frame."""


async def build(store: Store, key: SessionKey, user: str, run: str, agent: v1.Agent) -> ModelRequest:
    """The request for the next model call of `run`.

    Raises NotecaseError TEMPLATE_ERROR when the instruction exceeds its limits over this state."""
    llm = agent.llm
    instruction = await _instruction(store, key, user, llm.instruction)
    messages = await history(store, key, llm.context, run)
    return ModelRequest(llm.model, instruction, messages, llm.generation)


async def _instruction(store: Store, key: SessionKey, user: str, source: str) -> str:
    parsed = template.parse(source)
    scopes = {
        "session": Scope(key.tenant, "session", key.session),
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
            state = await store.get_state(scope, sorted(wanted))
        values[kind] = {name: entry.value for name, entry in state.entries.items()}
    return parsed.render(values)


async def history(store: Store, key: SessionKey, context: v1.Context, run: str) -> list[v1.Message]:
    """The newest messages that fit the context's limits, oldest first, beginning with what a user or the system
    said."""
    only = run if context.stateless else ""
    newest: list[v1.Message] = []
    tokens = 0
    after: tuple[str | int, ...] | None = None
    while True:
        room = context.max_messages - len(newest) if context.max_messages else PAGE
        page = await store.list_messages(key, Query(min(room, PAGE), after), newest_first=True, run=only)
        for message in page.rows:
            if context.max_tokens:
                tokens += estimate_tokens(message)
                if tokens > context.max_tokens and _heard(newest):
                    return _aligned(newest)
            newest.append(message)
        after = page.next
        if after is None or (context.max_messages and len(newest) >= context.max_messages):
            return _aligned(newest)


def estimate_tokens(message: v1.Message) -> int:
    """About what the model will count for a message. An estimate: the real count is the provider's own."""
    return MESSAGE_TOKENS + message.ByteSize() // BYTES_PER_TOKEN


def _heard(messages: list[v1.Message]) -> bool:
    return any(message.role == v1.Message.ROLE_USER for message in messages)


def _aligned(newest: list[v1.Message]) -> list[v1.Message]:
    """Oldest first. A reply whose question was cut off is cut off too, unless nothing else would be left."""
    messages = newest[::-1]
    for index, message in enumerate(messages):
        if message.role != v1.Message.ROLE_ASSISTANT:
            return messages[index:]
    return messages
