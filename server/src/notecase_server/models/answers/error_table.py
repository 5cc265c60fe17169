"""Tables of the meanings of providers' errors, by status, code or words, one row for each."""

import enum
import re
from typing import NamedTuple


class Verdict(enum.Enum):
    """What an error means to the caller."""

    PASSING = enum.auto()
    """A repeat may succeed."""
    AGAIN = enum.auto()
    """The model wrote something that its provider could not read: worth one more try."""
    ACCOUNT = enum.auto()
    """Nothing is left to pay with."""
    CREDENTIAL = enum.auto()
    """The server's key is wrong or may not be used."""
    REFUSED = enum.auto()
    """The request is not taken, now or later."""


class Status(NamedTuple):
    status: int
    means: Verdict
    source: str


class Code(NamedTuple):
    code: str
    """In lower case without separators; with the name of its member if numbers clash."""
    means: Verdict
    source: str


class Words(NamedTuple):
    pattern: re.Pattern[str]
    means: Verdict
    source: str


STATUSES = (
    Status(401, Verdict.CREDENTIAL, "HTTP"),
    Status(402, Verdict.ACCOUNT, "DeepSeek, OpenRouter, Vercel"),
    Status(408, Verdict.PASSING, "HTTP"),
    Status(409, Verdict.PASSING, "OpenAI: lock time-out"),
    Status(424, Verdict.PASSING, "TGI, Bedrock: the generation failed"),
    Status(425, Verdict.PASSING, "HTTP"),
    Status(429, Verdict.PASSING, "HTTP"),
    Status(498, Verdict.PASSING, "Groq: flex capacity is used up"),
    Status(499, Verdict.PASSING, "nginx before a model: the client went away"),
    Status(501, Verdict.REFUSED, "HTTP"),
    Status(505, Verdict.REFUSED, "HTTP"),
)
"""Besides these, 5xx is passing and all others are refusals."""

CODES = (
    Code("insufficientquota", Verdict.ACCOUNT, "OpenAI"),
    Code("billinghardlimitreached", Verdict.ACCOUNT, "OpenAI"),
    Code("billingnotactive", Verdict.ACCOUNT, "OpenAI"),
    Code("exceededcurrentquotaerror", Verdict.ACCOUNT, "Moonshot"),
    Code("arrearage", Verdict.ACCOUNT, "DashScope"),
    Code("insufficientbalance", Verdict.ACCOUNT, "SiliconFlow, gateways"),
    Code("insufficientcredits", Verdict.ACCOUNT, "OpenRouter, gateways"),
    Code("insufficientuserquota", Verdict.ACCOUNT, "New API gateways"),
    Code("1113", Verdict.ACCOUNT, "Zhipu"),
    Code("base_resp.1008", Verdict.ACCOUNT, "MiniMax"),
    Code("budgetexceeded", Verdict.ACCOUNT, "LiteLLM"),
    Code("billingerror", Verdict.ACCOUNT, "Anthropic"),
    Code("paymentrequired", Verdict.ACCOUNT, "gateways"),
    Code("quotaexceeded", Verdict.ACCOUNT, "gateways"),
    Code("notenoughbalance", Verdict.ACCOUNT, "Novita"),
    Code("insufficientfunds", Verdict.ACCOUNT, "Vercel"),
    Code("usagelimitreached", Verdict.ACCOUNT, "ChatGPT plans"),
    Code("accountoverdueerror", Verdict.ACCOUNT, "Volcengine Ark"),
    Code("setlimitexceeded", Verdict.ACCOUNT, "Volcengine Ark: the limit that its owner has set"),
    Code("1308", Verdict.ACCOUNT, "Zhipu: the limit of the plan for some hours"),
    Code("1310", Verdict.ACCOUNT, "Zhipu: the limit of the plan for the week or the month"),
    Code("creditsexhausted", Verdict.ACCOUNT, "gateways"),
    Code("invalidapikey", Verdict.CREDENTIAL, "OpenAI, DashScope, Groq"),
    Code("authenticationerror", Verdict.CREDENTIAL, "Anthropic, LiteLLM, DeepSeek"),
    Code("invalidauthenticationerror", Verdict.CREDENTIAL, "Moonshot"),
    Code("unauthenticated", Verdict.CREDENTIAL, "Gemini"),
    Code("unauthorized", Verdict.CREDENTIAL, "gateways"),
    Code("accountdeactivated", Verdict.CREDENTIAL, "OpenAI"),
    Code("base_resp.1004", Verdict.CREDENTIAL, "MiniMax"),
    Code("base_resp.2049", Verdict.CREDENTIAL, "MiniMax: invalid key"),
    Code("error_code.110", Verdict.CREDENTIAL, "Baidu Qianfan: invalid token"),
    Code("error_code.111", Verdict.CREDENTIAL, "Baidu Qianfan: expired token"),
    Code("toolusefailed", Verdict.AGAIN, "Groq"),
    Code("jsonvalidatefailed", Verdict.AGAIN, "Groq"),
    Code("outputparsefailed", Verdict.AGAIN, "Groq: gpt-oss"),
    Code("malformedfunctioncall", Verdict.AGAIN, "Gemini gateways"),
    Code("modeloutputinvalid", Verdict.AGAIN, "Cerebras, gateways"),
    Code("ratelimitexceeded", Verdict.PASSING, "OpenAI"),
    Code("ratelimiterror", Verdict.PASSING, "Anthropic, LiteLLM"),
    Code("ratelimitreachederror", Verdict.PASSING, "Moonshot"),
    Code("resourceexhausted", Verdict.PASSING, "Gemini"),
    Code("throttling", Verdict.PASSING, "DashScope"),
    Code("throttlingratequota", Verdict.PASSING, "DashScope"),
    Code("throttlingallocationquota", Verdict.PASSING, "DashScope"),
    Code("throttlingexception", Verdict.PASSING, "Bedrock"),
    Code("overloadederror", Verdict.PASSING, "Anthropic"),
    Code("engineoverloadederror", Verdict.PASSING, "Moonshot"),
    Code("servererror", Verdict.PASSING, "OpenAI"),
    Code("apierror", Verdict.PASSING, "Anthropic, Ollama"),
    Code("internalservererror", Verdict.PASSING, "vLLM, SGLang, LiteLLM"),
    Code("internalerror", Verdict.PASSING, "DashScope, gateways"),
    Code("unavailable", Verdict.PASSING, "Gemini"),
    Code("serviceunavailable", Verdict.PASSING, "gateways"),
    Code("timeouterror", Verdict.PASSING, "Anthropic"),
    Code("deadlineexceeded", Verdict.PASSING, "Gemini"),
    Code("modelnotreadyexception", Verdict.PASSING, "Bedrock"),
    Code("modelstreamerrorexception", Verdict.PASSING, "Bedrock"),
    Code("modelloading", Verdict.PASSING, "gateways before local models"),
    Code("1302", Verdict.PASSING, "Zhipu: too many requests at once"),
    Code("1305", Verdict.PASSING, "Zhipu: overloaded"),
    Code("1234", Verdict.PASSING, "Zhipu: network error"),
    Code("base_resp.1000", Verdict.PASSING, "MiniMax: unknown error"),
    Code("base_resp.1001", Verdict.PASSING, "MiniMax: time-out"),
    Code("base_resp.1002", Verdict.PASSING, "MiniMax: rate limit"),
    Code("base_resp.1013", Verdict.PASSING, "MiniMax: internal"),
    Code("base_resp.1024", Verdict.PASSING, "MiniMax: internal"),
    Code("base_resp.1033", Verdict.PASSING, "MiniMax: system error"),
    Code("error_code.4", Verdict.PASSING, "Baidu Qianfan: cluster limit"),
    Code("error_code.18", Verdict.PASSING, "Baidu Qianfan: QPS limit"),
    Code("error_code.336100", Verdict.PASSING, "Baidu Qianfan: try again later"),
    Code("error_code.336501", Verdict.PASSING, "Baidu Qianfan: RPM limit"),
    Code("invalidrequesterror", Verdict.REFUSED, "OpenAI and most others"),
    Code("invalidrequest", Verdict.REFUSED, "gateways"),
    Code("badrequesterror", Verdict.REFUSED, "vLLM, LiteLLM"),
    Code("badrequest", Verdict.REFUSED, "gateways"),
    Code("invalidargument", Verdict.REFUSED, "Gemini"),
    Code("failedprecondition", Verdict.REFUSED, "Gemini"),
    Code("invalidparameter", Verdict.REFUSED, "DashScope"),
    Code("invalidparametererror", Verdict.REFUSED, "DashScope"),
    Code("validationexception", Verdict.REFUSED, "Bedrock"),
    Code("notfounderror", Verdict.REFUSED, "Anthropic, vLLM"),
    Code("modelnotfound", Verdict.REFUSED, "OpenAI, Groq"),
    Code("notfound", Verdict.REFUSED, "Gemini"),
    Code("permissionerror", Verdict.REFUSED, "Anthropic"),
    Code("permissiondenied", Verdict.REFUSED, "Gemini"),
    Code("contentfilter", Verdict.REFUSED, "Azure"),
    Code("contentpolicyviolation", Verdict.REFUSED, "OpenAI, LiteLLM"),
    Code("datainspectionfailed", Verdict.REFUSED, "DashScope"),
    Code("1301", Verdict.REFUSED, "Zhipu: unsafe content"),
    Code("base_resp.1026", Verdict.REFUSED, "MiniMax: the input is sensitive"),
    Code("base_resp.1027", Verdict.REFUSED, "MiniMax: the output is sensitive"),
    Code("base_resp.2013", Verdict.REFUSED, "MiniMax: invalid parameters"),
)


def _says(pattern: str, means: Verdict, source: str) -> Words:
    return Words(re.compile(pattern, re.IGNORECASE), means, source)


_MONEY = r"(?<!context )(?<!thinking )(?<!reasoning )(?<!token )budget"

WORDS = (
    _says(
        r"\b(per|this|each) (second|minute|hour)\b|\b[rt]p[ms]\b"
        r"|\b(retry|try again|wait)\b( \w+)? \d+(\.\d+)? ?(ms|s|secs?|seconds?|m|min|minutes?)\b",
        Verdict.PASSING,
        "gateways: a quota that comes back",
    ),
    _says(
        r"\b(insufficient|not enough|no|low|out of|more|zero)\b[\w $]{0,30}\b(balance|credits?|funds|quota)\b",
        Verdict.ACCOUNT,
        "DeepSeek, Zhipu, Moonshot, OpenRouter, Vercel, xAI, Venice, Hugging Face",
    ),
    _says(
        r"\b(balance|credits?|funds|quota|free tier)\b[^.!?]{0,40}"
        r"\b(insufficient|not enough|too low|exhausted|depleted|used up|expired|negative)\b|balance (is|of) -?\$?0\b",
        Verdict.ACCOUNT,
        "Anthropic, SiliconFlow, Chutes, New API, Google AI Studio, DashScope",
    ),
    _says(
        rf"\b(spend(ing)?|billing|{_MONEY}|monthly|weekly|credit)( \w+)? (limit|cap|budget)\b"
        rf"|({_MONEY}|key limit)[^.!?]{{0,20}} exceeded|exceeded ?budget|over budget|crossed spend",
        Verdict.ACCOUNT,
        "OpenAI, xAI, Fireworks, Together, Zhipu, LiteLLM, OpenRouter",
    ),
    _says(r"used (all|up) (available|of your|your)|monthly included credits", Verdict.ACCOUNT, "xAI, Cloudflare"),
    _says(
        r"account is (in good standing|not active)|arrearage|overdue[- ]payment|payment required"
        r"|(valid|add a) (payment method|credit card)",
        Verdict.ACCOUNT,
        "DashScope, OpenAI, gateways",
    ),
    _says(r"余额不足|欠费|请充值|额度.{0,4}(不足|用完|用尽|失败)|剩余额度|限额", Verdict.ACCOUNT, "Chinese gateways"),
    _says(r"(invalid|incorrect|wrong|missing|expired|no) api[ _-]?key", Verdict.CREDENTIAL, "OpenAI and most others"),
    _says(
        r"api[ _-]?key (is |was )?(not valid|invalid|not found|expired|disabled|missing)", Verdict.CREDENTIAL, "Gemini"
    ),
    _says(
        r"(invalid|expired) (authentication|token|credentials?)|authentication (failed|fails)",
        Verdict.CREDENTIAL,
        "Moonshot, DeepSeek",
    ),
    _says(r"failed to call a function", Verdict.AGAIN, "Groq"),
    _says(r"failed to (parse|generate) (the )?(tool|function|json)", Verdict.AGAIN, "Fireworks, SGLang"),
    _says(r"error parsing tool call", Verdict.AGAIN, "Ollama"),
    _says(r"\bjinja\b|(chat|prompt) template", Verdict.REFUSED, "LM Studio, vLLM: the template of the model failed"),
    _says(r"overload|capacity|too busy|server busy|busy now", Verdict.PASSING, "Anthropic, Together, DeepSeek"),
    _says(r"rate.?limit|too.?many.?requests|quota exceeded|throttl", Verdict.PASSING, "gateways"),
    _says(r"temporar|try again|retry|later", Verdict.PASSING, "gateways"),
    _says(r"time.?d?.?out", Verdict.PASSING, "gateways"),
    _says(r"unavailable|(is|still|currently) loading|warming up", Verdict.PASSING, "Hugging Face, llama.cpp"),
    _says(
        r"invalid|not (supported|allowed|permitted|found|exist)|unsupported|does not (support|exist)|must be|required",
        Verdict.REFUSED,
        "gateways",
    ),
    _says(r"flagged|moderation|content (policy|filter)|safety system|sensitive", Verdict.REFUSED, "OpenRouter, OpenAI"),
)
"""Looked at in order, where neither a code nor a status says more."""

BUSY = re.compile(
    r"(?i)rate.?limit(ed|s? (is |was |has been )?(reached|exceeded))|too many requests"
    r"|overloaded|temporarily (unavailable|out)"
    r"|\b(server|service|model|engine|system)[^.!?]{0,30}\b(busy|(is|still|currently) (loading|being loaded))"
    r"|at capacity|繁忙|请稍后(再|重)试"
)
"""Words of gateways that report it with any status, such as 400 or 403."""

LIMIT_AND_REQUESTED = re.compile(
    r"(?is)\blimit:? *(?P<limit>[\d,]{1,24}).{0,80}?\brequested:? *(?P<requested>[\d,]{1,24})"
)
"""OpenAI and Groq name both in a refusal by tokens a minute: one request that is above the limit is never taken."""


def by_status(status: int) -> Verdict:
    """Returns what an HTTP status means by itself."""
    for row in STATUSES:
        if row.status == status:
            return row.means
    return Verdict.PASSING if status >= 500 else Verdict.REFUSED


def by_code(codes: tuple[str, ...]) -> Verdict | None:
    """Returns what the first code that is known means."""
    for code in codes:
        for row in CODES:
            if row.code == code:
                return row.means
    return None


def by_words(words: str) -> Verdict | None:
    """Returns what the words mean, where they mean something."""
    for row in WORDS:
        if row.pattern.search(words):
            return row.means
    return None


def is_busy(words: str) -> bool:
    """Returns whether the words can only mean that the same request may be taken later."""
    return BUSY.search(words) is not None


def is_never_met(words: str) -> bool:
    """Returns whether one request is above a limit that comes back, so that no waiting helps."""
    found = LIMIT_AND_REQUESTED.search(words)
    if found is None:
        return False
    limit, requested = (int(found[name].replace(",", "") or 0) for name in ("limit", "requested"))
    return requested > limit > 0
