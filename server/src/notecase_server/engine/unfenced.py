"""Removes what models put around a reply that is to be JSON, while it streams. Pure."""

import re

import msgspec

_FENCE = re.compile(r"`{3,}+[ \t]*+[a-zA-Z0-9+-]{0,16}+[ \t]*+\r?")

_ONE_LINE = re.compile(r"`{3,}+[ \t]*+[a-zA-Z0-9+-]{0,16}+[ \t]*+(?=[{\[])")

_PLAIN_FENCE = re.compile(r"(?i)`{3}[ \t]*+(json[5c]?)?[ \t]*+\r?")

_BEGINS_JSON = frozenset('{["-0123456789`')

_AROUND = "` \t\r\n"
"""What a fence and the space around JSON are made of."""

_HELD_PROSE = 16 << 10
"""Characters in front of JSON that are waited through, and of those behind it that are kept: a sentence or two."""

_HELD_BLANKS = 256
"""Characters of space that are waited through behind a fence that may not be one of JSON."""

_BLANK = re.compile(r"[\s\ufeff\u200b]*")

_OBJECT = re.compile(r'\[\s*\{\s*"|\{\s*["}]')
"""How an object, or a list of them, begins among words."""

_FLAT = r'[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+"'

_BETWEEN = re.compile(rf"(?:{_FLAT}|[{{\[](?:{_FLAT})*+[}}\]])*+", re.DOTALL)
"""Within brackets, what comes up to the next one, or to a string whose end is still to come. Whole strings, and objects
and lists that hold no others, are passed without a step of Python for each."""

_REST_OF_STRING = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)

_RUNS = re.compile(r"[{\[]++|[}\]]++")


def _until(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    return found.end() if found else start


class _Brackets:
    """Finds the end of a JSON object or list, piece by piece."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end(self, text: str) -> int:
        """Returns the index behind its last bracket; -1 where that is still to come."""
        at = int(self._escaped and bool(text))
        self._escaped = self._escaped and not text
        while at < len(text):
            if self._in_string:
                at = _until(_REST_OF_STRING, text, at)
                self._escaped = text[at:] == "\\"
                self._in_string = text[at : at + 1] != '"'
                at += 1
                continue
            at = _until(_BETWEEN, text, at) if self._depth else at
            run = _until(_RUNS, text, at) - at
            if not run:
                self._in_string = text[at : at + 1] == '"'
                at += 1
            elif text[at] in "{[":
                self._depth += run
                at += run
            elif run >= self._depth:
                return at + self._depth
            else:
                self._depth -= run
                at += run
        return -1


class Unfenced:
    """A reply's JSON without what models put around it, piece by piece: a fence, "```json" before it and "```" behind,
    and words before and behind.

    Text that may be around it is held back until more comes, so that no slice is ever withdrawn, and all slices
    together are the reply. Words without any JSON stay, and the model is asked again."""

    def __init__(self) -> None:
        self.held = 0
        """Characters that were taken in and not given out: with those behind the JSON, which are not kept."""
        self._held: list[str] = []
        self._begun = False
        self._fenced = False
        self._brackets: _Brackets | None = None
        """Of an object or a list that no fence is around."""
        self._given: list[str] = []
        """Of that, what was given out."""
        self._closed = False
        self._again = False
        """What may be another reply has come behind the end of this one."""
        self._last = ""
        """The last two characters behind it."""

    def feed(self, piece: str) -> str:
        """As much of the reply as is certain."""
        if self._closed:
            self._behind(piece)
            return ""
        if self._begun and not piece.strip(_AROUND):
            ends_fence = self._fenced and "\n```" in "".join(self._held[-3:])[-3:] + piece
            if not ends_fence:
                self._hold(piece)
                return ""
        text = self._taken() + piece
        if not self._begun:
            found = self._begin(text)
            if found is None:
                self._hold(text)
                return ""
            text = found
            self._begun = bool(text) or self._fenced
            if text.startswith(("{", "[")) and not self._fenced:
                self._brackets = _Brackets()
        if self._fenced:
            # No string of JSON holds a line break, so that this is the fence.
            inner, closed, behind = text.partition("\n```")
            if closed:
                self._closed = True
                self._behind(behind)
                return inner.rstrip()
        sure = text.rstrip(_AROUND)
        if self._brackets is not None:
            end = self._brackets.end(sure)
            self._given.append(sure if end < 0 else sure[:end])
            if end >= 0:
                self._closed = True
                self._behind(text[end:])
                return sure[:end]
        self._hold(text[len(sure) :])
        return sure

    def _hold(self, piece: str) -> None:
        if piece:
            self._held.append(piece)
            self.held += len(piece)

    def _behind(self, piece: str) -> None:
        """Takes in what comes behind the reply. Of that only the beginning is kept."""
        joint = self._last + piece
        self._again = self._again or ("```" if self._fenced else "{") in joint
        self._last = joint[-2:]
        if self.held < _HELD_PROSE:
            self._held.append(piece[:_HELD_PROSE])
        self.held += len(piece)

    def _begin(self, text: str) -> str | None:
        """The text behind the opening fence, or all of it where it begins as JSON does. None while that is open."""
        size, start = len(text), _until(_BLANK, text, 0)
        while start < len(text) and text[start] not in _BEGINS_JSON:
            thought = text.find("</think>", start)
            if thought < 0:
                break
            start = _until(_BLANK, text, thought + len("</think>"))  # opened in the prompt, where the template has it
        text = text[start:]
        if not text:
            return ""
        if text[0] == "`":
            return self._behind_fence(text, "")
        if text[0] in _BEGINS_JSON:
            return text
        words, fence, rest = text.partition("```")
        if fence:
            return self._behind_fence(fence + rest, words)
        return None if size < _HELD_PROSE else text

    def _behind_fence(self, text: str, words: str) -> str | None:
        if (found := _ONE_LINE.match(text)) is not None:
            return text[found.end() :]
        line, end, rest = text.partition("\n")
        enough = len(text) > _HELD_PROSE
        if not _FENCE.fullmatch(line):
            return words + text if end or enough else None
        begins = rest[_until(_BLANK, rest, 0) :][:1]
        if end and (_PLAIN_FENCE.fullmatch(line) or begins in ("{", "[")):
            self._fenced = True
            return rest
        return words + text if begins or enough or len(rest) > _HELD_BLANKS else None

    def words(self) -> str:
        """Returns the text that was held back, when a call follows it."""
        if self._begun:
            return ""
        words = self._taken()
        self._begun = bool(words.strip())
        return words

    def _taken(self) -> str:
        held = "".join(self._held)
        self._held, self.held = [], 0
        return held

    def end(self) -> str:
        """The rest, once the reply is whole."""
        rest = self._taken().rstrip()
        if self._closed:
            # Words behind the reply are left out; another object or fence makes it more than one.
            if rest and not self._fenced and not (self._again or _is_json("".join(self._given))):
                return rest  # it only begins as JSON does
            return f"\n{'```' if self._fenced else ''}{rest}" if self._again else ""
        if not self._begun:
            return _object_among(rest)
        return rest.removesuffix("```").rstrip() if self._fenced else rest


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (ValueError, RecursionError):
        return False
    return True


def _object_among(words: str) -> str:
    """The one object, or list of objects, among words without a fence; the words where there is none, or another."""
    found = _OBJECT.search(words)
    if found is None:
        return words
    text = words[found.start() :]
    end = _Brackets().end(text)
    return words if end < 0 or "{" in text[end:] else text[:end]
