"""A table of the meanings of finish reasons, one row for each word."""

import enum
import re
from typing import NamedTuple


class Finish(enum.Enum):
    """What became of a reply."""

    WHOLE = enum.auto()
    CALLS = enum.auto()
    """It is whole, and calls tools."""
    LIMIT = enum.auto()
    """It was cut at a limit, where a repeat would be cut again."""
    TOO_LONG = enum.auto()
    """It was cut at the end of the context window."""
    FILTERED = enum.auto()
    """Its provider withheld it, or the rest of it."""
    FAILED = enum.auto()
    """A failure cut it; a repeat may succeed."""
    AGAIN = enum.auto()
    """The model wrote a call that its provider could not read; another try may come out well."""
    UNKNOWN = enum.auto()
    """A word of the server's own: it ended the reply, and what was said is kept, but it does not mean that nothing was
    left to say."""


class Word(NamedTuple):
    """One word, in lower case with "_" between its parts."""

    word: str
    means: Finish
    source: str


WORDS = (
    Word("stop", Finish.WHOLE, "OpenAI and nearly all others; STOP of Gemini"),
    Word("end_turn", Finish.WHOLE, "Anthropic, Bedrock Converse"),
    Word("stop_sequence", Finish.WHOLE, "Anthropic, TGI, watsonx"),
    Word("eos", Finish.WHOLE, "Together"),
    Word("eos_token", Finish.WHOLE, "TGI, watsonx"),
    Word("eos_found", Finish.WHOLE, "OpenVINO, older NIM"),
    Word("stop_token", Finish.WHOLE, "Friendli, TensorRT-LLM"),
    Word("complete", Finish.WHOLE, "Cohere"),
    Word("completed", Finish.WHOLE, "OpenAI's Responses through gateways"),
    Word("done", Finish.WHOLE, "Ollama's done_reason through gateways"),
    Word("end", Finish.WHOLE, "Aleph Alpha, Writer"),
    Word("finish", Finish.WHOLE, "Bedrock Titan: FINISH"),
    Word("finished", Finish.WHOLE, "Ollama gateways"),
    Word("normal", Finish.WHOLE, "Baidu Qianfan"),
    Word("success", Finish.WHOLE, "SageMaker gateways"),
    Word("tool_calls", Finish.CALLS, "OpenAI and nearly all others"),
    Word("tool_call", Finish.CALLS, "Cohere: TOOL_CALL"),
    Word("tool_use", Finish.CALLS, "Anthropic, Bedrock Converse"),
    Word("function_call", Finish.CALLS, "OpenAI before tools, Qianfan"),
    Word("function_calls", Finish.CALLS, "Gemini gateways"),
    Word("incomplete", Finish.LIMIT, "OpenAI's Responses through gateways"),
    Word("refusal", Finish.FILTERED, "Anthropic"),
    Word("blocklist", Finish.FILTERED, "Gemini"),
    Word("spii", Finish.FILTERED, "Gemini"),
    Word("language", Finish.FILTERED, "Gemini"),
    Word("sensitive", Finish.FILTERED, "Zhipu"),
    Word("error_toxic", Finish.FILTERED, "Cohere"),
    Word("moderation", Finish.FILTERED, "gateways"),
    Word("insufficient_system_resource", Finish.FAILED, "DeepSeek"),
    Word("other", Finish.FAILED, "Gemini: OTHER"),
    Word("oom", Finish.FAILED, "servers of local models"),
    Word("unexpected_tool_call", Finish.AGAIN, "Gemini"),
)

PARTS = (
    Word(
        "malformed",
        Finish.AGAIN,
        "Gemini: MALFORMED_FUNCTION_CALL; Bedrock: malformed_tool_use, malformed_model_output",
    ),
    Word("error", Finish.FAILED, "OpenRouter, vLLM, Cohere: error; Zhipu: network_error"),
    Word("abort", Finish.FAILED, "vLLM, SGLang: abort; LMDeploy: aborted"),
    Word("fail", Finish.FAILED, "OpenAI's Responses through gateways: failed"),
    Word("cancel", Finish.FAILED, "TensorRT-LLM, NIM, Triton: cancelled"),
    Word("timeout", Finish.FAILED, "LM Studio, llama-swap"),
    Word("timed_out", Finish.FAILED, "gateways"),
    Word("deadline", Finish.FAILED, "gateways in Go: context deadline exceeded"),
    Word("interrupt", Finish.FAILED, "KoboldCpp, llamafile"),
    Word("disconnect", Finish.FAILED, "gateways"),
    Word("unavailable", Finish.FAILED, "gateways"),
    Word("overload", Finish.FAILED, "Moonshot: engine_overloaded"),
    Word("preempt", Finish.FAILED, "servers that give a slot to another request"),
    Word("quota", Finish.FAILED, "gateways"),
    Word("rate_limit", Finish.FAILED, "gateways: no limit of the reply"),
    Word("filter", Finish.FILTERED, "OpenAI, Azure: content_filter; Bedrock: content_filtered"),
    Word("safety", Finish.FILTERED, "Gemini: SAFETY, IMAGE_SAFETY"),
    Word("blocked", Finish.FILTERED, "gateways"),
    Word("policy", Finish.FILTERED, "gateways: content_policy"),
    Word("guardrail", Finish.FILTERED, "Bedrock: guardrail_intervened"),
    Word("recitation", Finish.FILTERED, "Gemini: IMAGE_RECITATION"),
    Word("prohibited", Finish.FILTERED, "Gemini: IMAGE_PROHIBITED_CONTENT"),
    Word("image_other", Finish.FAILED, "Gemini"),
    Word("too_many", Finish.FAILED, "Gemini: TOO_MANY_TOOL_CALLS"),
    Word(
        "context", Finish.TOO_LONG, "z.ai, Anthropic: model_context_window_exceeded; Cerebras: context_length_exceeded"
    ),
    Word("cache_full", Finish.TOO_LONG, "servers of local models: kv_cache_full"),
    Word("too_long", Finish.TOO_LONG, "gateways"),
    Word("exceed", Finish.LIMIT, "gateways: budget_exceeded"),
    Word("repetition", Finish.LIMIT, "vLLM, Volcengine: repetition, repetition_truncation"),
    Word("loop", Finish.LIMIT, "gateways: loop_detected"),
    Word("pause", Finish.LIMIT, "Anthropic: pause_turn"),
    Word("length", Finish.LIMIT, "OpenAI and nearly all others: length; Mistral: model_length"),
    Word("limit", Finish.LIMIT, "watsonx: token_limit, time_limit"),
    Word("max_", Finish.LIMIT, "Anthropic, Cohere, Gemini: MAX_TOKENS; TGI gateways: max_new_tokens"),
    Word("truncat", Finish.LIMIT, "Step, gateways: truncated"),
    Word("exception", Finish.FAILED, "gateways"),
    Word("crash", Finish.FAILED, "llama-swap, gateways before local models"),
    Word("kill", Finish.FAILED, "gateways before local models"),
    Word("terminat", Finish.FAILED, "gateways: terminated"),
    Word("shutdown", Finish.FAILED, "servers that stop: shutdown, server_shutdown"),
    Word("evict", Finish.FAILED, "servers that give a model's memory to another"),
    Word("out_of_memory", Finish.FAILED, "servers of local models"),
    Word("reject", Finish.FAILED, "gateways: rejected"),
    Word("busy", Finish.FAILED, "gateways"),
    Word("stall", Finish.FAILED, "gateways"),
    Word("expire", Finish.FAILED, "gateways: expired"),
    Word("internal", Finish.FAILED, "gateways: internal"),
)
"""For words that are in no row above: the first row whose word is a part of it counts. Servers make up their own for
failures, filters and limits."""

_NONE = frozenset({"null", "none", "undefined"})
"""How some servers write that a reply has not ended, in place of null."""

_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_OTHER = re.compile(r"[^a-z0-9]+")


def meaning(word: str) -> Finish:
    """Returns what a finish reason means, in whatever case and with whatever prefix it is written."""
    for row in WORDS:
        if row.word == word:
            return row.means
    plain = _OTHER.sub("_", _CAMEL.sub("_", word.rpartition(".")[2]).lower()).strip("_").removeprefix("finish_reason_")
    for row in WORDS:
        if row.word == plain:
            return row.means
    for row in PARTS:
        if row.word in plain:
            return row.means
    return Finish.UNKNOWN


def is_none(word: str) -> bool:
    """Returns whether a finish reason says that there is none."""
    return word.strip().lower() in _NONE


def is_cut(end: Finish) -> bool:
    """Returns whether a reply that ended so lacks its rest, at a limit or because of a filter."""
    return end in (Finish.LIMIT, Finish.TOO_LONG, Finish.FILTERED)
