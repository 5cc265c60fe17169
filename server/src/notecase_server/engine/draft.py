"""Builds the reply of one step of a run: takes deltas, limits the blocks, and returns a message. Pure."""

from collections.abc import Callable, Sequence, Set
from typing import Literal

from notecase import v1

from notecase_server import errors
from notecase_server.engine.unfenced import Unfenced
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import (
    MAX_MEDIA_BYTES,
    Call,
    Cited,
    Finish,
    Link,
    Reasoning,
    Refusal,
    Returned,
    Source,
    Text,
    Thought,
)
from notecase_server.store.contract import PAGE_BYTES

MAX_REPLY_BYTES = PAGE_BYTES - (64 << 10)
"""A reply with its frame fits into one page."""

BLOCK_BYTES = 1024
"""Bytes that a part needs in addition to its text: ids, names, the binding of a call, and frames, rounded up."""

MAX_TOOL_NAME = 256
"""Characters of the name that a model calls: no tool has a longer one."""

MAX_MEDIA = 16
"""Images and clips of one reply: a model draws a handful."""

Kind = Literal["text", "json", "reasoning", "refusal", "arguments", "made"]


class Block:
    """Holds one part of a message being made. Its bytes are UTF-8 and only grow, by whole code points."""

    __slots__ = ("call_id", "citations", "data", "kind", "made", "provider_data", "tool")

    def __init__(self, kind: Kind, call_id: str = "", made: v1.Part | None = None) -> None:
        self.kind = kind
        self.call_id = call_id
        self.made = made
        """The part itself if it is not text: it is not streamed."""
        self.citations: list[v1.Citation] = []
        self.tool = ""
        self.data = bytearray()
        self.provider_data: v1.ProviderData | None = None
        """What the model's provider gets back with the part."""

    def add(self, text: str) -> int:
        """Appends text and returns how many bytes it was. A lone surrogate becomes U+FFFD."""
        try:
            data = text.encode()
        except UnicodeEncodeError:
            data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        self.data += data
        return len(data)


class Draft:
    """Holds one unfinished reply; a block's index is the index of its future part. It is fed until its Finish."""

    __slots__ = ("_calls", "_media_bytes", "_new_id", "_size", "_unfenced", "blocks", "name", "run", "settled")

    def __init__(self, name: str, run: str, new_id: Callable[[], str], as_json: bool = False) -> None:
        """`name` is the message's id, `new_id` makes further ones and those of calls. With `as_json` the text is the
        JSON that the agent's output_schema asks for."""
        self.name = name
        self.run = run
        self.blocks: list[Block] = []
        self.settled = False
        """A commit of its message has begun, and the message may be in the log before this process learns of it.
        Watchers get the rest from the message."""
        self._new_id = new_id
        self._size = 0
        self._media_bytes = 0
        self._calls: dict[int, Block] = {}
        self._unfenced = Unfenced() if as_json else None

    def feed(self, delta: Text | Reasoning | Thought | Refusal | Call | Link | Cited | Returned) -> bool:
        """Takes in a delta, and returns whether it began a block. Raises NotecaseError LIMIT_EXCEEDED once the reply is
        larger than MAX_REPLY_BYTES, or has more than MAX_MEDIA of images and clips."""
        block: Block | None
        match delta:
            case Text(text) if self._unfenced is None:
                block = self._current("text")
            case Link(uri, media_type):
                self.make_room(0)
                self.place(v1.Part(file=v1.FileUri(uri=uri, media_type=media_type)))
                return False
            case Cited(sources):
                self._cite(sources)
                return False
            case Returned(key, data):
                self._return(None if key is None else self._calls.get(key), data)
                return False
            case Call(key, tool, text):
                block = self._calls.get(key)
                if block is None:
                    if self._unfenced is not None and (words := self._unfenced.words()):
                        self._size += self._json().add(words)
                    block = self._calls[key] = self._begin(Block("arguments", self._new_id()))
                tool = tool[: MAX_TOOL_NAME - len(block.tool)]
                block.tool += tool
                self._size += len(tool.encode(errors="replace"))
            case Text(text):
                assert self._unfenced is not None
                if len(text) > MAX_REPLY_BYTES:
                    raise _too_long()
                text = self._unfenced.feed(text)
                if self._size + self._unfenced.held > MAX_REPLY_BYTES:
                    raise _too_long()
                if not text:
                    return False
                block = self._json()
            case Reasoning(text):
                block = self._current("reasoning")
            case Thought(text):
                self._begin_anew()
                block = self._current("reasoning")
            case Refusal(text):
                block = self._current("refusal")
        first = not block.data
        self._size += block.add(text)
        if self._size + BLOCK_BYTES * len(self.blocks) > MAX_REPLY_BYTES:
            raise _too_long()
        return first

    def make_room(self, size: int) -> None:
        """Says that an image or a clip of so many bytes will be placed. Raises NotecaseError LIMIT_EXCEEDED."""
        self._media_bytes += size
        if self._media_bytes > MAX_MEDIA_BYTES:
            told = f"The images and audio clips of the model's reply have more than {MAX_MEDIA_BYTES} bytes."
            raise errors.limit_exceeded("reply_media_bytes", MAX_MEDIA_BYTES, told)
        if sum(block.made is not None for block in self.blocks) >= MAX_MEDIA:
            told = f"The model's reply has more than {MAX_MEDIA} images and clips."
            raise errors.limit_exceeded("reply_media", MAX_MEDIA, told)

    def place(self, made: v1.Part) -> None:
        """Adds an image or a clip, for which room was made."""
        self._begin(Block("made", made=made))
        self._size += made.ByteSize()

    def forget_made(self) -> bool:
        """Replaces images and clips, which cannot be stored, by words. Returns whether there were any. Other blocks
        keep their indexes."""
        blocks = [block for block in self.blocks if block.made is not None and block.made.HasField("blob")]
        for block in blocks:
            assert block.made is not None
            block.add(f"[{block.made.blob.media_type}, {block.made.blob.size_bytes} bytes, not kept]")
            block.kind, block.made = "text", None
        return bool(blocks)

    def finish(self, _: Finish) -> bool:
        """Takes the end of the reply, and returns whether the draft has grown by it: text that was held back as a
        possible fence belongs to the JSON after all."""
        if self._unfenced is None or not (rest := self._unfenced.end()):
            return False
        self._json().add(rest)
        return True

    @property
    def calls(self) -> bool:
        """Whether it calls tools."""
        return any(block.kind == "arguments" for block in self.blocks)

    @property
    def json(self) -> str | None:
        """The JSON of a reply that is to be checked; None where it calls tools or refuses instead."""
        if any(block.kind in {"arguments", "refusal"} for block in self.blocks):
            return None
        return "".join(block.data.decode() for block in self.blocks if block.kind == "json")

    def message(self, author: str, status: v1.Message.Status.ValueType) -> v1.Message:
        """Returns the message as far as the draft goes. With calls or a refusal in it, JSON is text."""
        message = v1.Message(name=self.name, role=v1.Message.ROLE_ASSISTANT, author=author, status=status, run=self.run)
        for block in self.blocks:
            text = block.data.decode()
            part = message.parts.add()
            if block.kind == "text" or (block.kind == "json" and self.json is None):
                part.text = text
            elif block.kind == "json":
                part.json = text
            elif block.kind == "reasoning":
                part.reasoning.text = text
                if block.provider_data is not None:
                    part.reasoning.provider_data.CopyFrom(block.provider_data)
            elif block.kind == "refusal":
                part.refusal = text
            elif block.made is not None:
                part.CopyFrom(block.made)
            else:
                call = part.tool_call
                call.call_id, call.tool, call.arguments = block.call_id, block.tool, text
                call.outcome = v1.ToolCall.OUTCOME_PENDING
                if block.provider_data is not None:
                    call.provider_data.CopyFrom(block.provider_data)
            part.citations.extend(block.citations)
        return message

    def cut(self, author: str) -> v1.Message | None:
        """Returns the message of a reply that was stopped, whose calls were never whole; None when nothing came."""
        if not any(block.data or block.made for block in self.blocks):
            return None
        message = self.message(author, v1.Message.STATUS_INCOMPLETE)
        for part in message.parts:
            if part.HasField("tool_call"):
                part.tool_call.outcome = v1.ToolCall.OUTCOME_CANCELLED
                part.tool_call.error = "The run stopped before the call was complete."
        return message

    def _return(self, call: Block | None, data: v1.ProviderData) -> None:
        """Stores the data that the provider gets back with its call, or with the newest reasoning. Reasoning that the
        provider did not show becomes an empty part."""
        blocks = [call] if call else [block for block in self.blocks if block.kind == "reasoning"]
        (blocks[-1] if blocks else self._begin(Block("reasoning"))).provider_data = data
        self._size += data.ByteSize()

    def _cite(self, sources: Sequence[Source]) -> None:
        """Adds the sources to the text that cites them, or else to the last text, while there is room. In JSON, from
        which surrounding text may have been removed, positions are not reliable."""
        blocks = [block for block in self.blocks if block.kind in {"text", "json"}]
        texts = [block.data.decode() if block.kind == "text" else "" for block in blocks]
        places = [_place(texts, source) for source in sources] if blocks else []
        offsets = [
            _offsets(text, {place for where, *ends in places if where == at for place in ends})
            for at, text in enumerate(texts)
        ]
        for source, (at, start, end) in zip(sources, places, strict=False):
            citation = v1.Citation(uri=source.uri, title=source.title)
            if source.end and end <= len(texts[at]):
                citation.start, citation.end = offsets[at][start], offsets[at][end]
            self._size += citation.ByteSize() + 4
            if self._size + BLOCK_BYTES * len(self.blocks) > MAX_REPLY_BYTES:
                return
            blocks[at if source.end else -1].citations.append(citation)

    def _begin_anew(self) -> None:
        """Forgets everything: what watchers got of it is discarded, and this is another message."""
        self.name, self.blocks, self._size = self._new_id(), [], 0
        self._unfenced = None if self._unfenced is None else Unfenced()

    def _begin(self, block: Block) -> Block:
        self.blocks.append(block)
        return block

    def _json(self) -> Block:
        """The block of a reply that is JSON: one, whatever is thought in between."""
        found = (block for block in self.blocks if block.kind == "json")
        return next(found, None) or self._begin(Block("json"))

    def _current(self, kind: Literal["text", "reasoning", "refusal"]) -> Block:
        """The block that text of this kind goes on: the newest, if it is of the kind."""
        if self.blocks and self.blocks[-1].kind == kind:
            return self.blocks[-1]
        return self._begin(Block(kind))


def _place(texts: Sequence[str], source: Source) -> tuple[int, int, int]:
    """The index of the text that a source is cited in, and from which character to which."""
    start, end, at = source.start, source.end, 0
    while at < len(texts) - 1 and start >= len(texts[at]):
        start, end, at = start - len(texts[at]), end - len(texts[at]), at + 1
    return at, start, end


def _offsets(text: str, places: Set[int]) -> dict[int, int]:
    """How many bytes of UTF-8 a text has before each of these characters. It is gone through once."""
    found, at, size = dict[int, int](), 0, 0
    for place in sorted(places):
        size += len(text[at:place].encode())
        at, found[place] = place, size
    return found


def _too_long() -> NotecaseError:
    told = f"The model's reply is longer than {MAX_REPLY_BYTES} bytes."
    return errors.limit_exceeded("reply_bytes", MAX_REPLY_BYTES, told)
