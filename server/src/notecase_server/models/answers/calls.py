"""Distinguishes the tool calls of one reply, and joins the arguments of each."""

import msgspec

from notecase_server.models.answers.chunk import CallPiece, Function, Label
from notecase_server.models.answers.event_stream import too_large
from notecase_server.models.contract import Call

_NOTHING = frozenset({"null", "None", '""', "[]", "undefined"})
"""What servers write for no arguments, besides nothing and {}."""


MAX_HELD = 1 << 20
"""Characters of arguments that are held back: more than a message takes."""


MAX_NAME = 256
"""Characters of a tool's name: what is longer is cut, and no tool's."""


class _OpenCall:
    """The received part of one tool call of the reply."""

    __slots__ = ("arguments", "doubtful", "given", "held", "held_size", "id", "key", "name", "size")

    def __init__(self, key: int, call_id: Label) -> None:
        self.key = key
        self.id = call_id
        self.doubtful = False
        """It has the name of a call that is whole, and no arguments so far: it may be that one's end."""
        self.given = False
        """Something of it was given out."""
        self.name = ""
        self.arguments: list[str] = []
        """What was given out."""
        self.size = 0
        """Characters of that."""
        self.held: list[str] = []
        """What came since the first piece that may go on with the arguments or may begin them again."""
        self.held_size = 0

    def is_whole(self) -> bool:
        """Whether the arguments are a JSON object to its end, so that more of them can only be another call's, or the
        same once more."""
        return bool(self.arguments) and self.arguments[-1].rstrip().endswith("}") and _is_object(self.said)

    @property
    def said(self) -> str:
        if len(self.arguments) > 1:
            self.arguments = ["".join(self.arguments)]
        return self.arguments[0] if self.arguments else ""

    def take(self, piece: str) -> str:
        """Returns what of a piece of the arguments is certain to go on with them. Raises MODEL_ERROR for more than can
        be held back."""
        if not piece:
            return ""
        if self.held or self._is_doubtful(piece):
            self.held.append(piece)
            self.held_size += len(piece)
            if self.held_size > MAX_HELD:
                raise too_large(MAX_HELD)
            return ""
        self.arguments.append(piece)
        self.size += len(piece)
        return piece

    def _is_doubtful(self, piece: str) -> bool:
        if not self.arguments:
            return not piece.lstrip().startswith("{")
        if not piece.lstrip().startswith("{"):
            return False  # all but the first pieces of nearly every call
        return (len(piece) >= self.size and piece.startswith(self.said)) or self.is_whole()

    def end(self) -> str:
        """Returns the rest of the arguments: what was held back goes on with them if both together are an object, and
        otherwise its last piece is all of them, sent again."""
        if not self.held:
            return ""
        said, rest, last = self.said, "".join(self.held), self.held[-1]
        if not said:
            return _plain(rest) if not _is_object(last) or _is_object(rest) else last
        if _is_object(said + rest):
            return rest
        if _is_object(said):
            return ""
        return last[len(said) :] if last.startswith(said) and _is_object(last) else rest


class Calls:
    """Tells the calls of one reply apart. Servers number them from 0, from 1, all 0 or not at all, give an id once, in
    each piece, a new one in each piece or none, and the name once, in parts or in each piece, at first or at last. The
    space that some models write around a name (ml-explore/mlx-lm#1612, code-yeongyu/oh-my-openagent#1568) is in no
    tool's name."""

    def __init__(self) -> None:
        self._calls: list[_OpenCall] = []
        self._by_index: dict[str, _OpenCall] = {}
        self._by_id: dict[Label, _OpenCall] = {}

    def __len__(self) -> int:
        return len(self.given())

    def given(self) -> set[int]:
        """The keys of what is certain to be a call. Some servers send an empty one with each reply."""
        return {call.key for call in self._calls if call.given}

    def has_number(self, index: str) -> bool:
        return index in self._by_index

    def take(self, piece: CallPiece, before: CallPiece | None = None) -> Call:
        """Returns what is certain of a call, which may be nothing. `before` is the entry before it in the same list."""
        function = piece.function or Function()
        name, arguments = (function.name or "").strip()[:MAX_NAME], function.arguments or ""
        another = self._is_another(piece, before)
        call = None if another else self._owner(piece, name, arguments)
        if call is None:
            call = _OpenCall(len(self._calls), _id(piece))
            call.doubtful = not another and self._may_be_end(piece, name)
            self._calls.append(call)
        if piece.index is not None:
            self._by_index[str(piece.index)] = call
        if _id(piece) is not None:
            self._by_id[piece.id] = call
        name = name.removeprefix(call.name)[: MAX_NAME - len(call.name)]
        call.name += name
        said = call.take(arguments)
        if call.given:
            return Call(call.key, name, said)
        call.given = bool(call.arguments or call.held or (call.name and not call.doubtful))
        return Call(call.key, call.name if call.given else "", said)

    def end(self) -> list[Call]:
        """Returns what was held back of each call."""
        return [Call(call.key, "", rest) for call in self._calls if (rest := call.end())]

    def _owner(self, piece: CallPiece, name: str, arguments: str) -> _OpenCall | None:
        """The call that the piece goes on with; None when it begins another."""
        call_id = _id(piece)
        if piece.index is not None:
            call = self._by_index.get(str(piece.index)) or self._renumbered(call_id, name, arguments)
            if call is not None and call_id is not None and call.id not in (None, call_id):
                call = self._by_id.get(call_id, call)  # numbers are wrong more often: agno-agi/agno#8880
        elif call_id is not None and call_id in self._by_id:
            return self._by_id[call_id]
        else:
            call = self._calls[-1] if self._calls else None
        if call is None or not name or not call.name:
            return call
        # A name that comes again may open another call under the same number, or without any.
        renamed = bool(call.name) and name != call.name
        other = call_id is not None and call_id != call.id
        if other and renamed:
            return None
        return None if (other or piece.index is None) and call.is_whole() else call

    def _is_another(self, piece: CallPiece, before: CallPiece | None) -> bool:
        """Whether an entry is another call than the one before it in the same list: it has the same number, or none
        either, and an id and a name of its own."""
        if before is None or piece.index != before.index or not (piece.function and piece.function.name):
            return False
        return None not in (_id(piece), _id(before)) and piece.id != before.id and piece.id not in self._by_id

    def _may_be_end(self, piece: CallPiece, name: str) -> bool:
        """Whether a piece that begins a call may be the end of the one before it."""
        if piece.index is not None:
            before = self._by_index.get(str(piece.index))
        else:
            before = self._calls[-1] if self._calls else None
        return before is not None and before.name == name

    def _renumbered(self, call_id: Label, name: str, arguments: str) -> _OpenCall | None:
        """The call that a piece with a new number goes on with: some servers number the pieces."""
        if not arguments or not self._calls:
            return None
        call = self._calls[-1] if call_id is None else self._by_id.get(call_id)
        if call is None or call.is_whole() or (name and (call_id is None or name != call.name or not call.size)):
            return None
        return call


def _id(piece: CallPiece) -> Label:
    return None if piece.id == "" else piece.id


def _is_object(text: str) -> bool:
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):
        return False
    return True


def _plain(text: str) -> str:
    """Arguments that do not begin as an object: a word for none, an object within a JSON string, or as they are."""
    if text.strip() in _NOTHING:
        return ""
    try:
        inner = msgspec.json.decode(text, type=str)
    except (ValueError, RecursionError):
        return text
    return inner if _is_object(inner) else text
