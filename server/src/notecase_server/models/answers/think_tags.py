"""Tells reasoning that a model writes into its text from the text: `<think>` at the start of a reply and its like.

The templates of some models write the opening tag into the request, so that only the closing one comes (DeepSeek R1,
QwQ and others behind vLLM, SGLang and llama.cpp without a parser: mudler/LocalAI#4761, ItzCrazyKns/Vane#1034,
perplexityai/api-discussion#177). It ends reasoning unless it may be a mention of the tag.
"""

import re
from typing import NamedTuple

from notecase_server.models.contract import Reasoning, Text, Thought


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
    Tag(
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "gpt-oss on servers without its format: ml-explore/mlx-lm#1867, kekzl/imp#768, Augustas11/macprovider#743",
    ),
)

_LONGEST = max(len(tag.opens) for tag in TAGS)
_FIRST = frozenset(tag.opens[0] for tag in TAGS)

_LONGEST_END = max(len(tag.closes) for tag in TAGS)
_FIRST_OF_END = re.compile(f"[{re.escape(''.join({tag.closes[0] for tag in TAGS}))}]")
_ENDS = re.compile("|".join(re.escape(tag.closes) for tag in TAGS))

_MOST_MENTIONS = 8
"""Closing tags of a reply that are looked at, each with all text before it."""

_OPEN_QUOTES = frozenset("`'\"\u2018\u201c\u00ab([{")
_CLOSE_QUOTES = frozenset("`'\"\u2019\u201d\u00bb)]},;:.")
_STOPS = frozenset(".!?\u2026\u3002\uff01\uff1f")


class ThinkTags:
    """Takes a reply's text piece by piece. An opening tag counts only at the very start: later ones are part of what is
    said."""

    def __init__(self) -> None:
        self._held = ""
        self._closes: str | None = None
        self._strip = False
        self._said: list[str] = []
        """The text that was given out while a closing tag may still come alone."""
        self._mentions = 0
        self._mixed = False
        self.begun = False
        """The text proper has begun."""
        self.settled = False
        """Whatever comes is text, so that nothing more need be looked at."""
        self.skipped = 0
        """Characters that came and are not text."""

    def feed(self, piece: str) -> list[Text | Reasoning | Thought]:
        """Returns what of the text is certain. Thought says what all text so far has turned out to be."""
        if self.begun:
            return self._text(piece)
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
        found: list[Text | Reasoning | Thought] = []
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

    def interrupt(self) -> list[Text | Reasoning | Thought]:
        """Says that something else than text comes, and returns what was held back of the text before it, which stays
        text."""
        found = self._look(self._held, last=True) if self.begun and self._held else []
        self._mixed = True
        return found

    def end(self) -> list[Text | Reasoning | Thought]:
        """Returns what was held back."""
        held = self._held
        if not held:
            return []
        if self._closes is not None and not self.begun:
            self._held = ""
            return [Reasoning(held)]
        found = [] if self.begun else self._begin(held)
        return found + self._look(self._held, last=True) if self._held else found

    def _begin(self, text: str) -> list[Text | Reasoning | Thought]:
        self._held = ""
        self.begun = bool(text.strip())
        self.skipped -= len(text)
        self.settled = self._strip
        return [Text(text)] if self.settled else self._text(text)

    def _text(self, piece: str) -> list[Text | Reasoning | Thought]:
        if self.settled:
            return [Text(piece)]
        if not self._held and not _FIRST_OF_END.search(piece):
            self._said.append(piece)
            return [Text(piece)]
        return self._look(self._held + piece)

    def _look(self, text: str, *, last: bool = False) -> list[Text | Reasoning | Thought]:
        """Looks for a closing tag in text that was not given out yet; `last` says that nothing follows it."""
        self._held, at = "", 0
        while found := _ENDS.search(text, at):
            before, rest = "".join(self._said) + text[: found.start()], text[found.end() :]
            if not last and not (rest if before.strip() else rest.strip()):
                return self._hold(text, found.start())
            if _is_end(before, found[0], rest) and not (self._mixed and before.strip()):
                return self._thought(before, rest, len(text) - len(rest))
            at = found.end()
            self._mentions += 1
            if self._mentions == _MOST_MENTIONS:
                self.settled, self._said = True, []
                return [Text(text)]
        begun = _FIRST_OF_END.search(text, max(len(text) - _LONGEST_END + 1, at))
        while begun and not last:
            if any(tag.closes.startswith(text[begun.start() :]) for tag in TAGS):
                return self._hold(text, begun.start())
            begun = _FIRST_OF_END.search(text, begun.end())
        return self._hold(text, len(text))

    def _hold(self, text: str, at: int) -> list[Text | Reasoning | Thought]:
        """Gives out what stands before `at`, unless it is only space at the beginning of a reply."""
        if at < len(text) and not self._said and not text[:at].strip():
            at = 0
        said, self._held = text[:at], text[at:]
        if not said:
            return []
        self._said.append(said)
        return [Text(said)]

    def _thought(self, before: str, rest: str, unsaid: int) -> list[Text | Reasoning | Thought]:
        """Gives out the text so far as reasoning, and begins the text proper behind it."""
        found: list[Text | Reasoning | Thought] = []
        if before.strip():
            found.append(Thought(before) if self._said else Reasoning(before))
        self.skipped += sum(map(len, self._said)) + unsaid
        self._said, self._strip, self.begun = [], True, False
        return found + self.feed(rest)


def _is_end(before: str, tag: str, rest: str) -> bool:
    """Whether a closing tag without an opening one before it ends reasoning, and is not only mentioned there: in code,
    in quotes, or as a word of a sentence."""
    line = before.rpartition("\n")[2]
    opened = any(row.closes == tag and (row.opens in before or f"{row.opens[:-1]} " in before) for row in TAGS)
    if opened or before.count("```") % 2 or line.count("`") % 2 or rest[:1] in _CLOSE_QUOTES:
        return False
    if not before.strip():
        return bool(rest.strip())
    if rest[:1] in {"", "\n", "\r"}:
        return not line or not line[-1].isspace() or line.rstrip()[-1:] in _STOPS
    if line.count('"') % 2:
        return False
    return not rest[0].isspace() and (not line or not (line[-1].isspace() or line[-1] in _OPEN_QUOTES))
