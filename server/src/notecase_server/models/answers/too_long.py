"""How servers say that a request is longer than their model takes: a table of facts, one row for each code or wording.

Each row has the words of one family of servers. What is not too long although it sounds so stands in its own tables:
too much output was asked for, one string is too long, or a limit by time is used up.
"""

import re
from typing import NamedTuple


class Code(NamedTuple):
    """A code or type of an error, in lower case without what stands between its parts."""

    code: str
    source: str


class Wording(NamedTuple):
    pattern: re.Pattern[str]
    source: str


def _says(pattern: str, source: str) -> Wording:
    return Wording(re.compile(pattern, re.IGNORECASE), source)


CODES = (
    Code("contextlengthexceeded", "OpenAI, Groq, Fireworks, Cerebras"),
    Code("exceedcontextsizeerror", "llama.cpp"),
    Code("contextexceeded", "DwarfStar"),
    Code("contextwindowexceeded", "gateways"),
    Code("contextwindowexceedederror", "LiteLLM"),
    Code("tokenslimitreached", "GitHub Models"),
    Code("modelmaxprompttokensexceeded", "GitHub Copilot"),
    Code("requesttoolarge", "Anthropic: 413"),
    Code("prompttoolong", "Vercel, Cloudflare gateways"),
    Code("inputtoolong", "Bedrock gateways, Chutes"),
    Code("contexttoolong", "SambaNova gateways"),
    Code("contextlimitexceeded", "Together gateways"),
    Code("inputtokenlimitexceeded", "SiliconFlow"),
    Code("tokenlimitexceeded", "Anthropic gateways"),
    Code("1261", "Zhipu: the prompt is too long"),
    Code("error_code.336007", "Baidu Qianfan: the messages are too long"),
    Code("error_code.336103", "Baidu Qianfan: the prompt is too long"),
    Code("base_resp.1039", "MiniMax: token limit"),
    Code("10907", "iFlytek Spark: too many tokens"),
)

WORDINGS = (
    _says(r"maximum context (length|window|size)", "OpenAI, vLLM, OpenRouter, DeepSeek"),
    _says(r"configured limit of [\d,]+ tokens", "OpenAI: input tokens exceed it"),
    _says(r"longer than the maximum model length", "vLLM: decoder prompt"),
    _says(r"exceeds (the )?model'?s maximum (context|sequence|input)? ?length", "SGLang, gateways"),
    _says(r"longer than the model'?s context length", "SGLang: the input"),
    _says(r"requested token count exceeds", "SGLang: the model's maximum context"),
    _says(r"input token count\b.*\bexceeds", "Gemini"),
    _says(r"unable to submit request because the input token count", "Vertex AI"),
    _says(r"(prompt|conversation) (is )?too long", "Anthropic, Fireworks, gateways"),
    _says(r"messages (are )?too long", "gateways"),
    _says(r"input is too long", "Bedrock"),
    _says(r"too many (input )?tokens\b(?! per)", "Cohere, Bedrock Titan"),
    _says(r"maximum prompt length", "xAI"),
    _says(r"reduce the length of (the|your) (messages|prompt|input)", "Groq, Azure"),
    _says(r"`?inputs`? (tokens \+ `?max_new_tokens`? )?must (be <=|have less than)", "TGI, Together"),
    _says(r"range of input length should be", "DashScope"),
    _says(r"exceeds max(imum)? length", "Zhipu"),
    _says(r"request body too large for .* model", "GitHub Models"),
    _says(r"prompt token count of \d+ exceeds", "GitHub Copilot"),
    _says(r"maximum allowed input length", "Poolside"),
    _says(
        r"exceed(s|ed)? ((the|this) )?(model'?s? )?(available )?context (size|length|limit|window)",
        "llama.cpp, llama-cpp-python, ds4, MLX; OpenAI, Responses and later models; Cloudflare; Anthropic",
    ),
    _says(r"greater than the context length", "LM Studio"),
    _says(
        r"context (length|window|size) (is |was |has been |of \d+ )?(exceeded|overflow)",
        "llama.cpp, Ollama, LM Studio, gateways",
    ),
    _says(r"reached context length of", "LM Studio: overflow policy"),
    _says(r"when (the )?context (the )?overflows", "LM Studio: tokens to keep"),
    _says(r"maximum supported sequence length", "SambaNova"),
    _says(r"message token length exceed", "DashScope"),
    _says(r"exceed max message tokens", "Volcengine Ark"),
    _says(r"exceed max_num_tokens", "TensorRT-LLM"),
    _says(r"expected maxLength: \d{4,}", "Bedrock"),
    _says(r"exceeds? (the |model'?s? )*(maximum )?token limit", "gateways"),
    _says(r"exceeds? (the )?max model len", "gateways before vLLM"),
    _says(r"context window exceeds limit", "MiniMax"),
    _says(r"exceeded model token limit", "Moonshot"),
    _says(r"input (text )?(length|tokens?) exceeds the (model's )?(max|limit)", "Baidu Qianfan, Tencent Hunyuan"),
    _says(r"prompt tokens? too long", "Baidu Qianfan"),
    _says(r"prompt contains \d+ tokens.{0,40}too large", "Mistral"),
    _says(r"prompt length \(?\d+\)? exceeds", "Fireworks, TensorRT-LLM"),
    _says(r"prompt (has|with) \d+ tokens,? (which )?exceeds", "NIM, Perplexity"),
    _says(r"exceeds the maximum (number of )?(input )?tokens (allowed|supported)", "watsonx, Databricks"),
    _says(r"number of input tokens \d+ cannot exceed", "watsonx"),
    _says(r"max_seq_len|max_position_embeddings|max_sequence_length", "LMDeploy, TensorRT-LLM, NIM"),
    _says(r"current length is \d+ while limit is \d+", "Cerebras"),
    _says(r"request too large for model|your request is too large for the model", "Groq, Anyscale"),
    _says(
        r"(对话|消息)(内容)?过长|输入(内容|文本|长度)?.{0,8}(过长|超出|超过)|上下文.{0,6}(超出|过长|超过)|超(出|过).{0,12}(上下文|最大长度)",
        "Chinese gateways",
    ),
)

OTHERS = (
    _says(
        r"max_(completion_|output_|new_)?tokens'?`?\"? (is|are) too (large|high|big)",
        "vLLM, Mistral: too much output is asked for",
    ),
    _says(r"at most \d+ completion tokens", "OpenAI: too much output is asked for"),
    _says(
        r"(?<!\+ `)max_(completion_|output_|new_)?tokens.{0,40}(must be|should be|cannot be|exceeds? the (max|model))",
        "DeepSeek, DashScope: the same",
    ),
    _says(r"string too long|string_above_max_length", "OpenAI: one string is too long"),
    _says(r"(tool|function)[^.]{0,40}(description|name)[^.]{0,40}too long", "one description is too long"),
    _says(r"(per|a|this|each) (minute|hour|day)|\b[tr]p[md]\b", "limits by time, which end"),
)
"""No request that is too long, although a row above applies."""


class Shares(NamedTuple):
    """A wording that tells how much was input and how much output was asked for."""

    pattern: re.Pattern[str]
    """With groups `limit`, and `input` or `output` or both."""
    source: str


SHARES = (
    Shares(
        re.compile(
            r"(?is)maximum context length is (?P<limit>\d{1,18}) tokens.*?(?P<input>\d{1,18}) (?:tokens )?"
            r"(?:in|from|of) (?:the |your )?(?:messages|prompt|input)(?: messages)?[,;] "
            r"(?:\d+ in the functions, )?(?:and )?"
            r"(?P<output>\d{1,18}) (?:tokens )?(?:in|for) the completion"
        ),
        "OpenAI, vLLM",
    ),
    Shares(
        re.compile(
            r"(?is)maximum context length is (?P<limit>\d{1,18}) tokens.*?requested (?P<output>\d{1,18}) output tokens"
            r".*?at least (?P<input>\d{1,18}) input tokens"
        ),
        "vLLM since 0.11",
    ),
    Shares(
        re.compile(
            r"(?is)max_new_tokens`? must be <= (?P<limit>\d{1,18})\. "
            r"Given: (?P<input>\d{1,18}) `inputs` tokens and (?P<output>\d{1,18})"
        ),
        "TGI, Together",
    ),
    Shares(
        re.compile(r"(?is)exceed context limit: (?P<input>\d{1,18}) \+ (?P<output>\d{1,18}) > (?P<limit>\d{1,18})"),
        "Anthropic",
    ),
)
"""Where the output alone, without any input, would be beyond the limit, the conversation is not to blame."""


def is_too_long(codes: tuple[str, ...], words: str) -> bool:
    """Returns whether an error, by its codes or its words, says that the request was too long for the model."""
    for shares in SHARES:
        if (found := shares.pattern.search(words)) and int(found["output"]) >= int(found["limit"]):
            return False
    if any(other.pattern.search(words) for other in OTHERS):
        return False
    known = [row.code for row in CODES]
    return any(code in known for code in codes) or any(row.pattern.search(words) for row in WORDINGS)
