"""Splits a streamed answer into the documents that it holds, however its server frames them.

Most servers send server-sent events as the specification has them. Others leave out the space, the empty lines or the
`data:` of an error, put two documents into one event, or send JSON alone. There is no I/O here, so that every way to
cut the bytes can be tried.
"""

from notecase_server import errors
from notecase_server.errors import NotecaseError

MAX_EVENT_BYTES = 16 << 20
"""An image that a model makes comes whole, as base64, in one event: 1 to 3 MB each, a few at once."""

_BOM = b"\xef\xbb\xbf"

BETWEEN = b"\n\ndata: "
"""The separator between two events of one line each."""

LAST = b"[DONE]\n\n"
"""How the last event of a reply ends."""
_NO_TEXT = 2
"""Events before the last one of a reply that have no text: why it ended, and its usage."""

_JUNK = b" \t\0\xef\xbb\xbf"
"""What some servers write before a line: each write of theirs begins with a mark, or as deep as their code."""

_LINE_BYTES = 64
"""What a line costs besides its bytes, so that a million empty ones are bounded too."""


Event = tuple[bytes, str]
"""One document of an answer, and what the server calls the event: nothing for most."""


class EventSplitter:
    """Takes bytes as they arrive and gives out each document as soon as it is certain to be whole."""

    def __init__(self) -> None:
        self._tail = bytearray()
        self._begun = False
        self._after_cr = False
        self._lines: list[bytes] = []
        self._size = 0
        self._name = ""
        self.stray = b""
        """The last line that does not belong to an event: text, or a page, from the proxy or server that cut the
        answer."""

    def feed(self, chunk: bytes) -> list[Event]:
        """Returns the documents that `chunk` completes, in order. Events without data are left out. Raises MODEL_ERROR
        for one beyond MAX_EVENT_BYTES."""
        tail = self._tail
        if not self._begun:
            tail += chunk
            if len(tail) < len(_BOM) and _BOM.startswith(bytes(tail)):
                return []
            self._begun = True
            chunk = bytes(tail).removeprefix(_BOM)
            tail.clear()
        if self._after_cr or b"\r" in chunk:
            chunk = self._with_line_feeds(chunk)
        end = chunk.rfind(b"\n") + 1
        if not end:
            tail += chunk
            _bound(len(tail) + self._size)
            return []
        *whole, rest = (bytes(tail) + chunk[:end]).split(b"\n\n")
        tail[:] = chunk[end:]
        found: list[Event] = []
        for piece in whole:
            inside = self._lines or self._name
            if not inside and piece.startswith(b"data: ") and b"\n" not in piece and 6 < len(piece) <= MAX_EVENT_BYTES:
                found.append((piece[6:], ""))  # as nearly every event is
            elif piece or inside:
                for line in (*piece.split(b"\n"), b""):
                    self._take(line, found)
        for line in rest.splitlines():
            self._take(line, found)
        if tail:
            _bound(len(tail) + self._size)
        return found

    def plain(self, chunk: bytes, most: int) -> tuple[list[bytes], bytes]:
        """Returns the documents that `chunk` completes, if every one of them is an event of one `data: ` line, and what
        comes behind them, which is to be fed. Nothing is kept of either. No documents, and `chunk` itself, where that
        is not so, where none is whole, or where more than `most` bytes have come. A document that has a line feed is
        none: something else came between two events. The last events of a reply are left to be fed."""
        if self._after_cr or self._lines or self._name or b"\r" in chunk or len(self._tail) + len(chunk) > most:
            return [], chunk
        whole = bytes(self._tail) + chunk
        if not whole.startswith(b"data: "):
            return [], chunk
        *documents, last = whole[6:].split(BETWEEN)
        if last == LAST:
            rest = b"data: " + BETWEEN.join([*documents[-_NO_TEXT:], last])
            del documents[-_NO_TEXT:]
        else:
            document, end, rest = last.partition(b"\n\n")
            if end:
                documents.append(document)
            else:
                rest = b"data: " + document
        if not documents:
            return [], chunk
        self._begun = True
        self._tail.clear()
        return documents, rest

    def end(self) -> list[Event]:
        """Returns what the end of the answer completes: an event whose empty line, or whose last line's end, is
        missing."""
        found: list[Event] = []
        self._begun = True
        if self._tail:
            self._take(bytes(self._tail), found)
            self._tail.clear()
        self._flush(found)
        return found

    def _take(self, line: bytes, found: list[Event]) -> None:
        if not line:
            if self._lines:
                self._flush(found)
            self._name = ""
        elif line.startswith(b"data:"):
            self._add(line[6:] if line.startswith(b" ", 5) else line[5:], found)
        elif line.startswith((b"{", b"[")):
            self._add(line, found)
        elif line.startswith(b"event:"):
            self._name = line[6:].strip().decode("latin-1")[:64]
        elif line.startswith(b"error:"):  # llama.cpp puts an event's name there
            self._name = "error"
            self._add(line[6:].strip(), found)
        elif (bare := line.lstrip(_JUNK)) != line or line[:5] == b"Data:":
            self._take(bare[:1].lower() + bare[1:], found)
        elif not line.startswith((b":", b"id:", b"retry:")) and not b"data:".startswith(line):
            self.stray = line

    def _add(self, data: bytes, found: list[Event]) -> None:
        """Adds a data line. In no JSON does "{" follow "}", so that a line which begins so behind one which ends so is
        another document."""
        _bound(len(data))
        if self._lines and _begins(data) and self._lines[-1].rstrip().endswith((b"}", b"[DONE]")):
            self._flush(found)
        self._lines.append(data)
        self._size += len(data) + _LINE_BYTES
        _bound(self._size)

    def _flush(self, found: list[Event]) -> None:
        data = self._lines[0] if len(self._lines) == 1 else b"\n".join(self._lines)
        if data:
            found.append((data, self._name))
        self._lines.clear()
        self._size = 0

    def _with_line_feeds(self, chunk: bytes) -> bytes:
        """Makes CR and CR LF, which also end a line and may be cut in two, into LF."""
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
        if chunk:
            self._after_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def documents_of(data: bytes) -> list[Event]:
    """Splits a whole answer into its documents."""
    splitter = EventSplitter()
    return [*splitter.feed(data), *splitter.end()]


def _begins(data: bytes) -> bool:
    return data.lstrip().startswith((b"{", b"[DONE]"))


def _bound(size: int) -> None:
    if size > MAX_EVENT_BYTES:
        raise too_large(MAX_EVENT_BYTES)


def too_large(limit: int) -> NotecaseError:
    return errors.model_error(
        f"The model provider sent more than {limit} bytes at once; that is no part of a reply.", limit=limit
    )
