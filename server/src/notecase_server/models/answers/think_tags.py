"""Tells reasoning that a model writes into its text from the text: `<think>` at the start of a reply and its like."""

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
    Tag("<Thought>", "</Thought>", "fine-tunes, as Open WebUI knows them"),
    Tag("<reason>", "</reason>", "fine-tunes, as Open WebUI knows them"),
    Tag("<reasoning>", "</reasoning>", "Reka, fine-tunes"),
    Tag("[THINK]", "[/THINK]", "Magistral"),
    Tag("<seed:think>", "</seed:think>", "Seed-OSS"),
    Tag("◁think▷", "◁/think▷", "Kimi-VL"),
    Tag("<|inner_prefix|>", "<|inner_suffix|>", "Apertus"),
    Tag("<|begin_of_thought|>", "<|end_of_thought|>", "Sky-T1, OpenThinker"),
    Tag("<|channel>thought", "<channel|>", "Gemma 4: NousResearch/hermes-agent#67632, jundot/omlx#560"),
    Tag("<|START_THINKING|>", "<|END_THINKING|>", "Cohere Command A Reasoning"),
    Tag("<longcat_think>", "</longcat_think>", "LongCat"),
)

_LONGEST = max(len(tag.opens) for tag in TAGS)
_FIRST = frozenset(tag.opens[0] for tag in TAGS)


class ThinkTags:
    """Takes a reply's text piece by piece. Only a tag at the very start counts: later ones are part of what is said."""

    def __init__(self) -> None:
        self._held = ""
        self._closes: str | None = None
        self._strip = False
        self.begun = False
        """The text proper has begun, so that nothing more need be looked at."""
        self.skipped = 0
        """Characters that came and are not text."""

    def feed(self, piece: str) -> list[Text | Reasoning]:
        """Returns what of the text is certain."""
        if self.begun:
            return [Text(piece)]
        self.skipped += len(piece)
        held = self._held + piece
        if self._closes is None and not self._strip:
            start = held.lstrip()
            if start and start[0] not in _FIRST:
                return self._begin(held)
            for tag in TAGS:
                if start.startswith(tag.opens):
                    self._closes, held = tag.closes, start[len(tag.opens) :]
                    break
            else:
                if len(start) < _LONGEST and any(tag.opens.startswith(start) for tag in TAGS):
                    self._held = held
                    return []
                return self._begin(held)
        found: list[Text | Reasoning] = []
        if self._closes is not None:
            thought, closed, rest = held.partition(self._closes)
            if not closed:
                # The end may be the beginning of the closing tag.
                keep = next((n for n in range(len(self._closes) - 1, 0, -1) if held.endswith(self._closes[:n])), 0)
                self._held = held[len(held) - keep :]
                if thought := held[: len(held) - keep]:
                    found.append(Reasoning(thought))
                return found
            if thought:
                found.append(Reasoning(thought))
            self._closes, self._strip, held = None, True, rest
        self._held = ""
        if text := held.lstrip():
            found += self._begin(text)
        return found

    def end(self) -> list[Text | Reasoning]:
        """Returns what was held back."""
        held = self._held
        if not held:
            return []
        if self._closes is not None:
            self._held = ""
            return [Reasoning(held)]
        return self._begin(held)

    def _begin(self, text: str) -> list[Text | Reasoning]:
        self._held = ""
        self.begun = bool(text.strip())
        self.skipped -= len(text)
        return [Text(text)]
