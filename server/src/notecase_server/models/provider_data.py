"""Takes out of a reply the data that its provider gets back with a later request: signatures and encrypted reasoning,
in different members for each provider."""

import json
from typing import Any

import msgspec
from notecase import v1

from notecase_server.models.answers.surrogates import mended
from notecase_server.models.contract import Returned

MAX_BYTES = 128 << 10
"""Of one reply's data together. It is stored with each change of its call; a signature has some kilobytes, and a part
of one is worth nothing."""

OF_MESSAGES = ("reasoning_details", "thinking_blocks", "reasoning_opaque", "extra_content")
"""Members of a reply that are given back with it: OpenRouter's and MiniMax's, LiteLLM's, GitHub Copilot's, Google's."""

OF_CALLS = ("extra_content", "provider_specific_fields")
"""Members of a call that are given back with it: Google's, LiteLLM's."""

_TEXTS = ("text", "summary", "thinking")
"""Members of one entry of a list that come in pieces. What is encrypted comes whole."""


class ProviderData:
    """Collects the data that the provider gets back with one reply."""

    def __init__(self) -> None:
        self._text_member = ""
        self._members: dict[str, Any] = {}
        self._calls: dict[int, dict[str, Any]] = {}
        self._ids: dict[int, str] = {}

    def message(self, said: Any) -> None:
        """Takes one piece of the reply: an object with the members of `delta`."""
        if not self._text_member:
            self._text_member = next((name for name in ("reasoning_content", "reasoning") if getattr(said, name)), "")
        for name in OF_MESSAGES:
            if value := getattr(said, name, None):
                self._members[name] = _more(self._members.get(name), value)

    def call(self, key: int, piece: Any) -> None:
        """Takes one piece of the call of that key: an object with the members of an entry of `tool_calls`."""
        if piece.id and key not in self._ids:
            self._ids[key] = mended(str(piece.id))
        for name in OF_CALLS:
            if value := getattr(piece, name, None):
                members = self._calls.setdefault(key, {})
                members[name] = _more(members.get(name), value)

    def all(self) -> list[Returned]:
        """Returns all of it, or nothing when it is too much. Whose it is, is left to be filled in."""
        returned = [
            Returned(
                key,
                v1.ProviderData(
                    call_id=self._ids.get(key, ""),
                    members=_encoded(self._calls.get(key)),
                ),
            )
            for key in sorted(self._ids.keys() | self._calls.keys())
        ]
        if self._members or self._text_member:
            data = v1.ProviderData(text_member=self._text_member, members=_encoded(self._members))
            returned.append(Returned(None, data))
        return returned if sum(one.data.ByteSize() for one in returned) <= MAX_BYTES else []


def _encoded(members: dict[str, Any] | None) -> bytes:
    if not members:
        return b""
    try:
        return msgspec.json.encode(members)
    except UnicodeEncodeError:  # by halves of characters
        return mended(json.dumps(members, ensure_ascii=False, separators=(",", ":"))).encode()


def _more(before: Any, value: Any) -> Any:
    """What came before with one more piece. Entries of one kind and index are one entry in pieces, as text is."""
    if isinstance(before, str) and isinstance(value, str):
        return before + value
    if not (isinstance(before, list | None) and isinstance(value, list)):
        return value
    entries = list(before or ())
    for entry in value:
        last = entries[-1] if entries else None
        if isinstance(entry, dict) and isinstance(last, dict) and _continues(last, entry):
            joined = {name: last[name] + entry[name] for name in _TEXTS if _are_texts(last, entry, name)}
            entries[-1] = last | {name: told for name, told in entry.items() if told is not None} | joined
        else:
            entries.append(entry)
    return entries


def _continues(last: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Whether the entry goes on with the last one."""
    same = all(last.get(name) == entry.get(name) for name in ("type", "index"))
    return same and any(name in last for name in _TEXTS)


def _are_texts(last: dict[str, Any], entry: dict[str, Any], name: str) -> bool:
    return isinstance(last.get(name), str) and isinstance(entry.get(name), str)
