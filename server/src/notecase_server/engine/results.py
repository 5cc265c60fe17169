"""Shortens results of calls that are too large for a model: it gets their beginning, or their place, and reads on with
a tool that the engine itself runs.

Only requests to the model are shortened. The log has every result in full, as a blob where the results of one reply
would not fit into a page together, and the tool reads from there.
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import groupby
from typing import Any

import msgspec
from notecase import v1

from notecase_server import names
from notecase_server.engine.content import MEDIA_TYPES, Contents
from notecase_server.engine.tokens import Gauge
from notecase_server.models.contract import Tool, is_text, looked_at
from notecase_server.store.contract import PAGE_BYTES, History, SessionKey
from notecase_server.tools.contract import Outcome

SHOWN_BYTES = 32 << 10
"""Of a result's text that a model is shown: a few pages, and some 8,000 tokens."""

TOGETHER_BYTES = 128 << 10
"""Of the text of all results of one reply, which a model gets at once: some 32,000 tokens, a quarter of what most
models read. Of the largest of them it is then shown how they begin."""

PREVIEW_BYTES = 4 << 10
"""Bytes of a shortened result: enough to see what it is, and whether the rest is needed."""

LEAST_BYTES = 256
"""The least that is shown of a result, and the smallest part that is worth storing as a blob."""

RESULTS_BYTES = PAGE_BYTES - (16 << 10)
"""Of a reply with the results of all its calls: it fits into one page."""

FRAME_BYTES = 256
"""Bytes of a call's outcome in addition to its result: times and lengths."""

READ_BYTES = SHOWN_BYTES - 512
"""Of one reading, which is a result itself and is to be shown whole."""

READ_RESULT = "read_result"
"""What the tool is called. Where a tool of the run has that name, every result is shown whole."""

TOOL = Tool(
    READ_RESULT,
    "Reads from the result of an earlier call that was shown in part or left out.",
    msgspec.json.encode(
        {
            "type": "object",
            "properties": {
                "result": {"type": "string", "description": "The result, as it is named where it was left out."},
                "offset": {"type": "integer", "description": "The byte to begin at; 0 by default."},
                "length": {"type": "integer", "description": f"Bytes to read; at most {READ_BYTES}, the default."},
            },
            "required": ["result"],
            "additionalProperties": False,
        }
    ).decode(),
)


async def kept(
    contents: Contents, key: SessionKey, message: v1.Message | None, parts: Sequence[v1.Part], *, of_run: bool
) -> list[v1.Part]:
    """Returns a tool's result for a call of `message` in the form of the log. Text beyond the call's share of a page is
    stored as blobs, whatever the size of the other results. `of_run`: the result is from a tool of the server, and not
    from a caller. Raises NotecaseError as Contents.parts."""
    held, size, share = list[v1.Part](), 0, _share(message)
    for part in await contents.parts(key, parts, of_run=of_run):
        text = (part.text or part.json).encode()
        if size + part.ByteSize() > share and len(text) >= LEAST_BYTES:
            kind = "json" if part.json else "text"
            blob = await contents.put(key.tenant, text, MEDIA_TYPES[kind], of_run=of_run)
            part = v1.Part(blob=blob)  # noqa: PLW2901
        size += part.ByteSize()
        held.append(part)
    return held


def _share(message: v1.Message | None) -> int:
    """What each call of a reply may have of the page that its results fit into together."""
    if message is None:
        return RESULTS_BYTES
    calls = [part.tool_call for part in message.parts if part.HasField("tool_call")]
    size = message.ByteSize() - sum(part.ByteSize() for call in calls for part in call.result)
    return (RESULTS_BYTES - size) // max(len(calls), 1) - FRAME_BYTES


def fitting(message: v1.Message | None, outcome: Outcome) -> Outcome:
    """Returns the outcome if the message that holds the call still fits into a page with it, and a short error
    otherwise: of parts that are too many, or errors that are too long together."""
    size = sum(part.ByteSize() for part in outcome.parts) + (message.ByteSize() if message else 0)
    if size + len(outcome.error.encode()) <= RESULTS_BYTES:
        return outcome
    told = f"The results of this reply's calls are together larger than {PAGE_BYTES} bytes."
    return Outcome(error=f"{outcome.error[:100]}…" if outcome.error else told)


class Results:
    """The results in one session's log."""

    def __init__(self, store: History, contents: Contents, key: SessionKey) -> None:
        self._store = store
        self._contents = contents
        self._key = key

    async def shown(self, messages: Sequence[v1.Message], size: int, most_tokens: int = 0) -> Sequence[v1.Message]:
        """Returns messages of `size` bytes as a model is shown them: of results that are large, or large together, how
        they begin, and, with `most_tokens`, of the newest turn's oldest results where they are, until the messages fit
        or only the newest result is left. The same sequence where nothing is shortened."""
        made: Sequence[v1.Message] = messages
        for index, at, call, most in await looked_at(messages, size, lambda: [*_too_large(messages)]):
            begun, end = await self._text(call, 0, most)
            name = _name(messages[index], at)
            told = f"{begun}\n[{_of(end, call)}. Read on with {READ_RESULT}: result {name!r}, offset {end}.]"
            made = _with(made, messages, index, at, told)
        if not most_tokens:
            return made
        return await looked_at(messages, size, partial(self._left_out, made, messages, most_tokens))

    def _left_out(
        self, made: Sequence[v1.Message], whole: Sequence[v1.Message], most_tokens: int
    ) -> Sequence[v1.Message]:
        gauge = Gauge(made)
        total = sum(map(gauge.tokens, made))
        first = max((index for index, message in enumerate(whole) if message.role == v1.Message.ROLE_USER), default=0)
        of_turn = [found for found in _calls(whole) if found[0] >= first]
        for index, at, call in of_turn[:-1]:
            if total <= most_tokens:
                break
            name = _name(whole[index], at)
            told = f"[Left out here: {_size(call)} bytes. Read them with {READ_RESULT}: result {name!r}.]"
            if _size(made[index].parts[at].tool_call) > len(told):
                before = gauge.tokens(made[index])
                made = _with(made, whole, index, at, told)
                total += gauge.tokens(made[index]) - before
        return made

    async def read(self, calls: Iterable[v1.ToolCall], size: int) -> Mapping[str, Outcome]:
        """Returns what each of these calls of the tool reads, by id. They are of one reply, of `size` bytes, which has
        to fit into a page with them, and are to be shown whole."""
        found: dict[str, Outcome] = {}
        read = 0
        for call in calls:
            outcome = await self._read(call.arguments)
            read += sum(part.ByteSize() for part in outcome.parts)
            if read > TOGETHER_BYTES or size + read > PAGE_BYTES - (64 << 10):
                outcome = Outcome(error="That is too much for one reply. Read it in the next one.")
            found[call.call_id] = outcome
        return found

    async def _read(self, arguments: str) -> Outcome:
        try:
            given = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
            name = str(given.get("result", ""))
            offset, length = int(given.get("offset") or 0), int(given.get("length") or READ_BYTES)
        except (ValueError, TypeError, OverflowError, RecursionError):
            return Outcome(error="The arguments do not match the tool's parameters.")
        message, _, number = name.rpartition(".")
        found = await self._store.get_message(self._key, message) if message else None
        parts = {str(at): part.tool_call for at, part in enumerate(found.parts)} if found is not None else {}
        call = parts.get(number)
        if call is None or not _size(call):
            return Outcome(error=f"There is no result {name[:100]!r} in this session.")
        if not 0 <= offset < _size(call):
            return Outcome(error=f"The offset is outside the result, which has {_size(call)} bytes.")
        text, end = await self._text(call, offset, offset + min(max(length, 4), READ_BYTES))
        more = f"; read on at offset {end}" if end < _size(call) else ", its end"
        return Outcome([v1.Part(text=text), v1.Part(text=f"\n[{_of(end, call, offset)}{more}.]")])

    async def _text(self, call: v1.ToolCall, start: int, end: int) -> tuple[str, int]:
        """What a call came to, from one byte to another, as far as that is whole characters; and where that ends."""
        data, at = bytearray(), 0
        for part in _parts(call):
            size = _bytes(part)
            first, last = max(start - at, 0), min(end - at, size)
            if first < last and part.HasField("blob"):
                sha256 = names.parse_blob(part.blob.name) or ""
                async for piece in self._contents.download(self._key.tenant, sha256, first, last - first):
                    data += piece.chunk
            elif first < last:
                data += (part.text or part.json).encode()[first:last]
            at += size
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(bytes(data), final=end >= at)
        return text, start + len(data) - len(decoder.getstate()[0])


def _calls(messages: Sequence[v1.Message]) -> list[tuple[int, int, v1.ToolCall]]:
    """Each call, with its message's index and its part's."""
    return [
        (index, at, part.tool_call)
        for index, message in enumerate(messages)
        if message.role == v1.Message.ROLE_ASSISTANT
        for at, part in enumerate(message.parts)
        if part.HasField("tool_call")
    ]


def _too_large(messages: Sequence[v1.Message]) -> Iterator[tuple[int, int, v1.ToolCall, int]]:
    """The results that are not shown whole, and how many bytes of each are: those that are large, and of each reply the
    largest, until the others fit. What the model itself read is shown."""
    for index, found in groupby(_calls(messages), key=lambda found: found[0]):
        sized = [(_size(call), at, call) for _, at, call in found]
        total = sum(size for size, _, _ in sized)
        if total <= SHOWN_BYTES:
            continue
        most = max(min(PREVIEW_BYTES, TOGETHER_BYTES // len(sized)), LEAST_BYTES)
        for size, at, call in sorted(sized, key=lambda each: -each[0]):
            alone = size > SHOWN_BYTES
            if alone or (total > TOGETHER_BYTES and size > most and call.tool != READ_RESULT):
                total -= size - most
                yield index, at, call, most


def _parts(call: v1.ToolCall) -> Sequence[v1.Part]:
    """Returns the text that a model gets for the outcome of a call."""
    return call.result or [v1.Part(text=call.error)]


def _bytes(part: v1.Part) -> int:
    """Returns the bytes of its text; 0 if it has none."""
    if part.HasField("blob"):
        return part.blob.size_bytes if is_text(part.blob.media_type) else 0
    return len((part.text or part.json).encode())


def _size(call: v1.ToolCall) -> int:
    return sum(map(_bytes, _parts(call)))


def _name(message: v1.Message, at: int) -> str:
    return f"{message.name}.{at}"


def _of(end: int, call: v1.ToolCall, start: int = 0) -> str:
    return f"Bytes {start} to {end} of {_size(call)}"


def _with(
    made: Sequence[v1.Message], whole: Sequence[v1.Message], index: int, at: int, text: str
) -> Sequence[v1.Message]:
    """Returns the messages with a text in place of the text of a call's result; other parts stay. `whole` are the
    original messages, which are not changed."""
    copied = made if isinstance(made, list) and made is not whole else list(made)
    if copied[index] is whole[index]:
        copied[index] = deepcopy(whole[index])
    call = copied[index].parts[at].tool_call
    if not call.result:
        call.error = text
        return copied
    content = [part for part in whole[index].parts[at].tool_call.result if not _bytes(part)]
    del call.result[:]
    call.result.extend([v1.Part(text=text), *content])
    return copied
