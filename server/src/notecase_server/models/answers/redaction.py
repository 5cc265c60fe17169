"""Makes a provider's words safe to show: short, printable, and without the secrets that the provider was given."""

import base64
import binascii
import html
import re
from collections.abc import Iterator
from functools import lru_cache
from urllib.parse import quote, quote_plus, unquote

TOLD_CHARS = 300
"""Of a provider's message: enough for its sentence, too little for a request that it echoes."""

_SEARCHED_CHARS = 8 << 10
"""Characters that are searched for the key before the text is cut."""

MAX_LINK_CHARS = 2048
"""Of an address: signed ones have some hundreds, and browsers take no more than this of all."""

_LEAST_RUN = 8
"""Consecutive characters of the key that are not shown. Fewer reveal nothing and are in many words."""

_LONGEST_RUN = 16

_ANY_KEY = re.compile(r"(?i)\bbearer\s+\S+|\bsk-[\w*.-]{6,}")
_OTHER = re.compile(r"[^a-z0-9]")
_LINK = re.compile(r"https?://[^\s<>\"]+")
_NAME = re.compile(r"[\w][\w.:/@+ -]{0,127}\Z", re.ASCII)
_REASON = re.compile(r"[A-Za-z][\w.:-]{0,63}\Z", re.ASCII)
_SPACES = re.compile(r"\s+")

_WIDE = {0xFF01 + at: 0x21 + at for at in range(94)}

_WORD_CHARS = 128
_KNOWN_WORDS = 256
"""Names of models and reasons of ends come again with each reply, so that what they tell is remembered."""

_ROUNDS = 3
"""How often a text is decoded again, for text that was quoted several times."""


class Redactor:
    """Knows the keys of one provider in every common writing."""

    def __init__(self, *keys: str, source: str = "") -> None:
        """A key that is too short or too plain to be a secret is not looked for: servers without keys are given words
        such as "none" or "lm-studio", which stand in many messages. `source` is the setting that has the key."""
        self.source = source
        self._runs: dict[int, set[str]] = {}
        secrets = [key for key in keys if is_secret(key)]
        self._plain = [key.encode().lower() for key in secrets]
        self._tails = sorted({key[len(key.rstrip("=+/-_.~")) :] for key in secrets}, key=len, reverse=True)
        for writing in {writing for key in secrets for writing in _writings(key)}:
            size = max(min(len(writing) // 3, _LONGEST_RUN), _LEAST_RUN)
            runs = self._runs.setdefault(size, set())
            runs.update(writing[start : start + size] for start in range(len(writing) - size + 1))
        self._known = lru_cache(_KNOWN_WORDS)(self._tells)

    def told(self, text: str) -> str:
        """Returns a provider's words as one short line, with "[key]" in place of whatever looks like a key or holds a
        run of the key's characters."""
        text = text[:_SEARCHED_CHARS]
        if any(map(self._holds, _readings(text))):
            return "[key]"
        text = self._without_key(text)
        text = " ".join(_ANY_KEY.sub("[key]", text).split())
        text = "".join(char if char.isprintable() else "\ufffd" for char in text)
        return text if len(text) <= TOLD_CHARS else text[: TOLD_CHARS - 1] + "…"

    def name(self, text: str) -> str:
        """Returns a name that a provider gives (a code, a model), or nothing where it has the shape of none or holds
        the key."""
        return text if _NAME.match(text) and not self._known(text) else ""

    def reason(self, text: str) -> str:
        """Returns the word with which a provider ends a reply, as one word, or nothing where it is none or holds the
        key."""
        word = _SPACES.sub("_", text[:_SEARCHED_CHARS].strip())
        tells = self._known if len(text) <= _WORD_CHARS else self._tells
        return word if _REASON.match(word) and not tells(text) else ""

    def link(self, uri: str) -> str:
        """Returns an address that a provider names, or nothing where it is none that can be shown or holds the key."""
        fine = len(uri) <= MAX_LINK_CHARS and _LINK.fullmatch(uri) and uri.isprintable()
        return uri if fine and not self._tells(uri) else ""

    def is_echoed(self, data: bytes) -> bool:
        """Returns whether data that is kept as it came holds the key, in whatever case. It is opaque, so that nothing
        else is looked for."""
        data = data.lower() if self._plain else b""
        return any(key in data for key in self._plain)

    def _tells(self, text: str) -> bool:
        return bool(_ANY_KEY.search(text)) or self._holds(text) or any(map(self._holds, _readings(text)))

    def _holds(self, text: str) -> bool:
        bare = _bare(text)
        return any(
            not runs.isdisjoint(bare[at : at + size] for at in range(len(bare) - size + 1))
            for size, runs in self._runs.items()
        )

    def _without_key(self, text: str) -> str:
        if not self._runs:
            return text
        kept = [(at, char) for at, char in enumerate(text.lower()) if char.isascii() and char.isalnum()]
        if len(text.lower()) != len(text):
            return "[key]" if self._holds(text) else text
        bare = "".join(char for _, char in kept)
        hidden: list[tuple[int, int]] = []
        for size, runs in self._runs.items():
            hidden.extend(
                (kept[at][0], kept[at + size - 1][0] + 1)
                for at in range(len(bare) - size + 1)
                if bare[at : at + size] in runs
            )
        made: list[str] = []
        end = 0
        for first, last in sorted(hidden):
            if first > end or not made:
                made += [text[end:first], "[key]"]
            end = max(end, last)
        rest = text[end:]
        if made:
            tail = next((tail for tail in self._tails if rest.startswith(tail)), "")
            rest = rest.removeprefix(tail).lstrip("=")
        return "".join([*made, rest])


def is_secret(key: str) -> bool:
    """Returns whether a key is long and mixed enough to be one, and no stand-in."""
    bare = _bare(key)
    mixed = any(char.isdigit() for char in bare) and any(char.isalpha() for char in bare)
    return len(bare) >= 20 or (mixed and len(bare) >= _LEAST_RUN)


def _bare(text: str) -> str:
    """The text in lower case without what may stand between its characters."""
    return _OTHER.sub("", text.lower())


def _writings(key: str) -> set[str]:
    """The key in each writing, bare."""
    data, wide = key.encode(), key.encode("utf-16-le")
    made = {key, quote(key, safe=""), quote(key), quote_plus(key), quote(quote(key, safe=""), safe="")}
    made |= {binascii.hexlify(each).decode() for each in (data, wide)}
    made |= {"".join(f"{byte:{form}}" for byte in data) for form in ("d", "o", "03o")}
    made.add("".join(f"x{byte:02x}" for byte in data))
    for each in (data, wide):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            for before in range(3):
                # The characters that share bits with what stands before and behind are not the key's alone.
                encoded = encode(b"\0" * before + each).decode().rstrip("=")
                made.add(encoded[(before * 8 + 5) // 6 : -1])
    made.add(base64.b32encode(data).decode().rstrip("="))
    return {bare for writing in made if len(bare := _bare(writing)) >= _LEAST_RUN}


def _readings(text: str) -> Iterator[str]:
    """What a text says to who undoes its quoting: of URLs, HTML, JSON, quoted-printable and wide letters."""
    for _ in range(_ROUNDS):
        before = text
        for read in (unquote, html.unescape, _unescaped, _narrow):
            other = read(text)
            if other != text:
                yield other
            text = other
        if text == before:
            return


def _unescaped(text: str) -> str:
    r"""The text with \u002d, \u{2d}, \x2d and =2D read."""
    return re.sub(r"(?:\\(?:u00|u\{|x)|=)([0-9a-fA-F]{2})\}?", lambda found: chr(int(found[1], 16)), text)


def _narrow(text: str) -> str:
    """The text with full-width letters and signs as plain ones."""
    return text if text.isascii() else text.translate(_WIDE)
