"""Recognises how servers say that a request is too long for their model: a table with one row for each code or wording.

Each row has the words of one family of servers. Similar wordings with another meaning have their own tables: too much
output was requested, one string is too long, or a rate limit is used up.
"""

import re
from typing import NamedTuple


class Code(NamedTuple):
    """A code or type of an error, in lower case without separators."""

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

_SAID = r"\b(prompt|inputs?|messages?|conversation|history|context|chat|request|payload|sequence|query|tokens?)\b"
_ABOVE = (
    r"\b(exceed(s|ed|ing)?|overflow(s|ed)?|(above|beyond|longer|larger|greater|more) (than )?(the|its|this|our|max|\d))"
)
_CONTEXT = r"context (length|window|size|limit|budget)"

WORDINGS = (
    _says(rf"{_SAID}[^.!?]{{0,80}}?\btoo (long|large|big)\b", "Anthropic, Bedrock, Fireworks, Moonshot, Mistral, Groq"),
    _says(r"too many (messages|((total|input|prompt) )*(tokens|text bytes))\b(?! per)", "Cohere, Bedrock, Anthropic"),
    _says(rf"\btokens?\b[^.!?]{{0,80}}?{_ABOVE}", "Gemini, GitHub Copilot, Together, Volcengine, gateways"),
    _says(rf"{_ABOVE}[^.!?]{{0,60}}?\btokens?\b", "Moonshot, watsonx, NIM, gateways"),
    _says(r"\btokens?\b[^.!?]{0,60}? (must|should) be (less|fewer|at most|no more|<)", "gateways before TGI"),
    _says(r"(supports?|allows?|accepts?|takes?) (only|at most|up to|a maximum of) [\d,]+ tokens", "gateways"),
    _says(rf"{_CONTEXT}[^.!?]{{0,40}}?\b(exceed|overflow|reached|full\b)", "llama.cpp, Ollama, LM Studio, MiniMax"),
    _says(r"\bcontext (is |was )?(overflow|full\b|exceeded)|\b(out of|fit \w+( the)?) context\b", "gateways"),
    _says(
        rf"{_ABOVE}[^.!?]{{0,60}}?\b(context|n_ctx)\b(?! deadline| cancel)", "OpenAI, llama.cpp, ds4, MLX, Cloudflare"
    ),
    _says(rf"{_CONTEXT} (is|of)( only)? [\d,.]+ ?k?\b", "OpenAI, vLLM, OpenRouter, DeepSeek, DwarfStar"),
    _says(
        r"\b(prompt|inputs?|messages?|conversation|history|sequence|query)\b[^.!?]{0,60}?"
        rf"{_ABOVE}[^.!?]{{0,40}}?(max|limit|length|allowed|\d{{4,}})",
        "vLLM, SGLang, Poolside, Zhipu, Qianfan, Tencent Hunyuan, DashScope",
    ),
    _says(r"conversation (length|limit)\b[^.!?]{0,20}\b(exceed|reach)|reached its conversation limit", "Moonshot"),
    _says(r"(payload|body|request) size exceeds", "Gemini"),
    _says(r"input_ids is \d+, but `?max_length", "Hugging Face"),
    _says(r"n_keep\b.{0,40}n_ctx", "LM Studio"),
    _says(r"unable to submit request because the input token count", "Vertex AI"),
    _says(r"maximum prompt length", "xAI"),
    _says(r"reduce the length of (the|your) (messages|prompt|input)", "Groq, Azure"),
    _says(r"`?inputs`? (tokens \+ `?max_new_tokens`? )?must (be <=|have less than)", "TGI, Together"),
    _says(r"range of input length should be", "DashScope"),
    _says(r"maximum supported sequence length", "SambaNova"),
    _says(r"expected maxLength: \d{4,}", "Bedrock"),
    _says(r"prompt length \(?\d+\)? exceeds", "Fireworks, TensorRT-LLM"),
    _says(r"current length is \d+ while limit is \d+", "Cerebras"),
    _says(
        r"(输入|上下文|提示|prompt|对话|消息|请求|messages?|tokens?|内容|文本).{0,12}(过长|过大|超(?![时载额速频]))"
        r"|(上下文|tokens?数?)过多|超(?![时载额速频])(出|过)?.{0,12}(上下文|最大长度)",
        "Chinese gateways",
    ),
)
"""What was said, and that it is above what the model takes: most servers say so within a sentence, in either order."""

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
    _says(
        r"\b(output|completion|response) tokens?\b[^.!?]{0,20}\b(exceed|must|should|cannot)"
        r"|exceeds the max\w* (number of )?(output|completion)",
        "gateways: too much output is asked for",
    ),
    _says(
        r"\b(images?|audio|video|files?|headers?|cookies?|ur[il])\b[^.!?]{0,60}\btoo (long|large|big)\b|image tokens",
        "one part of the request is too large",
    ),
    _says(r"(图片|图像|文件|音频|视频|工具).{0,12}(过长|过大|超)", "Chinese gateways: the same"),
    _says(
        r"\b(per|a|this|each) (minute|hour|day)|\b[tr]p[md]\b|\b(rate|quota|daily|weekly|monthly)\b"
        r"|please wait|again (in|later)|retry after",
        "limits by time, which end",
    ),
    _says(
        r"\b(took|takes|taking|wait\w*|queued?|processing)\b[^.!?]{0,30}\btoo long|time.?out|timed out|deadline",
        "gateways: it is the time that is too long",
    ),
    _says(
        r"(?<!\+ )(?<!\+ `)(?<!and )(?<!and `)max_(completion_|output_|new_)?tokens\b[^.!?+]{0,40}"
        r"\b(exceed\w*|(greater|larger|higher|more) than)\b(?![^.!?]{0,40}\bcontext\b)",
        "gateways: too much output is asked for",
    ),
    _says(r"\b(thinking|reasoning)( tokens?)? budget|budget_tokens|stop sequence", "one member is too large"),
    _says(
        r"\b(images?|audio|video|files?)( (size|dimensions?|length))? exceeds?\b"
        r"|\b(tool|function)[^.!?]{0,40}\b(name|id)\b[^.!?]{0,20}exceed",
        "one part of the request is too large",
    ),
    _says(
        r"\b(flagged|moderation|content.(policy|filter\w*|management)|safety|toxic\w*|severity|harmful|sensitive)\b",
        "filters: what is above their limits is no length",
    ),
    _says(r"\b(concurren\w*|in flight|queue)\b", "what others send at the same time"),
    _says(
        r"(?s)\A(?!.*\bcontext (length|window)).*\b(account|organi[sz]ation|subscription)\b",
        "gateways: what is left to an account",
    ),
    _says(
        r"(频率|并发|额度|配额|限流|限速|速率|qps|敏感|违规|安全|审核|请求(数|次数|量)|每(秒|分|小时|天|日|月))",
        "Chinese gateways: the same",
    ),
)
"""No request that is too long, although a row above applies."""


class Shares(NamedTuple):
    """A wording that says how many tokens were input, and how many were requested as output."""

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
