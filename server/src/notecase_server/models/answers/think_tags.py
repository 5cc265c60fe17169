"""Tells reasoning that a model writes into its text from the text: `<think>` at the start of a reply and its like."""

from collections.abc import Iterator
from typing import NamedTuple

from notecase_server.models.contract import Reasoning, Text


class Tag(NamedTuple):
    opens: str
    closes: str
    source: str


TAGS = (
    Tag("<think>", "</think>", "DeepSeek R1, Qwen 3, MiniMax M2, GLM and most others"),
    Tag("<thinking>", "</thinking>", "Claude-like fine-tunes, Granite"),
    Tag("<thought>", "</thought>", "Gemini's compatible endpoint"),
    Tag("<reasoning>", "</reasoning>", "Reka, fine-tunes"),
    Tag("[THINK]", "[/THINK]", "Magistral"),
    Tag("<seed:think>", "</seed:think>", "Seed-OSS"),
    Tag("◁think▷", "◁/think▷", "Kimi-VL"),
    Tag("<|inner_prefix|>", "<|inner_suffix|>", "Apertus"),
)

_LONGEST = max(len(tag.opens) for tag in TAGS)


class ThinkTags:
    """Takes a reply's text piece by piece. Only a tag at the very start counts: later ones are part of what is said."""

    def __init__(self) -> None:
        self._held = ""
        self._closes: str | None = None
        self._strip = False
        self.begun = False
        """The text proper has begun, so that nothing more need be looked at."""
        self.skipped = 0
        """Characters that came and are no text."""

    def feed(self, piece: str) -> Iterator[Text | Reasoning]:
        """Yields what of the text is certain."""
        if self.begun:
            yield Text(piece)
            return
        self.skipped += len(piece)
        held = self._held + piece
        if self._closes is None and not self._strip:
            start = held.lstrip()
            for tag in TAGS:
                if start.startswith(tag.opens):
                    self._closes, held = tag.closes, start[len(tag.opens) :]
                    break
            else:
                if len(start) < _LONGEST and any(tag.opens.startswith(start) for tag in TAGS):
                    self._held = held
                    return
                self._strip = False
                yield from self._begin(held)
                return
        if self._closes is not None:
            thought, closed, rest = held.partition(self._closes)
            if not closed:
                # The end may be the beginning of the closing tag.
                keep = next((n for n in range(len(self._closes) - 1, 0, -1) if held.endswith(self._closes[:n])), 0)
                self._held = held[len(held) - keep :]
                if thought := held[: len(held) - keep]:
                    yield Reasoning(thought)
                return
            if thought:
                yield Reasoning(thought)
            self._closes, self._strip, held = None, True, rest
        text = held.lstrip()
        self._held = ""
        if text:
            yield from self._begin(text)

    def end(self) -> Iterator[Text | Reasoning]:
        """Yields what was held back."""
        held, self._held = self._held, ""
        if held and self._closes is not None:
            yield Reasoning(held)
        elif held:
            self.skipped -= len(held)
            yield Text(held)

    def _begin(self, text: str) -> Iterator[Text]:
        self._held = ""
        self.begun = True
        self.skipped -= len(text)
        if text:
            yield Text(text)
