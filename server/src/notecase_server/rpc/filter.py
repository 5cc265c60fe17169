"""List filters: the part of AIP-160 that a store can answer from its columns.

    user = "users/ada" AND activity = IDLE
    labels.team = night OR labels.team = "day shift"
    create_time >= "2026-11-01T00:00:00Z" NOT labels."a.b" = x

A term is `field operator value`, with `=`, `!=`, `<`, `<=`, `>` or `>=`. Terms are joined by AND, or written one after
another, which means the same; by OR, which binds *tighter* than AND, as in AIP-160; and are negated by NOT or a leading
`-`. Parentheses group. A value is a bare word or quoted, `\\` quoting the next character. `labels.KEY` reads a label,
and a missing one equals "". There are no wildcards, no functions, no `:` and no search by a value alone.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, NamedTuple, Protocol, cast

from notecase_server import errors
from notecase_server.errors import NotecaseError, Violation
from notecase_server.store.contract import And, Compare, Filter, Not, Or

MAX_BYTES: Final = 2048
"""Bytes of a filter: some forty terms, which is as much as an index helps with."""
MAX_NESTING: Final = 32
"""Parentheses within parentheses, so that neither this parser nor a store's SQL goes deep."""


class Names(Protocol):
    """The part of a generated enum that is used here."""

    def items(self) -> Sequence[tuple[str, int]]: ...


class EnumField(NamedTuple):
    """A field written as an enum's names, with the prefix or without: `EnumField(v1.Session.Activity, "ACTIVITY_")`
    takes IDLE and ACTIVITY_IDLE. Compared by = and != only."""

    enum: Names
    prefix: str


FieldKind = Literal["text", "time", "labels"] | EnumField
"""Text compares as it is, agents and users by their whole names (`agents/a`). Times are written as RFC 3339 and compare
in microseconds since 1970. The field `labels` means every `labels.KEY`."""

Operator = Literal["=", "!=", "<", ">", "<=", ">="]


def parse(text: str, fields: Mapping[str, FieldKind]) -> Filter | None:
    """The filter as a store takes it, None for an empty one.

    Raises NotecaseError INVALID_FIELD for the field "filter", with the position of the mistake, counted in characters
    from 1."""
    if len(text.encode()) > MAX_BYTES:
        raise _invalid(f"longer than {MAX_BYTES} bytes")
    parser = _Parser(text, fields)
    return parser.all_of(depth=0) if parser.token.kind != "end" else None


class _Token(NamedTuple):
    kind: str
    """One of the groups below, or "end"."""
    text: str
    start: int


_TOKEN = re.compile(
    r"""\s*(?:
        (?P<operator> [<>!]=|[<>=] )
      | (?P<paren> [()] )
      | (?P<quoted> "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' )
      | (?P<minus> -(?=\S) )
      | (?P<label> labels\."(?:[^"\\]|\\.)*" | labels\.'(?:[^'\\]|\\.)*' )
      | (?P<word> [^\s()<>!="']+ )
    )""",
    re.VERBOSE | re.DOTALL,
)


_KEYWORDS = frozenset({"AND", "OR", "NOT"})


class _Parser:
    """Reads tokens from the left. Each method reads one construct, and leaves `token` after it."""

    def __init__(self, text: str, fields: Mapping[str, FieldKind]) -> None:
        self._text = text
        self._fields = fields
        self._end = 0
        self.token = self._next()

    def all_of(self, depth: int) -> Filter:
        """Terms joined by AND or side by side, up to the end or a closing parenthesis."""
        terms = [self._any_of(depth)]
        while self.token.kind != "end" and self.token.text != ")":
            if self._is_word("AND"):
                self._take()
            terms.append(self._any_of(depth))
        if self.token.text == ")" and depth == 0:
            raise self._wrong("a ')' without its '('")
        return terms[0] if len(terms) == 1 else And(tuple(terms))

    def _any_of(self, depth: int) -> Filter:
        terms = [self._term(depth)]
        while self._is_word("OR"):
            self._take()
            terms.append(self._term(depth))
        return terms[0] if len(terms) == 1 else Or(tuple(terms))

    def _term(self, depth: int) -> Filter:
        if self._is_word("NOT") or self.token.kind == "minus":
            self._take()
            return Not(self._simple(depth))
        return self._simple(depth)

    def _simple(self, depth: int) -> Filter:
        if self.token.text != "(":
            return self._comparison()
        if depth == MAX_NESTING:
            raise self._wrong(f"parentheses are nested more than {MAX_NESTING} deep")
        opened = self._take()
        inside = self.all_of(depth + 1)
        if self.token.text != ")":
            raise self._wrong("a '(' is never closed", opened)
        self._take()
        return inside

    def _comparison(self) -> Filter:
        field = self._take()
        if field.kind not in {"word", "label"} or field.text in _KEYWORDS:
            raise self._wrong("expected a field", field)
        kind: FieldKind = "text"
        name = field.text
        if "labels" in self._fields and name.startswith("labels.") and name != "labels.":
            name = "labels." + (_unquoted(name[7:]) if field.kind == "label" else name[7:])
        elif name in self._fields and name != "labels":
            kind = self._fields[name]
        else:
            known = ", ".join(sorted(self._fields)).replace("labels", "labels.KEY")
            advice = "; ':' is not supported, write =" if ":" in name else ""
            raise self._wrong(f"unknown field; the fields are {known}{advice}", field)
        operator = self._take()
        if operator.kind != "operator":
            raise self._wrong("expected one of = != < <= > >=", operator)
        value = self._take()
        if value.kind == "minus":  # A bare value may begin with one.
            value = self._take()._replace(start=value.start)
            value = value._replace(text="-" + value.text)
        if value.kind not in {"word", "quoted"} or value.text in _KEYWORDS:
            raise self._wrong("expected a value", value)
        return Compare(name, cast(Operator, operator.text), self._value(kind, operator, value))

    def _value(self, kind: FieldKind, operator: _Token, value: _Token) -> str | int:
        text = _unquoted(value.text) if value.kind == "quoted" else value.text
        if kind == "text":
            return text
        if kind == "time":
            microseconds = _microseconds(text)
            if microseconds is None:
                raise self._wrong("expected a time such as 2026-11-01T08:30:00Z", value)
            return microseconds
        assert isinstance(kind, EnumField)
        if operator.text not in {"=", "!="}:
            raise self._wrong("this field supports only = and !=", operator)
        numbers: dict[str, int] = dict(kind.enum.items())
        number = numbers.get(text, numbers.get(kind.prefix + text))
        if number is None:
            known = ", ".join(name.removeprefix(kind.prefix) for name in numbers)
            raise self._wrong(f"expected one of {known}", value)
        return number

    def _is_word(self, word: str) -> bool:
        return self.token.kind == "word" and self.token.text == word

    def _take(self) -> _Token:
        taken, self.token = self.token, self._next()
        return taken

    def _next(self) -> _Token:
        found = _TOKEN.match(self._text, self._end)
        if found and found.lastgroup:
            self._end = found.end()
            return _Token(found.lastgroup, found[found.lastgroup], found.start(found.lastgroup))
        rest = self._text[self._end :]
        start = self._end + len(rest) - len(rest.lstrip())
        if start < len(self._text):
            what = "a quote is never closed" if self._text[start] in "\"'" else "unexpected character"
            raise self._wrong(what, _Token("end", "", start))
        return _Token("end", "", start)

    def _wrong(self, problem: str, at: _Token | None = None) -> NotecaseError:
        return _invalid(f"{problem} (character {(at or self.token).start + 1})")


def _invalid(problem: str) -> NotecaseError:
    return errors.invalid([Violation("filter", problem)])


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)


_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _microseconds(text: str) -> int | None:
    """Returns microseconds since 1970, truncated, or None if the text is not a time."""
    if not _RFC_3339.fullmatch(text.upper()):
        return None
    try:
        return (datetime.fromisoformat(text.upper()) - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        return None
