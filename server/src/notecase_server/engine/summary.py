"""A rolling summary: the older messages of a session in a model's words, as an event that covers a range of them.

Each continues the one before it, so that a turn reads one summary and what came after it, however long the session is.
Nothing is durable but that event: a call of the model whose summary was not committed has had no effect, and a range
that was read stands, whatever is said meanwhile, unless it was summarised or rewound; then the store refuses.
"""

from collections.abc import Callable, Sequence
from contextlib import aclosing
from copy import deepcopy
from functools import partial
from typing import NamedTuple

from notecase import v1

from notecase_server import errors
from notecase_server.engine.content import Contents
from notecase_server.engine.results import Results
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import Finish, ModelRequest, Provider, Text, Thought, Tool, Used, looked_at
from notecase_server.store.contract import History, Query, SessionKey

KEEP_RECENT = 10
BATCH = 20
"""Where an agent sets no others: some five exchanges as they were, and a summary every ten."""

PAGE = 500
"""Messages covered at a time, at most: more in one request than any model takes would help nobody."""

MOST_BYTES = 4 << 20
"""Of messages covered at a time, for the same reason."""

LEAST = 5
"""Messages of one turn that a shorter summary covers at least: each costs a call of the model."""

MAX_BYTES = 64 << 10
"""Of a summary, which is shown in every request: whatever is longer does not sum up."""

INSTRUCTION = """\
Summarise the conversation up to here for an assistant who goes on with it and sees only your summary of this part. \
Carry over what an earlier summary says and is not outdated. Keep names, numbers, decisions, promises, what tools \
found, and what was asked and is not answered yet. Answer with the summary alone, in plain sentences, in the language \
of the conversation."""


class Summary(NamedTuple):
    """The one in effect."""

    sequence: int
    last_sequence: int
    """Of the last message it covers."""
    text: str

    @property
    def message(self) -> v1.Message:
        """As a model is shown it."""
        said = f"A summary of the conversation so far:\n\n{self.text}"
        return v1.Message(role=v1.Message.ROLE_SYSTEM, parts=[v1.Part(text=said)])


async def in_effect(store: History, key: SessionKey, sequence: int) -> Summary | None:
    """Returns the summary whose event has that sequence; None for 0."""
    for event in await store.read_events(key, sequence - 1, 1) if sequence else ():
        return Summary(sequence, event.summarized.last_sequence, event.summarized.text)
    return None


class Plan(NamedTuple):
    """Describes a summary to be made."""

    before: Summary | None
    messages: Sequence[v1.Message]
    """What it is to cover beyond `before`, oldest first, ending with a turn unless they are part of one."""
    size: int
    """About how many bytes they have."""

    async def request(self, llm: v1.LlmAgent) -> ModelRequest:
        """Returns the request that asks for it; where the messages are many or large it is made in a thread."""
        return await looked_at(self.messages, self.size, partial(self._request, llm))

    def _request(self, llm: v1.LlmAgent) -> ModelRequest:
        """Shown like any request, with what to do as its last message: no provider then lacks the alternation that it
        wants, and with the tools that it called, since some providers refuse calls without. Limits, stops and choices
        among tools that the agent sets are for its replies."""
        settings = llm.context.summary
        told = [self.before.message] if self.before else []
        ask = v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text=settings.instruction or INSTRUCTION)])
        generation = deepcopy(llm.generation)
        generation.ClearField("stop")
        generation.ClearField("max_output_tokens")
        messages = [*told, *(_in_words(message) for message in self.messages), ask]
        tools = _declared(llm, self.messages)
        return ModelRequest(settings.model or llm.model, "", messages, generation, tools, plain=True, size=self.size)

    def shorter(self) -> "Plan | None":
        """Returns a plan that covers at most a quarter of the messages, for a model that does not take more; None when
        no turn ends there and they are fewer than LEAST."""
        most = len(self.messages) // 4
        end = _end_of_turn(self.messages, most) or (most if most >= LEAST else 0)
        return self._replace(messages=self.messages[:end]) if end else None

    def events(self, text: str, usage: v1.Usage) -> list[v1.Event]:
        return [self.event(text), v1.Event(usage=usage)]

    def event(self, text: str) -> v1.Event:
        summarized = v1.Summarized(
            first_sequence=self.messages[0].sequence,
            last_sequence=self.messages[-1].sequence,
            text=text,
            previous=self.before.sequence if self.before else 0,
        )
        return v1.Event(summarized=summarized)


async def plan(
    store: History, contents: Contents, key: SessionKey, sequence: int, keep: int, batch: int, most: int = 0
) -> Plan | None:
    """What to cover beyond the summary of that sequence, once `keep` + `batch` messages are not: all of a page but the
    newest `keep`, or `most` messages unless that is 0, and never the newest of a user or what follows it. It ends with
    a turn, or within one where no turn ends in the page or in those `most`. Large results are shortened as in other
    requests. None when that leaves nothing."""
    before = await in_effect(store, key, sequence)
    page = await store.list_messages(key, Query(PAGE, (before.last_sequence if before else 0,)))
    rows, size, number, fits = page.rows, page.size, len(page.rows), True
    while page.next is not None and number < keep + batch:
        page = await store.list_messages(key, Query(PAGE, page.next))
        number += len(page.rows)
        if fits := fits and size + page.size <= MOST_BYTES:
            rows, size = rows + page.rows, size + page.size
    if number < keep + batch:
        return None
    last = min(number - keep, most or PAGE, len(rows))
    end, goes_on = _end_of_turn(rows, last), page.next is not None or last < number - keep
    if not end and goes_on and await _speaks_again(store, key, rows[last - 1].sequence):
        end = last
    return Plan(before, await Results(store, contents, key).shown(rows[:end], size), size) if end else None


def _end_of_turn(rows: Sequence[v1.Message], most: int) -> int:
    """The largest number of messages, `most` or fewer, after which a user or the system speaks again."""
    newest = max((index for index, row in enumerate(rows) if row.role == v1.Message.ROLE_USER), default=0)
    for end in range(min(most, newest), 0, -1):
        if rows[end].role != v1.Message.ROLE_ASSISTANT and rows[end - 1].role == v1.Message.ROLE_ASSISTANT:
            return end
    return 0


async def _speaks_again(store: History, key: SessionKey, sequence: int) -> bool:
    """Whether a user has spoken after that sequence. Reads back to the newest message of a user, as a request does."""
    after: tuple[str | int, ...] | None = None
    while True:
        page = await store.list_messages(key, Query(PAGE if after else 1, after), newest_first=True)
        for message in page.rows:
            if message.sequence <= sequence:
                return False
            if message.role == v1.Message.ROLE_USER:
                return True
        if page.next is None:
            return False
        after = page.next


async def write(
    provider: Provider, request: ModelRequest, used: Callable[[v1.Usage], None] = lambda _: None
) -> tuple[str, v1.Usage]:
    """Has the model write a summary; `used` is called with what that has taken so far. Raises what a provider raises,
    and MODEL_ERROR when it is none."""
    data = bytearray()
    async with aclosing(provider.stream(request)) as stream:
        async for delta in stream:
            if isinstance(delta, Text):
                data += delta.text.encode("utf-8", "surrogatepass")
                if len(data) > MAX_BYTES:
                    raise errors.model_error(f"The model's summary is longer than {MAX_BYTES} bytes.")
            elif isinstance(delta, Thought):
                data.clear()
            elif isinstance(delta, Used | Finish):
                used(delta.usage)
            if isinstance(delta, Finish):
                if text := data.decode("utf-8", "replace").strip():
                    return text, delta.usage
                raise errors.model_error("The model returned no summary.")
    raise errors.model_unavailable("The model's summary ended before it was complete.")


def too_long(error: NotecaseError) -> bool:
    """Whether a provider found a request longer than its model takes."""
    code = error.metadata.get("code")
    return error.reason == v1.ERROR_REASON_MODEL_ERROR and code == "context_length_exceeded"


def _declared(llm: v1.LlmAgent, messages: Sequence[v1.Message]) -> list[Tool]:
    """The tools that were called, if the agent itself declares them: further descriptions from an MCP server are not
    needed here."""
    declared = {tool.name: tool for tool in llm.tools}
    called = dict.fromkeys(part.tool_call.tool for message in messages for part in message.parts)
    known = ((name, declared.get(name) or v1.Tool()) for name in called if name)
    return [Tool(name, tool.description, tool.parameters) for name, tool in known]


def _in_words(message: v1.Message) -> v1.Message:
    """The message with its content named: replies say what it was, and a model that sums up need not take it."""
    worded = deepcopy(message)
    for part in worded.parts:
        for shown in (part, *part.tool_call.result):
            content = getattr(shown, shown.WhichOneof("kind") or "text")
            if hasattr(content, "media_type"):
                shown.text = f"[{content.media_type}{': ' if content.filename else ''}{content.filename}]"
    return worded
