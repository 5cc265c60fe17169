"""A model without a network or a key: its replies repeat its input, are the same each time, and can be of every kind
that a client must handle. Its reply to plain text has that text, its instruction and the number of messages. The last
user message may hold directives, on lines of their own or one after another; what else it says is then not answered:

    /say TEXT        say TEXT, up to the end of the line or the next directive
    /reason TEXT     reason TEXT before or between what is said
    /call TOOL JSON  call a tool; JSON may be broken, and left out is {}; may be repeated
    /chunks N        say the numbers 1 to N, a piece each, at most 100000
    /big BYTES       say so many bytes, in pieces of 1 KB, at most 4194304
    /refuse TEXT     refuse in these words
    /image           make an image: one pixel
    /cite URI        name a source of what is said
    /stop REASON     end with this finish reason, "length" for example
    /dialect NAME    reply as that provider does: deepseek, gemini, kimi, mistral, openrouter
    /pause MS        wait so long before each piece, at most 10000
    /fail HOW        fail: error (MODEL_ERROR), unavailable (MODEL_UNAVAILABLE), midway (the same after half)
    /help            tell these lines

They take effect in their order; /cite, /dialect, /stop, /pause and /fail apply to the whole reply, and alone to the
usual one.
Once its calls have outcomes it replies with those. If JSON by a schema is requested, it makes up the smallest valid
value, with the user's text as text; it ignores `pattern`, `format`, `not` and `if`. Tokens in its usage are words. Of
`generation` it uses only `max_output_tokens`.
"""

import asyncio
import base64
import itertools
import json
import re
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from notecase import v1

from notecase_server import errors
from notecase_server.models.answers.finish_reasons import is_cut, meaning
from notecase_server.models.contract import (
    Call,
    Cited,
    Delta,
    Finish,
    Media,
    ModelRequest,
    Reasoning,
    Refusal,
    Returned,
    Source,
    Text,
    looked_at,
)

HELP = "I am the offline model. A message may ask me to:\n\n" + "\n".join(
    line.strip() for line in (__doc__ or "").splitlines() if line.startswith("    /")
)

ECHO = 2000
"""Characters of a text that a reply repeats: enough for an instruction as people write them."""

DIRECTED = 16 << 10
"""Characters of a message in which directives are searched for; a limit on the work for hostile messages."""

ENOUGH = 10_000
"""Pieces of a reply after which no further directive is begun, for the same reason."""

NESTED = 16
"""Levels of what is made up by a schema; one that refers to itself never ends."""

MOST_ITEMS = 10

_DIRECTIVE = re.compile(
    r"(?:^|(?<=\s))/(say|reason|call|chunks|big|refuse|image|cite|stop|dialect|pause|fail|help)\b[ \t]*"
)
_PIECE = re.compile(r"\s*\S+|\s+$")
_LARGEST = {"chunks": 100_000, "big": 4 << 20, "pause": 10_000}
_FAILURES = ("error", "unavailable", "midway")


class _Dialect(NamedTuple):
    """Data that a provider sends with a reply, and gets back."""

    call_id: str = "call_{n}"
    of_call: str = ""
    of_message: str = ""
    """JSON objects of members."""
    text_member: str = ""


DIALECTS = {
    "deepseek": _Dialect("call_00_{n}", text_member="reasoning_content"),
    "gemini": _Dialect("function-call-{n}", '{"extra_content":{"google":{"thought_signature":"c2lnbmF0dXJl"}}}'),
    "kimi": _Dialect("functions.{tool}:{n}", text_member="reasoning_content"),
    "mistral": _Dialect("aB3dE5g{n:02}"),
    "openrouter": _Dialect(
        "toolu_{n}",
        of_message='{"reasoning_details":[{"type":"reasoning.encrypted","data":"c2VjcmV0","index":0}]}',
        text_member="reasoning",
    ),
}

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mM4oKAAAAKkAQHdsXSBAAAAAElFTkSuQmCC")

MEDIA = frozenset({"file", "data", "blob"})
"""Kinds of parts that hold what is not read here."""


class OfflineProvider:
    """The provider named "offline"; it has one model, of the same name, whatever the agent asks for."""

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        """See Provider. Between pieces other tasks get their turn."""
        plan = _plan(request)
        if plan.failure == "error":
            raise errors.model_error("The offline model was asked to fail.")
        if plan.failure == "unavailable":
            raise errors.model_unavailable("The offline model was asked to be unavailable.")
        heard = await looked_at(request.messages, request.size, lambda: _words(_heard(request)))
        usage = v1.Usage(input_tokens=heard, model_calls=1, model="offline")
        room = request.generation.max_output_tokens or None
        reason = plan.reason
        for index, piece in enumerate(plan.pieces):
            if plan.failure == "midway" and index >= (len(plan.pieces) + 1) // 2:
                break
            words = _words([_content(piece)])
            if room is not None and usage.output_tokens + words > room:
                reason = "length"
                break
            await asyncio.sleep(plan.pause)
            yield piece
            usage.output_tokens += words
            usage.reasoning_tokens += words if isinstance(piece, Reasoning) else 0
        if plan.failure == "midway":
            raise errors.model_unavailable("The offline model was asked to fail midway.")
        if reason != "length":  # a reply that is cut has all of it or nothing
            if plan.sources:
                yield Cited(plan.sources)
            for returned in plan.returned():
                yield returned
        yield Finish(reason, usage, is_cut(meaning(reason)))

    async def close(self) -> None:
        """There is nothing to close."""


@dataclass(slots=True)
class _Plan:
    """A reply before it is spoken."""

    pieces: list[Delta] = field(default_factory=list)
    reason: str = "stop"
    pause: float = 0
    """Seconds."""
    failure: str = ""
    calls: int = 0
    spoken: bool = False
    sources: list[Source] = field(default_factory=list)
    dialect: _Dialect | None = None

    def returned(self) -> Iterator[Returned]:
        """What goes back with the calls and the message, in the plan's dialect."""
        if self.dialect is None:
            return
        names = {piece.key: piece.tool for piece in self.pieces if isinstance(piece, Call) and piece.tool}
        for key, tool in names.items():
            call_id = self.dialect.call_id.format(n=key, tool=tool)
            members = self.dialect.of_call.encode()
            yield Returned(key, _own(call_id=call_id, members=members))
        reasons = self.dialect.text_member if any(isinstance(piece, Reasoning) for piece in self.pieces) else ""
        if self.dialect.of_message or reasons:
            yield Returned(None, _own(members=self.dialect.of_message.encode(), text_member=reasons))

    def say(self, text: str) -> None:
        """What is said after something said begins a new line, since both are one text to who listens."""
        self.pieces.extend(Text(piece) for piece in _PIECE.findall("\n" + text if self.spoken else text))
        self.spoken = True

    def call(self, tool: str, arguments: str) -> None:
        self.calls += 1
        self.pieces.append(Call(self.calls, tool, ""))
        self.pieces.extend(Call(self.calls, "", arguments[start : start + 8]) for start in range(0, len(arguments), 8))
        self.reason = "tool_calls"


def _own(**data: Any) -> v1.ProviderData:
    return v1.ProviderData(provider="offline", model="offline", **data)


def _plan(request: ModelRequest) -> _Plan:
    plan = _Plan()
    last = request.messages[-1] if request.messages else v1.Message()
    outcomes = [part.tool_call for part in last.parts if part.WhichOneof("kind") == "tool_call"]
    if last.role == v1.Message.ROLE_ASSISTANT and outcomes and not request.output_schema:
        plan.say("\n".join(["The tools are done.", *map(_outcome, outcomes)]))
        return plan
    said = _text(last)[:DIRECTED] if last.role != v1.Message.ROLE_ASSISTANT else ""
    for name, argument in _directives(said):
        _direct(plan, name, argument)
        if len(plan.pieces) > ENOUGH:
            break
    if not plan.pieces:
        plan.say(_made_up(request, last) if request.output_schema else _echo(request, last))
    return plan


def _made_up(request: ModelRequest, last: v1.Message) -> str:
    schema = json.loads(request.output_schema)
    return json.dumps(_instance(schema, schema, _text(last) or "nothing new", NESTED), ensure_ascii=False)


def _instance(schema: Any, whole: Any, heard: str, levels: int) -> Any:
    """Returns the smallest value that is valid by the plain keywords of a schema."""
    if not isinstance(schema, dict) or not levels:
        return None
    for name in ("const", "default"):
        if name in schema:
            return schema[name]
    for name in ("enum", "examples"):
        if schema.get(name):
            return schema[name][0]
    if isinstance(ref := schema.get("$ref"), str):
        found = whole
        for step in ref.removeprefix("#").split("/")[1:]:
            found = found.get(step) if isinstance(found, dict) else None
        return _instance(found, whole, heard, levels - 1)
    for name in ("anyOf", "oneOf", "allOf"):
        if schema.get(name):
            rest = {key: held for key, held in schema.items() if key != name}
            return _instance({**rest, **schema[name][0]}, whole, heard, levels - 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    match kind[0] if isinstance(kind, list) and kind else kind:
        case "object":
            properties = schema.get("properties", {})
            named = schema.get("required", [])
            return {name: _instance(properties.get(name, {}), whole, heard, levels - 1) for name in named}
        case "array":
            count = min(schema.get("minItems", 0), MOST_ITEMS)
            return [_instance(schema.get("items", {}), whole, heard, levels - 1) for _ in range(count)]
        case "string":
            return heard[: schema.get("maxLength", ECHO)].ljust(schema.get("minLength", 0), ".")
        case "integer" | "number":
            return schema.get("minimum", min(schema.get("maximum", 0), 0))
        case "boolean":
            return False
        case _:
            return None


def _directives(text: str) -> Iterator[tuple[str, str]]:
    """The directives of a text in their order, each with its argument."""
    found = _DIRECTIVE.search(text)
    while found:
        start = found.end()
        end = _end_of_call(text, start) if found[1] == "call" else None
        after = _DIRECTIVE.search(text, start if end is None else end)
        if end is None:
            ends = (text.find("\n", start), after.start() if after else -1, len(text))
            end = min(place for place in ends if place >= 0)
        yield found[1], text[start:end].strip()
        found = after


def _end_of_call(text: str, start: int) -> int | None:
    """Where the JSON of a call ends: within it nothing is a directive, and it may span lines. None when it is missing
    or broken, which may be what was asked for; it then ends as other arguments do."""
    tool = re.compile(r"\S+\s+(?=\{)").match(text, start)
    if not tool:
        return None
    try:
        return json.JSONDecoder().raw_decode(text, tool.end())[1]
    except (ValueError, RecursionError):
        return None


def _direct(plan: _Plan, name: str, argument: str) -> None:
    """Adds one directive to the plan. One that cannot be carried out is answered in words."""
    if name in _LARGEST:
        number = int(argument) if re.fullmatch(r"[0-9]{1,9}", argument) else -1
        if not 0 <= number <= _LARGEST[name]:
            plan.say(f"/{name} takes a whole number up to {_LARGEST[name]}, not {_cut(argument)}.")
        elif name == "pause":
            plan.pause = number / 1000
        elif name == "chunks":
            plan.spoken |= number > 0
            plan.pieces.extend(Text(f"{n} " if n < number else f"{n}") for n in range(1, number + 1))
        else:
            plan.spoken |= number > 0
            kilobyte = "0123456789abcde\n" * 64
            plan.pieces.extend(Text(kilobyte[: number - sent]) for sent in range(0, number, 1024))
    elif name == "dialect" and argument not in DIALECTS:
        plan.say(f"/dialect takes one of {', '.join(DIALECTS)}, not {_cut(argument)}.")
    elif name == "dialect":
        plan.dialect = DIALECTS[argument]
    elif name == "fail" and argument not in _FAILURES:
        plan.say(f"/fail takes one of {', '.join(_FAILURES)}, not {_cut(argument)}.")
    elif name == "fail":
        plan.failure = argument
    elif name == "call" and not argument:
        plan.say("/call takes a tool's name, and its arguments.")
    elif name == "call":
        tool, *rest = argument.split(maxsplit=1)
        plan.call(tool, rest[0] if rest else "{}")
    elif name == "stop":
        plan.reason = argument or "stop"
    elif name == "reason":
        plan.pieces.extend(Reasoning(piece) for piece in _PIECE.findall(argument))
    elif name == "image":
        number = 1 + sum(isinstance(piece, Media) for piece in plan.pieces)
        plan.pieces.append(Media(PIXEL, "image/png", f"image-{number}.png"))
    elif name == "cite" and not re.fullmatch(r"https?://\S+", argument):
        plan.say(f"/cite takes an http or https URI, not {_cut(argument)}.")
    elif name == "cite":
        plan.sources.append(Source(argument, argument.split("/")[2]))
    elif name == "refuse":
        plan.pieces.extend(Refusal(piece) for piece in _PIECE.findall(argument or "I would rather not."))
    else:
        plan.say(HELP if name == "help" else argument)


def _echo(request: ModelRequest, last: v1.Message) -> str:
    """The usual reply. It introduces itself once, and repeats the instruction, where a note in state shows."""
    said = _cut(_text(last)) if last.role != v1.Message.ROLE_ASSISTANT else "nothing new"
    lines = [f"You said: {said}"]
    lines.extend(f"You showed me: {_medium(part)}" for part in _unanswered_media(request.messages))
    lines.append(f"My instruction is: {_cut(request.instruction)}")
    count = len(request.messages)
    lines.append(f"This request had {count} message{'' if count == 1 else 's'}.")
    if all(message.role != v1.Message.ROLE_ASSISTANT for message in request.messages):
        lines.insert(0, "I am the offline model. I repeat my input and follow directives: /help lists all of them.\n")
    return "\n".join(lines)


def _outcome(call: v1.ToolCall) -> str:
    if call.error or call.outcome in {v1.ToolCall.OUTCOME_FAILED, v1.ToolCall.OUTCOME_CANCELLED}:
        told = v1.ToolCall.Outcome.Name(call.outcome).removeprefix("OUTCOME_").lower()
        return f"{call.tool} {told}: {_cut(call.error)}"
    shown = [_cut(part.text or part.json) if _is_said(part) else _medium(part) for part in call.result]
    return f"{call.tool} gave: {', '.join(shown) or 'nothing'}"


def _medium(part: v1.Part) -> str:
    if part.WhichOneof("kind") == "file":
        name = f" ({part.file.filename})" if part.file.filename else ""
        return f"{part.file.media_type or 'a file'} at {_cut(part.file.uri)}{name}, which I did not fetch"
    if part.WhichOneof("kind") == "blob":
        name = f" ({part.blob.filename})" if part.blob.filename else ""
        return f"{part.blob.media_type} of {part.blob.size_bytes} B{name}, which I cannot see"
    name = f" ({part.data.filename})" if part.data.filename else ""
    return f"{part.data.media_type or 'data'} of {len(part.data.data)} B{name}, which I cannot see"


def _unanswered_media(messages: Sequence[v1.Message]) -> list[v1.Part]:
    """Of what was said since the model last spoke."""
    said = list(itertools.takewhile(lambda message: message.role != v1.Message.ROLE_ASSISTANT, reversed(messages)))
    return [part for message in reversed(said) for part in message.parts if part.WhichOneof("kind") in MEDIA]


def _text(message: v1.Message) -> str:
    return "\n".join(part.text or part.json for part in message.parts if _is_said(part))


def _is_said(part: v1.Part) -> bool:
    return part.WhichOneof("kind") in {"text", "json"}


def _cut(text: str) -> str:
    text = text.strip()
    if not text:
        return "nothing"
    return text if len(text) <= ECHO else f"{text[:ECHO]} … ({len(text)} characters)"


def _content(piece: Delta) -> str:
    match piece:
        case Call():
            return piece.tool + piece.arguments
        case Text() | Reasoning() | Refusal():
            return piece.text
    return ""


def _heard(request: ModelRequest) -> Iterator[str]:
    yield request.instruction
    for message in request.messages:
        yield _text(message)


def _words(texts: Iterable[str]) -> int:
    return sum(len(text.split()) for text in texts)
