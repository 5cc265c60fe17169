"""The bytes of a Chat Completions answer in, the pieces of a reply out; strict about what a reply is, lenient about how
servers say it.

There is no I/O here, so that every way to cut the bytes can be tried. The events are split and decoded here and not by
the SDK because its chunk objects cost ten times as much as everything else done for a token.
"""

import json
from collections.abc import Callable
from typing import Any

import msgspec
from notecase import v1

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import Call, Delta, Finish, Reasoning, Refusal, Text
from notecase_server.models.provider_data import ProviderData

MAX_EVENT_BYTES = 1 << 20
"""What the parts of a message may hold together: nothing larger could be kept, so nothing larger is held in memory."""

_MAX_INT64 = 2**63 - 1


class EventSplitter:
    """Server-sent events: bytes as they arrive in, the data of each whole event out."""

    def __init__(self) -> None:
        self._tail = bytearray()
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Returns the data of the events that `chunk` completes, in order. Events without data (comments, keep-alives)
        are left out. Raises MODEL_ERROR for an event beyond MAX_EVENT_BYTES."""
        if self._after_cr or b"\r" in chunk:
            chunk = self._with_line_feeds(chunk)
        tail = self._tail
        # An event ends at an empty line, whose first line feed may be the last byte that came before.
        start = max(len(tail) - 1, 0)
        tail += chunk
        end = tail.rfind(b"\n\n", start)
        if end < 0:
            _bound(len(tail))
            return []
        blocks = bytes(tail[:end]).split(b"\n\n")
        del tail[: end + 2]
        return [data for block in blocks if (data := _data_of(block))]

    def rest(self) -> bytes:
        """The data of the event that the end of the stream cut off."""
        return _data_of(bytes(self._tail))

    def _with_line_feeds(self, chunk: bytes) -> bytes:
        """CR, LF and CR LF all end a line; a CR LF may be cut in two."""
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
        if chunk:
            self._after_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _data_of(block: bytes) -> bytes:
    """The data lines of one event, joined; empty when there are none."""
    _bound(len(block))
    if block.startswith(b"data: ") and b"\n" not in block:
        return block[6:]
    lines = (line.partition(b":") for line in block.split(b"\n"))
    return b"\n".join(value.removeprefix(b" ") for field, _, value in lines if field == b"data")


def _bound(size: int) -> None:
    if size > MAX_EVENT_BYTES:
        raise errors.model_error(
            f"The model provider sent more than {MAX_EVENT_BYTES} bytes at once; that is no part of a reply.",
            limit=MAX_EVENT_BYTES,
        )


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _CallPiece(msgspec.Struct, gc=False):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None
    extra_content: Any = None
    provider_specific_fields: Any = None


class _Said(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_CallPiece] | None = None
    reasoning_details: Any = None
    thinking_blocks: Any = None
    reasoning_opaque: Any = None
    extra_content: Any = None


class _Choice(msgspec.Struct, gc=False):
    index: int | None = None
    delta: _Said | None = None
    message: _Said | None = None
    """In place of `delta`, where a server answers with the whole reply at once."""
    finish_reason: str | None = None


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | float | None = None
    reasoning_tokens: int | float | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | float | None = None
    completion_tokens: int | float | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    model: str | None = None
    error: Any = None


_CHUNK = msgspec.json.Decoder(_Chunk)


class _OpenCall:
    """One tool call of the reply, as far as it has come."""

    __slots__ = ("arguments", "id", "key", "name")

    def __init__(self, key: int, call_id: str) -> None:
        self.key = key
        self.id = call_id
        self.name = ""
        self.arguments: list[str] = []

    def is_whole(self) -> bool:
        """Whether the arguments are a JSON object to its end, so that more of them can only be another call's."""
        if not self.arguments or not self.arguments[-1].rstrip().endswith("}"):
            return False
        try:
            msgspec.json.decode("".join(self.arguments), type=dict[str, msgspec.Raw])
        except (ValueError, RecursionError):
            return False
        return True


class _Calls:
    """Tells the calls of one reply apart. Servers number them from 0, from 1, all 0 or not at all, give an id once, in
    each piece, a new one in each piece or none, and the name once, in parts or in each piece."""

    def __init__(self) -> None:
        self._by_index: dict[int, _OpenCall] = {}
        self._by_id: dict[str | None, _OpenCall] = {}
        self._last: _OpenCall | None = None
        self._count = 0

    def take(self, piece: _CallPiece) -> Call:
        function = piece.function or _Function()
        name, arguments = function.name or "", function.arguments or ""
        call = self._owner(piece, name, arguments)
        if call is None:
            call = _OpenCall(self._count, piece.id or "")
            self._count += 1
        if piece.index is not None:
            self._by_index[piece.index] = call
        if piece.id:
            self._by_id[piece.id] = call
        self._last = call
        if name == call.name:
            name = ""
        call.name += name
        if arguments:
            call.arguments.append(arguments)
        return Call(call.key, name, arguments)

    def _owner(self, piece: _CallPiece, name: str, arguments: str) -> _OpenCall | None:
        """The call that the piece goes on with; None when it begins another."""
        if piece.index is not None:
            call = self._by_index.get(piece.index)
        elif piece.id in self._by_id:
            return self._by_id[piece.id]
        else:
            call = self._last
        if call is None or not name:
            return call
        # A name that comes again may open another call under the same number, or without any.
        renamed = name != call.name
        other = bool(piece.id) and piece.id != call.id
        if piece.index is None and other and renamed:
            return None
        if (other or piece.index is None) and (arguments or renamed) and call.is_whole():
            return None
        return call


class ChatReply:
    """One reply in the making: bytes in, pieces out, and at the end whether it is whole."""

    def __init__(self, model: str, refused: Callable[[object], NotecaseError]) -> None:
        """`model` is the one asked for; an answer that names its own is believed. `refused` makes the failure for an
        error object that comes in place of a reply or in the middle of one."""
        self._model = model
        self._refused = refused
        self._events = EventSplitter()
        self._document: bytearray | None = None
        self._begun = False
        self._calls = _Calls()
        self._data = ProviderData()
        self._usage: _Usage | None = None
        self._reason = ""
        self._said = False
        self._called = False
        self._ragged = False
        self._halves: dict[type[Text | Reasoning | Refusal] | int, str] = {}
        self.done = False
        """The server said that nothing follows."""

    @property
    def whole(self) -> bool:
        """Whether the reply could end here: its finish reason has come, or its end was announced."""
        return bool(self._reason) or self.done

    def feed(self, chunk: bytes) -> list[Delta]:
        """The pieces that `chunk` completes, in order. Raises MODEL_ERROR when it is no part of a reply, and what
        `refused` makes of an error object."""
        if not self._begun:
            self._begin(chunk)
        if self._document is not None:
            self._document += chunk
            _bound(len(self._document))
            return []
        pieces: list[Delta] = []
        for data in self._events.feed(chunk):
            if data.startswith(b"[DONE]"):
                self.done = True
                break
            self._take(data, pieces)
        return pieces

    def end(self) -> list[Delta]:
        """The last pieces, Finish being the very last. Raises MODEL_UNAVAILABLE when the reply is not whole,
        MODEL_ERROR when it is whole and empty without a reason."""
        pieces: list[Delta] = []
        if self._document is not None:
            self._take(bytes(self._document), pieces)
            self.done = True
        elif self._events.rest().startswith(b"[DONE]"):
            self.done = True
        if not self.whole:
            raise errors.model_unavailable("The model provider ended its answer before the reply was whole.")
        if not self._reason and not self._said:
            raise errors.model_error("The model provider ended its answer without a reply.")
        pieces.extend(Call(key, "", "\ufffd") if isinstance(key, int) else key("\ufffd") for key in self._halves)
        pieces.extend(self._data.all())
        pieces.append(Finish(self._reason or ("tool_calls" if self._called else "stop"), self._counted()))
        return pieces

    def _begin(self, chunk: bytes) -> None:
        """Looks at the first byte: what a server calls its answer's media type says less than what it is."""
        first = chunk.lstrip()[:1]
        self._begun = bool(first)
        if first == b"{":
            self._document = bytearray()
        elif first == b"<":
            raise errors.model_error(
                "The model provider answered with a web page in place of a reply; its base URL may be wrong."
            )

    def _take(self, data: bytes, pieces: list[Delta]) -> None:
        chunk, self._ragged = _decode(data)
        if chunk.error:
            raise self._refused(chunk.error)
        if chunk.model:
            self._model = self._valid(chunk.model)
        if chunk.usage is not None:
            self._usage = chunk.usage
        for choice in chunk.choices or ():
            # With `n` above 1 the further choices are other replies, and there is one.
            if choice.index:
                continue
            if said := choice.delta or choice.message:
                self._take_said(said, pieces)
            if choice.finish_reason:
                self._reason = self._valid(choice.finish_reason)
        self._said = self._said or bool(pieces)

    def _take_said(self, said: _Said, pieces: list[Delta]) -> None:
        self._data.message(said)
        # Some servers send both fields with the same text.
        if reasoning := self._mended(Reasoning, said.reasoning_content or said.reasoning):
            pieces.append(Reasoning(reasoning))
        if text := self._mended(Text, said.content):
            pieces.append(Text(text))
        if refusal := self._mended(Refusal, said.refusal):
            pieces.append(Refusal(refusal))
        for piece in said.tool_calls or ():
            call = self._calls.take(piece)
            self._data.call(call.key, piece)
            pieces.append(Call(call.key, self._valid(call.tool), self._mended(call.key, call.arguments)))
            self._called = True

    def _mended(self, key: type[Text | Reasoning | Refusal] | int, text: str | None) -> str:
        """`text` in valid Unicode: the halves of a surrogate pair that two pieces share are joined, a half that stays
        alone becomes U+FFFD. `key` says which pieces belong together."""
        if not text or not (self._ragged or self._halves):
            return text or ""
        text = self._halves.pop(key, "") + text
        if "\ud800" <= text[-1] <= "\udbff":
            self._halves[key] = text[-1]
            text = text[:-1]
        return _without_surrogates(text)

    def _valid(self, text: str) -> str:
        return _without_surrogates(text) if self._ragged else text

    def _counted(self) -> v1.Usage:
        told = self._usage or _Usage()
        of_input = told.prompt_tokens_details or _Details()
        of_output = told.completion_tokens_details or _Details()
        return v1.Usage(
            input_tokens=_int64(told.prompt_tokens),
            cached_input_tokens=_int64(of_input.cached_tokens),
            output_tokens=_int64(told.completion_tokens),
            reasoning_tokens=_int64(of_output.reasoning_tokens),
            model_calls=1,
            model=self._model,
        )


def _decode(data: bytes) -> tuple[_Chunk, bool]:
    """The chunk, and whether its strings may hold lone surrogates. Raises MODEL_ERROR."""
    try:
        return _CHUNK.decode(data), False
    except (msgspec.ValidationError, RecursionError):
        raise _malformed() from None
    except ValueError:
        # Not quite JSON, yet sent by real servers: half a surrogate pair, a character cut in two, NaN.
        try:
            loose = json.loads(data.decode("utf-8", "replace"), strict=False, parse_constant=lambda _: None)
            return msgspec.convert(loose, _Chunk), True
        except (ValueError, RecursionError):
            raise _malformed() from None


def _malformed() -> NotecaseError:
    return errors.model_error("The model provider sent something that is no part of a Chat Completions reply.")


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _int64(count: float | None) -> int:
    return int(min(max(count or 0, 0), _MAX_INT64))
