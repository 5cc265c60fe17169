"""Reads how many tokens a reply used, from any place where a server reports it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from notecase import v1

_MOST = 2**40
"""Tokens: a count above that is none, such as -1 without its sign."""


class Place(NamedTuple):
    """A place of a count within the usage that a server reports."""

    field: str
    """The field of v1.Usage."""
    path: tuple[str, ...]
    source: str


PLACES = (
    Place("input_tokens", ("prompt_tokens",), "OpenAI and most others"),
    Place("input_tokens", ("input_tokens",), "Anthropic, OpenAI's Responses, Replicate gateways"),
    Place("input_tokens", ("promptTokenCount",), "Gemini"),
    Place("input_tokens", ("prompt_eval_count",), "Ollama"),
    Place("input_tokens", ("inputTokens",), "Bedrock"),
    Place("input_tokens", ("prompt_n",), "llama.cpp, `timings`"),
    Place("output_tokens", ("completion_tokens",), "OpenAI and most others"),
    Place("output_tokens", ("output_tokens",), "Anthropic, OpenAI's Responses"),
    Place("output_tokens", ("candidatesTokenCount",), "Gemini"),
    Place("output_tokens", ("eval_count",), "Ollama"),
    Place("output_tokens", ("outputTokens",), "Bedrock"),
    Place("output_tokens", ("generated_tokens",), "TGI, `details`"),
    Place("output_tokens", ("predicted_n",), "llama.cpp, `timings`"),
    Place("cached_input_tokens", ("prompt_tokens_details", "cached_tokens"), "OpenAI and most others"),
    Place("cached_input_tokens", ("input_tokens_details", "cached_tokens"), "OpenAI's Responses"),
    Place("cached_input_tokens", ("prompt_cache_hit_tokens",), "DeepSeek"),
    Place("cached_input_tokens", ("cached_tokens",), "Moonshot"),
    Place("cached_input_tokens", ("num_cached_tokens",), "Mistral"),
    Place("cached_input_tokens", ("cache_read_input_tokens",), "Anthropic, Databricks"),
    Place("cached_input_tokens", ("cacheReadInputTokens",), "Bedrock"),
    Place("cached_input_tokens", ("cachedContentTokenCount",), "Gemini"),
    Place("reasoning_tokens", ("completion_tokens_details", "reasoning_tokens"), "OpenAI and most others"),
    Place("reasoning_tokens", ("output_tokens_details", "reasoning_tokens"), "OpenAI's Responses"),
    Place("reasoning_tokens", ("reasoning_tokens",), "Perplexity, SGLang"),
    Place("reasoning_tokens", ("thoughtsTokenCount",), "Gemini"),
)

TOTALS = ("total_tokens", "totalTokenCount")
"""Members with all tokens of a call, of OpenAI and most others, and of Gemini."""

NEWLY_CACHED = ("cache_creation_input_tokens", "cacheWriteInputTokens")
"""Members with input that Anthropic and Bedrock count apart, so that a total has more than input and output."""

APART = {
    "input_tokens": ("cache_read_input_tokens", "cache_creation_input_tokens"),
    "inputTokens": ("cacheReadInputTokens", "cacheWriteInputTokens"),
}
"""By the member with a call's input, of Anthropic and Bedrock, those with the cached input that it does not have."""

MEMBERS = ("usage", "usageMetadata", "usage_metadata", "timings", "details")
"""The members of a chunk, a choice or `x_groq` that report it."""


class Counts:
    """The counts of one reply. A later report replaces an earlier one, except counts that it leaves out or gives as
    0."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._total = 0
        self.told = False
        """The last report had a count."""
        self.changed = False
        """A report had a new count since this was set to False."""

    def take(self, told: Any) -> None:
        """Takes a report in any shape; what is none is left out."""
        if not isinstance(told, dict):
            return
        seen: set[str] = set()
        for place in PLACES:
            if place.path[0] in told and place.field not in seen and (number := _number(told, place.path)):
                seen.add(place.field)
                self.changed = self.changed or number != self._counts.get(place.field)
                self._counts[place.field] = number
                self.told = True
        total = next((number for name in TOTALS if (number := _number(told, (name,)))), 0)
        given = self._counts.get("input_tokens", 0)
        for name, others in APART.items():
            within = total == given + self._counts.get("output_tokens", 0) or _number(told, ("prompt_tokens",))
            if given and given == _number(told, (name,)) and not within:
                self._counts["input_tokens"] = given + sum(_number(told, (other,)) for other in others)
        self._total = 0 if any(_number(told, (name,)) for name in NEWLY_CACHED) else total or self._total

    def take_all(self, value: Any) -> None:
        """Takes the first report of a whole document that has a count."""
        for report in _reports(value):
            self.told = False
            self.take(report)
            if self.told:
                return

    def usage(self, model: str) -> v1.Usage:
        usage = v1.Usage(model_calls=1, model=model, provider="", **self._counts)
        if usage.cached_input_tokens > usage.input_tokens:  # Databricks counts it apart under OpenAI's names
            usage.input_tokens += usage.cached_input_tokens
        usage.output_tokens += self._apart(usage)
        return usage

    def _apart(self, usage: v1.Usage) -> int:
        """Tokens of reasoning that are not in the output: xAI and Gemini count them apart (mozilla-ai/any-llm#1290,
        sonami-tech/omni-llm-provider#49, router-for-me/CLIProxyAPI#5733). Only the total shows those of Gemini; it may
        also have cached input that is not in the input, or the input itself where it is not reported."""
        beyond, reasoning = self._total - usage.input_tokens - usage.output_tokens, usage.reasoning_tokens
        if beyond == reasoning or (beyond > 0 and usage.input_tokens and not usage.cached_input_tokens):
            return beyond
        return reasoning if reasoning > usage.output_tokens else 0


def _reports(value: Any) -> Iterator[Any]:
    if not isinstance(value, dict):
        return
    for name in MEMBERS:
        if name in value:
            yield value[name]
    if "prompt_eval_count" in value or "eval_count" in value:
        yield value
    if isinstance(value.get("x_groq"), dict):
        yield from _reports({"usage": value["x_groq"].get("usage")})


def _number(told: dict[str, Any], path: tuple[str, ...]) -> int:
    value: Any = told
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
        return 0
    return int(value)
