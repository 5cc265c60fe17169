"""Finds a provider's error in any shape and place, and turns it into the failure of the run. `error_table` and
`too_long` have the meanings of words and codes; this module only finds them.
"""

import datetime
import email.utils
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.models.answers import error_table, too_long
from notecase_server.models.answers.error_table import Verdict
from notecase_server.models.answers.event_stream import documents_of
from notecase_server.models.answers.redaction import Redactor

_MAX_RETRY_AFTER = 24 * 3600.0
"""Seconds. A provider that names more is not down but gone, and any number must fit into RetryInfo."""

_TOO_LARGE = 413
"""The status with which proxies refuse a body that is too large, often in a web page that says nothing."""

_OF_REQUESTS = frozenset({None, 400, 415, 422, 501})
"""The statuses with which servers refuse a member of a request; none, within a reply."""

_NO_ADDRESS = re.compile(
    r"(?i)(404 )?((page|resource|path|url|route|endpoint) )?(is |was )?not found\W*"
    r"|(unknown|invalid)( request)? url\b.*|no route\b.*|cannot post\b.*|method not allowed\W*|the requested url\b.*|"
)
"""What a server says, if anything, that does not have the address that was asked."""

_NO_MODEL = re.compile(
    r"(?i)\bmodels?\b.{0,80}?\b(not found|not exist|unknown|invalid)|\b(unknown|invalid|no such) models?\b"
)

_MOST = 200
"""Values of an error that are looked at, and how deep: what is larger is no error but an attack."""

_DEEPEST = 8

_MAX_WORDS = 8 << 10
"""Characters of an error's words that are judged and told."""

_MAX_CODE = 256

_BOM = b"\xef\xbb\xbf"

_HOLDERS = (
    "error",
    "Error",
    "err",
    "errors",
    "base_resp",
    "message",
    "detail",
    "details",
    "metadata",
    "raw",
    "fault",
    "exception",
    "cause",
    "response",
    "innererror",
    "body",
    "data",
)
"""The members that may hold a further error, or its words, outermost first."""

_ERRORS = ("error", "errors", "Error", "err", "exception", "fault")
"""The members that hold an error, or say that there is none."""

_SPEAKERS = (
    "message",
    "msg",
    "Message",
    "error_msg",
    "errorMsg",
    "errorMessage",
    "error_message",
    "status_msg",
    "detail",
    "error",
    "err",
    "Error",
    "exception",
    "raw",
    "error_description",
    "description",
    "reason",
    "title",
    "faultstring",
    "cause",
)
"""The members that hold words."""

_CODES = (
    "code",
    "Code",
    "type",
    "status",
    "error_code",
    "errorCode",
    "error_type",
    "status_code",
    "statusCode",
    "err_code",
    "__type",
)
_SCOPED = frozenset({"error_code", "errorCode", "err_code"})
_SUCCESS = frozenset({"0", "200", "ok", "success", "succeeded"})

_CUT = {
    "message": re.compile(r'"(?:message|msg|detail|error)"\s*:\s*"((?:[^"\\]|\\.)+)'),
    "code": re.compile(r'"(?:code|type)"\s*:\s*"([\w.-]+)"'),
}
"""What is looked for in JSON that was cut because it is too large."""

_PAGE = re.compile(r"(?i)<(!doctype|html|head|body|\?xml|!--|title|center|h1|p)\b")
_OTHER = re.compile(r"[^a-z0-9]+")
_MOMENT = re.compile(
    r"(?i)\b(?:(?:try again|retry|wait|resets?|available)\b[^.]{0,24}?\b(?:in|after|for)\b[^\d]{0,12}"
    r"|(?:wait|retry)\s+)"
    r"((?:\d+(?:\.\d+)?\s*(?:ms|[a-z]+)\s*(?:and\s+)?)+)"
)
_WAITS = {
    **dict.fromkeys(("retry_after", "retryAfter", "retryDelay", "retry_after_seconds", "resets_in_seconds"), 1.0),
    "retry_after_ms": 0.001,
    "estimated_time": 1.0,  # Hugging Face: until a model is loaded
}
"""The members that say how long to wait, and what part of a second one of theirs is."""

_SPANS = re.compile(r"-?[\d.]+(e\d+)?\s*([a-z]+\s*([\d.]+\s*[a-z]+\s*)*)?")
_EPOCH = 1e9
"""Seconds: what is above it counts from 1970, be it in seconds or in milliseconds."""
_MAX_SPAN = 100
"""Characters of a span that are read: the time that it takes grows with their square."""

_SPAN = re.compile(
    r"(\d+(?:\.\d+)?)\s*(ms|milliseconds?|h|hours?|m|min|minutes?|s|secs?|seconds?)(?![a-z])", re.IGNORECASE
)


class Told(NamedTuple):
    """What an error says."""

    status: int | None
    code: str
    """The outermost code or type, as it was written."""
    codes: tuple[str, ...]
    """All of them, in lower case without what stands between their parts."""
    words: str
    retry_after: float | None


def find(value: object, *, named: bool = False) -> object | None:
    """Returns the error that a document of a stream holds, or None when it holds none. `named` says that the event was
    called an error, so that whatever it holds is one."""
    if isinstance(value, list):
        return next((error for item in value if (error := find(item, named=named)) is not None), None)
    if not isinstance(value, dict):
        return value if named else None
    if any(_is_set(value.get(name)) for name in _ERRORS):
        return value
    for held in (value.get("Response"), value.get("ResponseMetadata"), value.get("header")):
        if isinstance(held, dict) and not value.get("choices") and find(held) is not None:
            return held
    base = value.get("base_resp")
    if isinstance(base, dict) and str(base.get("status_code", 0)) not in _SUCCESS:
        return value
    groq = value.get("x_groq")
    if isinstance(groq, dict) and _is_set(groq.get("error")):
        return groq
    choices = value.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        for held in (choice, choice.get("delta"), choice.get("message")) if isinstance(choice, dict) else ():
            if isinstance(held, dict) and _is_set(held.get("error")):
                return held
    if choices:
        return value if named or _is_coded(value) else None
    return value if named or _is_flat(value) else None


def _is_set(error: object) -> bool:
    """Whether a member for errors holds one. Some servers always send it, empty or with a code for success."""
    if isinstance(error, dict | list):
        return any(map(_is_set, error.values() if isinstance(error, dict) else error))
    return bool(error) and str(error).lower() not in _SUCCESS


def _is_coded(value: Mapping[str, Any]) -> bool:
    """Whether the members that Baidu's servers and some gateways have for errors hold one."""
    code = next((value[name] for name in ("error_code", "errorCode") if value.get(name) not in (None, "")), None)
    if code is not None:
        return str(code).lower() not in _SUCCESS
    return any(_is_set(value.get(name)) for name in ("error_msg", "errorMessage", "error_message"))


def _is_flat(value: Mapping[str, Any]) -> bool:
    """Whether an object without choices is itself an error: it calls itself one, or has both a code and words."""
    if any("error" in str(value.get(name, "")).lower() for name in ("object", "type", "__type")):
        return True
    if _is_coded(value):
        return True
    if value.get("success") is False:
        return True
    words = any(isinstance(value.get(name), str | dict | list) and value[name] for name in ("message", "msg", "detail"))
    told = (value.get(name) for name in ("code", "status", "status_code", "statusCode"))
    code = next((str(held).lower() for held in told if held not in (None, "")), "")
    return words and (code not in _SUCCESS if code else "detail" in value or "id" not in value)


def told_by(value: object) -> Told:
    """Reads an error: bounded, whatever it is."""
    codes: list[tuple[str, str]] = []
    words: list[str] = []
    after: list[float] = []
    budget = [_MOST]
    _walk(value, "", codes, words, after, budget, 0)
    status = next((number for _, code in codes if (number := _http_status(code)) is not None), None)
    named = [(scope, code) for scope, code in codes if _http_status(code) is None and code.lower() not in _SUCCESS]
    code = next((code for _, code in named if not code.isdecimal()), "")
    said = ": ".join(dict.fromkeys(text for text in words if text))[:_MAX_WORDS]
    return Told(
        status,
        code,
        tuple(dict.fromkeys(f"{scope}{_OTHER.sub('', code.lower())}" for scope, code in named)),
        said,
        after[0] if after else _moment_in(said),
    )


def told_by_body(body: bytes) -> Told:
    """Reads the body of a refusal: JSON, JSON framed as events, plain words; a web page says nothing."""
    value: object = None
    body = body.removeprefix(_BOM)
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        text = body.decode("utf-8", "replace").strip()
        if text.startswith(("data:", "event:", ":", "{", "[")):
            value = [found for data, _ in documents_of(body) if (found := _json(data)) is not None] or {
                member: found[1] for member, pattern in _CUT.items() if (found := pattern.search(text))
            }
        else:
            value = text
    return told_by(value)


def _json(text: str | bytes) -> object | None:
    try:
        value: object = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return None
    return value


def _walk(
    value: object,
    scope: str,
    codes: list[tuple[str, str]],
    words: list[str],
    after: list[float],
    budget: list[int],
    depth: int,
) -> None:
    budget[0] -= 1
    if budget[0] < 0 or depth > _DEEPEST:
        return
    if isinstance(value, str):
        text = value.strip()
        inner = _json(text) if text.startswith(("{", "[", '"')) else None
        if inner is not None and inner != value:
            _walk(inner, scope, codes, words, after, budget, depth + 1)
        elif not _PAGE.match(text):
            words.append(text[:_MAX_WORDS])
    elif isinstance(value, list):
        for item in value[:20]:
            _walk(item, scope, codes, words, after, budget, depth + 1)
    elif isinstance(value, dict):
        for name in _CODES:
            held = value.get(name)
            if (isinstance(held, str) and held) or (isinstance(held, int) and not isinstance(held, bool)):
                codes.append(
                    (f"{name}." if name in _SCOPED and str(held).isdecimal() else scope, str(held)[:_MAX_CODE])
                )
        spans = ((_seconds(value.get(name)), part) for name, part in _WAITS.items())
        after.extend(seconds * part for seconds, part in spans if seconds is not None)
        where = value.get("loc")
        if isinstance(where, list) and isinstance(value.get("msg"), str):
            words.append(f"{'.'.join(str(part) for part in where[:8])}: {value['msg']}")
            return
        for name in dict.fromkeys((*_SPEAKERS, *_HOLDERS)):
            held = value.get(name)
            if isinstance(held, str) and name in _SPEAKERS:
                _walk(held, scope, codes, words, after, budget, depth + 1)
            elif name == "errors" and isinstance(held, dict) and not held.keys() & set(_SPEAKERS):
                for field, problem in list(held.items())[:20]:  # by field, as Rails and ASP.NET tell
                    text = problem[0] if isinstance(problem, list) and problem else problem
                    words.extend([f"{field}: {text}"] if isinstance(text, str) else ())
            elif isinstance(held, dict | list) and held:
                _walk(held, "base_resp." if name == "base_resp" else scope, codes, words, after, budget, depth + 1)


def _http_status(code: str) -> int | None:
    return int(code) if len(code) == 3 and code.isdecimal() and 400 <= int(code) < 600 else None


def _seconds(value: object, most: float = _MAX_RETRY_AFTER) -> float | None:
    """A span as a number of seconds or as text such as "34s" or "1m2.5s"."""
    if isinstance(value, str):
        value = value[:_MAX_SPAN]
        spans = _SPAN.findall(value)
        if not spans:
            try:
                value = float(value)
            except ValueError:
                return None
        else:
            units = {"ms": 0.001, "mi": 60.0, "m": 60.0, "h": 3600.0, "s": 1.0}
            value = sum(
                float(number) * (0.001 if unit.lower().startswith(("ms", "milli")) else units[unit[0].lower()])
                for number, unit in spans
            )
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return min(max(float(value), 0.0), most)


def _moment_in(words: str) -> float | None:
    """The span that words such as "Please try again in 1m2.5s" name."""
    found = _MOMENT.search(words)
    return _seconds(found[1]) if found and _SPAN.search(found[1][:_MAX_SPAN]) else None


def retry_after(headers: Mapping[str, str], clock: Callable[[], int]) -> float | None:
    """Returns the seconds that a provider asks to wait. A date counts from the answer's own Date, since clocks differ,
    or from ours, in microseconds, where there is none."""
    told = headers.get("retry-after", "").strip()
    seconds = _seconds(headers.get("retry-after-ms", ""), most=math.inf)
    if seconds is not None:
        return min(seconds / 1000.0, _MAX_RETRY_AFTER)
    if not _SPANS.fullmatch(told.partition(",")[0]):
        moment = _moment(told)
    else:
        seconds = _seconds(told.partition(",")[0], most=math.inf)
        if seconds is None or not _EPOCH < seconds < _EPOCH * 1e4:
            return None if seconds is None else min(seconds, _MAX_RETRY_AFTER)
        moment = seconds if seconds < _EPOCH * 100 else seconds / 1000.0
    if moment is None:
        return None
    now = _moment(headers.get("date", ""))
    return min(max(moment - (clock() / 1e6 if now is None else now), 0.0), _MAX_RETRY_AFTER)


def _moment(text: str) -> float | None:
    """A date, as HTTP or as ISO 8601 has it, in seconds since 1970."""
    try:
        if (parsed := email.utils.parsedate_tz(text)) is not None:
            return float(email.utils.mktime_tz(parsed))
        moment = datetime.datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def judge(status: int | None, told: Told) -> Verdict:
    """Returns what an error means: by its code, then by its status, then by its words. An error that came within a
    reply and says nothing is passing: the request was taken before."""
    by_code, by_words = error_table.by_code(told.codes), error_table.by_words(told.words)
    firm = {Verdict.ACCOUNT, Verdict.AGAIN, Verdict.CREDENTIAL}
    if by_code in firm:
        return by_code
    if status is not None and status >= 500 and error_table.by_status(status) is Verdict.PASSING:
        return Verdict.ACCOUNT if by_words is Verdict.ACCOUNT else Verdict.PASSING
    if by_words in firm:
        return by_words
    if status is not None:
        by_status = error_table.by_status(status)
        busy = by_code is Verdict.PASSING or (by_status is Verdict.REFUSED and error_table.is_busy(told.words))
        return Verdict.PASSING if busy else by_status
    if by_code is None and told.status is not None:
        return error_table.by_status(told.status)
    return by_code or by_words or Verdict.PASSING


def failure(
    status: int | None, told: Told, model: str, redactor: Redactor, retry_after: float | None = None
) -> NotecaseError:
    """Makes the failure of an error. `status` is the answer's, None for an error within a reply. All is judged before
    anything of it is replaced."""
    verdict = judge(status, told)
    status = status or told.status
    said = redactor.told(told.words)
    words = f": {said}" if said else "."
    answer = f"status {status}" if status else "an error"
    if status in {404, 405} and _NO_ADDRESS.fullmatch(told.words):
        answer += "; its base URL may be wrong"
    facts: dict[str, object] = {"status": status} if status else {}
    if code := redactor.name(told.code):
        facts["code"] = code
    if error_table.is_never_met(told.words):
        facts["code"] = "context_length_exceeded"
        return errors.model_error(f"The request is larger than the provider allows{words}", **facts)
    too_large = status == _TOO_LARGE or too_long.is_too_long(told.codes, told.words)
    if status != 429 and verdict not in (Verdict.ACCOUNT, Verdict.CREDENTIAL) and too_large:
        facts["code"] = "context_length_exceeded"
        return errors.model_error(f"The conversation is too long for the model {model!r}{words}", **facts)
    match verdict:
        case Verdict.CREDENTIAL:
            where = f"; check {redactor.source}" if redactor.source else ""
            return errors.model_error(f"The model provider refused the server's credential ({answer}){where}.", **facts)
        case Verdict.ACCOUNT:
            return errors.model_error(f"The server's account with the model provider is used up{words}", **facts)
        case Verdict.PASSING:
            wait = told.retry_after if retry_after is None else retry_after
            failed = errors.model_unavailable(
                f"The model provider cannot answer just now ({answer}){words}", wait, **facts
            )
            failed.of_request = _may_be_refused(status, told.words)
            return failed
    refused = errors.model_error(f"The model provider refused the call of {model!r} ({answer}){words}", **facts)
    refused.repeats = 1 if verdict is Verdict.AGAIN else None
    refused.of_request = verdict is Verdict.REFUSED and status in _OF_REQUESTS
    return refused


def lacks_model(status: int, told: Told) -> bool:
    """Whether a refusal says that there is no such model."""
    return "modelnotfound" in told.codes or (status in {400, 404} and _NO_MODEL.search(told.words) is not None)


def _may_be_refused(status: int | None, words: str) -> bool:
    """Whether a server error may be about the request: it says so, or it is a 500 that does not say that it passes.
    Gateways and templates that cannot handle a member of a message fail that way."""
    verdict = error_table.by_words(words)
    return status is not None and status >= 500 and (verdict is Verdict.REFUSED or (status == 500 and verdict is None))


def documents_in(value: object) -> Iterator[object]:
    """Yields the documents of one that is a list of them."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        yield from value
    else:
        yield value
