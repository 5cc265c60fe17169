"""What the pieces of a model's reply come to, for tests that compare replies and not the way they were cut."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from notecase import v1
from notecase_server.models.chat_stream import Piece
from notecase_server.models.contract import Call, Finish, Reasoning, Refusal, Text


class Reply(NamedTuple):
    """A reply put together. `calls` are (tool, arguments) in the order in which they began."""

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    reason: str = ""
    usage: v1.Usage = v1.Usage()


def fold(pieces: Sequence[Piece]) -> Reply:
    """Puts a whole reply together. Fails when it does not end with its one Finish."""
    *rest, last = pieces
    assert isinstance(last, Finish), f"the last piece is {last}"
    calls: dict[int, tuple[str, str]] = {}
    for piece in rest:
        assert not isinstance(piece, Finish), "a Finish comes once, and last"
        if isinstance(piece, Call):
            tool, arguments = calls.get(piece.key, ("", ""))
            calls[piece.key] = (tool + piece.tool, arguments + piece.arguments)
    return Reply(
        text=_joined(Text, rest),
        reasoning=_joined(Reasoning, rest),
        refusal=_joined(Refusal, rest),
        calls=tuple(calls.values()),
        reason=last.reason,
        usage=last.usage,
    )


def _joined(kind: type[Text | Reasoning | Refusal], pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, kind))
