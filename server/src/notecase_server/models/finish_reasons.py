"""What a provider's word for the end of a reply means: a table of facts, one row for each word."""

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
    Word("length", Finish.LIMIT, "OpenAI and nearly all others"),
    Word("max_tokens", Finish.LIMIT, "Anthropic, Cohere, Gemini: MAX_TOKENS"),
    Word("max_output_tokens", Finish.LIMIT, "OpenAI's Responses through gateways"),
    Word("max_new_tokens", Finish.LIMIT, "TGI gateways"),
    Word("max_length", Finish.LIMIT, "KoboldCpp, FastChat"),
    Word("model_length", Finish.LIMIT, "Mistral"),
    Word("token_limit", Finish.LIMIT, "watsonx"),
    Word("time_limit", Finish.LIMIT, "watsonx"),
    Word("incomplete", Finish.LIMIT, "OpenAI's Responses through gateways"),
    Word("repetition_truncation", Finish.LIMIT, "Volcengine, Step: a reply that repeats itself"),
    Word("model_context_window_exceeded", Finish.TOO_LONG, "z.ai, Anthropic"),
    Word("context_length_exceeded", Finish.TOO_LONG, "Cerebras, gateways"),
    Word("content_filter", Finish.FILTERED, "OpenAI, Azure"),
    Word("content_filtered", Finish.FILTERED, "Bedrock"),
    Word("guardrail_intervened", Finish.FILTERED, "Bedrock"),
    Word("refusal", Finish.FILTERED, "Anthropic"),
    Word("safety", Finish.FILTERED, "Gemini"),
    Word("recitation", Finish.FILTERED, "Gemini"),
    Word("blocklist", Finish.FILTERED, "Gemini"),
    Word("prohibited_content", Finish.FILTERED, "Gemini"),
    Word("spii", Finish.FILTERED, "Gemini"),
    Word("language", Finish.FILTERED, "Gemini"),
    Word("image_safety", Finish.FILTERED, "Gemini"),
    Word("sensitive", Finish.FILTERED, "Zhipu"),
    Word("error_toxic", Finish.FILTERED, "Cohere"),
    Word("moderation", Finish.FILTERED, "gateways"),
    Word("error", Finish.FAILED, "OpenRouter, vLLM, Cohere"),
    Word("abort", Finish.FAILED, "vLLM, SGLang"),
    Word("aborted", Finish.FAILED, "LMDeploy"),
    Word("cancelled", Finish.FAILED, "TensorRT-LLM, NIM, Triton"),
    Word("canceled", Finish.FAILED, "the same in American English"),
    Word("timeout", Finish.FAILED, "LM Studio, llama-swap"),
    Word("insufficient_system_resource", Finish.FAILED, "DeepSeek"),
    Word("network_error", Finish.FAILED, "Zhipu"),
    Word("engine_overloaded", Finish.FAILED, "Moonshot"),
    Word("failed", Finish.FAILED, "OpenAI's Responses through gateways"),
    Word("interrupted", Finish.FAILED, "KoboldCpp, llamafile"),
    Word("other", Finish.FAILED, "Gemini: OTHER"),
    Word("malformed_function_call", Finish.AGAIN, "Gemini"),
    Word("unexpected_tool_call", Finish.AGAIN, "Gemini"),
    Word("malformed_response", Finish.AGAIN, "Gemini"),
    Word("malformed_tool_use", Finish.AGAIN, "Bedrock"),
    Word("malformed_model_output", Finish.AGAIN, "Bedrock"),
)

PARTS = (
    Word("error", Finish.FAILED, "a word that is not in the table and speaks of failure"),
    Word("abort", Finish.FAILED, "the same"),
    Word("fail", Finish.FAILED, "the same"),
    Word("cancel", Finish.FAILED, "the same"),
    Word("timeout", Finish.FAILED, "the same"),
    Word("timed_out", Finish.FAILED, "the same"),
    Word("interrupt", Finish.FAILED, "the same"),
    Word("disconnect", Finish.FAILED, "the same"),
    Word("unavailable", Finish.FAILED, "the same"),
    Word("overload", Finish.FAILED, "the same"),
    Word("preempt", Finish.FAILED, "the same"),
    Word("malformed", Finish.AGAIN, "a word that speaks of a call which could not be read"),
    Word("filter", Finish.FILTERED, "a word that speaks of a filter"),
    Word("safety", Finish.FILTERED, "the same"),
    Word("blocked", Finish.FILTERED, "the same"),
    Word("policy", Finish.FILTERED, "the same"),
    Word("guardrail", Finish.FILTERED, "the same"),
    Word("length", Finish.LIMIT, "a word that speaks of a limit"),
    Word("limit", Finish.LIMIT, "the same"),
    Word("max_", Finish.LIMIT, "the same"),
    Word("truncat", Finish.LIMIT, "the same"),
)
"""For words that are in no row: the first row whose word is a part of it counts."""

_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_OTHER = re.compile(r"[^a-z0-9]+")


def meaning(word: str) -> Finish:
    """Returns what a finish reason means, in whatever case and with whatever prefix it is written. A word that nothing
    is known of means that the reply is whole: the server sent one in place of none."""
    plain = _OTHER.sub("_", _CAMEL.sub("_", word.rpartition(".")[2]).lower()).strip("_").removeprefix("finish_reason_")
    for row in WORDS:
        if row.word == plain:
            return row.means
    for row in PARTS:
        if row.word in plain:
            return row.means
    return Finish.WHOLE
