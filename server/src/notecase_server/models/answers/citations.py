"""Collects the sources that a provider names for a reply: citations of places in its text, and lists that the text
refers to by number."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from notecase_server.models.answers.redaction import Redactor
from notecase_server.models.contract import Source

MOST = 50
"""Sources of a reply: a search that is shown to a reader finds five to twenty."""

MOST_CHARS = 16 << 10
"""Of their addresses together, which are looked through for the key: some 10 ms."""


class Citations:
    """Collects the sources of one reply. Servers send them once, with each chunk, or again with a whole message."""

    def __init__(self) -> None:
        self._placed: dict[tuple[str, int, int], str] = {}
        self._listed: dict[str, str] = {}
        self._last: tuple[Any, Any] = (None, None)

    def annotated(self, annotations: Any) -> None:
        """Takes the `annotations` of a delta or a message. Those that name no address are left out."""
        for annotation in annotations if isinstance(annotations, list) else ():
            if not isinstance(annotation, Mapping) or len(self._placed) >= MOST:
                continue
            held = annotation.get("url_citation")
            told = held if isinstance(held, Mapping) else annotation
            for uri, title in _source(told):
                where = (uri, _number(told.get("start_index")), _number(told.get("end_index")))
                self._placed[where] = title or self._placed.get(where, "")

    def listed(self, citations: Any, results: Any) -> None:
        """Takes the `citations` and `search_results` of a chunk, whose text refers to the first by number."""
        if (citations, results) == self._last:
            return
        self._last = (citations, results)
        for value in (citations, results):
            for entry in value[:MOST] if isinstance(value, list) else ():
                for uri, title in _source({"url": entry} if isinstance(entry, str) else entry):
                    if uri in self._listed or len(self._listed) < MOST:
                        self._listed[uri] = title or self._listed.get(uri, "")

    def all(self, redactor: Redactor, unsaid: int) -> Sequence[Source]:
        """Returns them in the provider's order, listed ones first. `unsaid` is how many characters of the content came
        before the text."""
        titles = {uri: title for (uri, _, _), title in self._placed.items() if title}
        titles |= {uri: title for uri, title in self._listed.items() if title}
        found = [(uri, 0, 0) for uri in self._listed]
        found += [(uri, start, end) for uri, start, end in self._placed if end > start or uri not in self._listed]
        shown: dict[str, str] = {}
        left = MOST_CHARS
        for uri in dict.fromkeys(uri for uri, _, _ in found[:MOST]):
            left -= len(uri)
            if left >= 0 and redactor.link(uri):
                shown[uri] = redactor.told(titles.get(uri, ""))
        return [
            Source(uri, shown[uri], *((start - unsaid, end - unsaid) if end > start >= unsaid else (0, 0)))
            for uri, start, end in found[:MOST]
            if uri in shown
        ]


def _source(told: Any) -> Iterator[tuple[str, str]]:
    uri, title = (told.get("url"), told.get("title")) if isinstance(told, Mapping) else ("", "")
    if isinstance(uri, str) and uri:
        yield uri, title if isinstance(title, str) else ""


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
