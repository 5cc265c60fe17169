"""Renders instructions: Liquid templates over state from untrusted users. No template can reach, stall or flood the
server.

`{{ draft }}` reads the session's state, `{{ user.name }}` the user's, `{{ app.policy }}` the tenant's; a key that is
not a Liquid name is written `{{ ["last seen"] }}` or `{{ user["last seen"] }}` (a key that holds both kinds of quotes,
or `}}`, cannot be written). Nothing is HTML-escaped. A missing value, null and bytes are empty; a list or a map by
itself is written as JSON. State is only text, never a template.

The language is python-liquid's, without the tags and filters that load files, format dates or make tables. Everything
in a render uses one work budget, in units of about a copied character, so that the budget limits the time of the worst
template. Two parts of the library are replaced because they can be stalled: its lexer (its regular
expressions backtrack over unclosed tags for minutes) and its resource limits (they see neither loops one after another,
nor what filters make).
"""

import asyncio
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from io import StringIO
from typing import Any, Final, TextIO
from weakref import WeakValueDictionary

from liquid import Environment, Node, RenderContext, Tag, TokenStream
from liquid.builtin.expressions.primitive import RangeLiteral
from liquid.builtin.output import Output, OutputNode
from liquid.exceptions import (
    BlockNestingError,
    ContextDepthError,
    FilterArgumentError,
    LiquidError,
    LiquidInterrupt,
    LiquidSyntaxError,
    OutputStreamLimitError,
    ResourceLimitError,
)
from liquid.expression import Expression
from liquid.filter import flatten
from liquid.limits import to_int
from liquid.output import LimitedStringIO
from liquid.static_analysis import TemplateAnalysis
from liquid.template import BoundTemplate
from liquid.token import TOKEN_CONTENT, TOKEN_EOF, TOKEN_EXPRESSION, TOKEN_ILLEGAL, TOKEN_OUTPUT, TOKEN_TAG, Token
from liquid.undefined import UNDEFINED
from liquid.utils import ReadOnlyChainMap
from notecase import v1

from notecase_server import errors
from notecase_server.engine.instructions import LONG, is_long
from notecase_server.engine.values import plain
from notecase_server.errors import NotecaseError

MAX_MARKUP: Final = 2000
"""Words and signs within the tags and outputs of a template, with MARKUP_PRICE for each of these: about 10 µs each to
parse, during which no other call is served. 400 times `{{ user.name }}` fit."""
MARKUP_PRICE: Final = 2
"""What a tag or output itself costs to parse, in words of it."""
MAX_EXPRESSION: Final = 4096
"""Characters between `{{` and `}}`, or `{%` and `%}`: with MAX_BRACKETS it bounds the backtracking of the library's
expression lexer, which looks ahead to the end of the expression from each bracket."""
MAX_BRACKETS: Final = 64
"""Brackets in one such expression, those in quotes too."""
MAX_NESTING: Final = 16
"""Blocks within blocks. Every loop around a name makes looking it up slower, hence no more than a person writes."""
MAX_KEYS: Final = 200
"""State keys that one template names: each is read before the work is counted, and may hold up to 1 MiB."""
MAX_OUTPUT: Final = 256 << 10
"""Bytes rendered; no instruction a model follows is nearly as long."""
MAX_ITERATIONS: Final = 50_000
"""Of all loops of a render together; a loop counts its whole length when it starts."""
MAX_WORK: Final = 4 << 20
"""Units of work of a render. At 0.02 to 0.05 µs each it is at most about a fifth of a second, and some 50 MB."""
LOOP_WORK: Final = MAX_WORK >> 5
"""Units of work that may block the loop, about 5 ms: hundreds of times the need of most templates."""
SHORT: Final = 1 << 10
"""Bytes of a template that is parsed on the loop."""

_TAGS = frozenset(
    {
        *("if", "unless", "case", "for", "break", "continue", "assign", "capture"),
        *("increment", "decrement", "cycle", "ifchanged"),
        *(TOKEN_CONTENT, TOKEN_OUTPUT, TOKEN_ILLEGAL),
    }
)
"""With `raw`, `comment` and `#`, which the lexer takes out, all the tags there are."""

_TEXT_FILTERS = frozenset(
    {
        *("append", "prepend", "replace", "replace_first", "replace_last", "remove", "remove_first", "remove_last"),
        *("capitalize", "downcase", "upcase", "strip", "lstrip", "rstrip", "squish", "strip_newlines", "escape"),
        *("split", "url_encode"),
    }
)
"""Their value and arguments are text, written as an output would write them."""

_FILTERS = _TEXT_FILTERS | {
    *("abs", "at_least", "at_most", "ceil", "divided_by", "floor", "minus", "modulo", "plus", "round", "times", "sum"),
    *("compact", "concat", "default", "find", "find_index", "first", "has", "join", "last", "map", "reject", "reverse"),
    *("size", "slice", "sort", "sort_natural", "truncate", "truncatewords", "uniq", "where"),
}

_ELEMENT = 8
"""Units of an element of a list or map without its content: about the cost of visiting and holding it."""


class Template:
    """A parsed template, immutable and free to share."""

    keys: Mapping[str, frozenset[str] | None]
    """By "session", "user" and "app": the state keys that a render may read, perhaps with some it will not. None if the
    source does not determine them: `user[key]`, or `user` as a whole."""

    def __init__(self, bound: BoundTemplate, source: str, keys: Mapping[str, frozenset[str] | None]) -> None:
        self._bound = bound
        self._source = source
        self.keys = keys

    async def rendered(self, state: Mapping[str, Mapping[str, v1.Value]]) -> str:
        """Like `render`; long work is started again in a thread."""
        try:
            return self.render(state, LOOP_WORK)
        except _LongError:
            return await asyncio.get_running_loop().run_in_executor(_THREAD, self.render, state)

    def render(self, state: Mapping[str, Mapping[str, v1.Value]], most_work: int = MAX_WORK) -> str:
        """The text, at most MAX_OUTPUT bytes of UTF-8. `state` has the values under "session", "user" and "app", at
        least those of `keys`; what is not there is empty. Raises NotecaseError TEMPLATE_ERROR when a limit is exceeded
        or a filter or comparison cannot take its values; the message says where, and quotes nothing of the state."""
        context = _Context(self._bound, state, most_work)
        buffer = context.get_buffer()
        try:
            for node in self._bound.nodes:
                node.render(context, buffer)
        # The causes are left out: their words, unlike these, quote the template and the values.
        except LiquidInterrupt:
            raise errors.template_error("The template has a 'break' or 'continue' outside of a loop.") from None
        except LiquidError as error:
            if most_work < context.work and most_work < MAX_WORK:
                raise _LongError from None
            raise errors.template_error(_sentence(error, self._source, "cannot be rendered")) from None
        except RecursionError:
            raise errors.template_error("The template is nested too deeply to be rendered.") from None
        except _UNCAUGHT:
            raise errors.template_error("The template cannot be rendered: its values cannot be combined.") from None
        return buffer.getvalue()


class _LongError(Exception):
    """A render took more than its share of work."""


_THREAD = ThreadPoolExecutor(1, "templates")
"""Long work on templates, one after the other: each thread more would keep the loop from the interpreter for longer."""

_PARSED: WeakValueDictionary[str, Template] = WeakValueDictionary()
"""Those that are cached, by their sources."""


async def parsed(source: str, field: str = "agent.llm.instruction") -> Template:
    """Like `parse`; a long one is parsed in a thread. `field` is the field in errors."""
    try:
        if len(source) <= SHORT or source in _PARSED:
            return parse(source)
        return await asyncio.get_running_loop().run_in_executor(_THREAD, parse, source)
    except NotecaseError as error:
        raise errors.template_error(error.message, field) from None


@lru_cache(maxsize=128)  # A template holds 3 MB at the worst, usually 20 KB.
def parse(source: str) -> Template:
    """The template, the same object for the same source as long as it is cached. Raises NotecaseError TEMPLATE_ERROR,
    saying where, when `source` is not a valid template or exceeds a limit."""
    if is_long(source):
        raise errors.template_error(LONG)
    try:
        bound = _LIQUID.from_string(source)
        for expression in _expressions(bound):
            if isinstance(expression, RangeLiteral):
                expression.stop = _RangeEnd(expression)
        analysis = bound.analyze(include_partials=False)
        for name in analysis.filters.keys() - _LIQUID.filters.keys():
            token = Token(TOKEN_EXPRESSION, name, analysis.filters[name][0].index, source)
            raise LiquidSyntaxError(f"there is no filter '{name}'", token=token)
        keys = _keys(analysis)
        if sum(len(names or ()) for names in keys.values()) > MAX_KEYS:
            raise errors.template_error(f"The template reads more than {MAX_KEYS} state keys.") from None
        made = _PARSED[source] = Template(bound, source, keys)
        return made
    except RecursionError:
        raise errors.template_error("The template is nested too deeply.") from None
    except LiquidError as error:
        if isinstance(error.__cause__, RecursionError):
            raise errors.template_error("The template is nested too deeply.") from None
        # The library wraps what it does not expect of its lexer.
        told = error.__cause__ if isinstance(error.__cause__, _ExceededError) else error
        raise errors.template_error(_sentence(told, source, "does not parse")) from None


class _ExceededError(ResourceLimitError):
    """One of this module's own limits."""

    def __init__(self, message: str, token: Token | None = None) -> None:
        super().__init__(message, token=token)


_LIMITS: Mapping[type[LiquidError], str] = {
    BlockNestingError: f"blocks are nested more than {MAX_NESTING} deep",
    ContextDepthError: f"blocks are nested more than {MAX_NESTING} deep",
    OutputStreamLimitError: f"the output is longer than {MAX_OUTPUT} bytes",
}


_UNCAUGHT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What the library lets through when a template combines values that do not go together, an infinite loop limit for
example; still the template's doing."""


def _sentence(error: LiquidError, source: str, problem: str) -> str:
    """What went wrong and where, quoting no more of the source than a name."""
    where = ""
    if error.token and error.token.start_index >= 0:
        index = error.token.start_index
        line, column = source.count("\n", 0, index) + 1, index - source.rfind("\n", 0, index)
        where = f" (line {line}, column {column})"
    told = _LIMITS.get(type(error)) or str(error.message).replace("\n", " ")
    return f"The template {problem}{where}: {told if len(told) <= 200 else told[:200] + ' …'}."


# The language: python-liquid's parser and tree, with our lexer.


class _Liquid(Environment):
    """The tags and filters that are safe, each metered."""

    block_nesting_limit = MAX_NESTING
    output_stream_limit = MAX_OUTPUT

    def setup_tags_and_filters(self, *, extra: bool = False) -> None:
        super().setup_tags_and_filters(extra=extra)
        self.add_tag(_Output)
        self.add_filter("join", _join)
        self.tags = {name: _MeteredTag(self, tag) for name, tag in self.tags.items() if name in _TAGS}
        self.filters = {name: function for name, function in self.filters.items() if name in _FILTERS}

    def tokenizer(self) -> Callable[[str], Iterator[Token]]:
        return _lex


_OPEN = re.compile(r"\{[{%]")
_WORD = re.compile(r"""\w+|"[^"]*"|'[^']*'|[^\s\w]""")
_NAME = re.compile(r"\w+|#")
_END_RAW = re.compile(r"\{%-?\s*endraw\s*(-?)%\}")
_COMMENT = re.compile(r"\{%-?\s*(end)?comment\b")


def _lex(source: str) -> Iterator[Token]:
    """The tokens that the library's own lexer would make, in time linear in the source; comments are left out."""
    position, trim, markup = 0, False, 0
    while position < len(source):
        opened = _OPEN.search(source, position)
        start = opened.start() if opened else len(source)
        text = source[position:start]
        text = text.lstrip() if trim else text
        text = text.rstrip() if source.startswith("-", start + 2) else text
        if text:
            yield Token(TOKEN_CONTENT, text, position, source)
        if not opened:
            return
        output = opened.group() == "{{"
        begin, end, position, trim = _markup(source, start, "}}" if output else "%}")
        markup += MARKUP_PRICE + sum(1 for _ in _WORD.finditer(source, begin, end))
        if markup > MAX_MARKUP:
            told = f"more than {MAX_MARKUP} words and signs in tags and outputs"
            raise _ExceededError(told, Token(TOKEN_TAG, "", start, source))
        if output:
            yield Token(TOKEN_OUTPUT, source[start:position], start, source)
            yield _expression(source, begin, end)
            continue
        named = _NAME.match(source, begin, end)
        if not named:
            raise LiquidSyntaxError("a tag has no name", token=Token(TOKEN_TAG, "", start, source))
        name = named.group()
        if name == "raw":
            raw = position
            begin, position, trim = _end_raw(source, raw, start)
            yield Token(TOKEN_CONTENT, source[raw:begin], raw, source)
        elif name == "comment":
            position, trim = _end_comment(source, position, start)
        elif name != "#":
            yield Token(TOKEN_TAG, name, begin, source)
            rest = named.end() + len(source[named.end() : end]) - len(source[named.end() : end].lstrip())
            if rest < end:
                yield _expression(source, rest, end)


def _markup(source: str, start: int, closing: str) -> tuple[int, int, int, bool]:
    """Of the markup at `start`: where its inside begins and ends, where what follows begins, and whether that is to be
    trimmed."""
    close = source.find(closing, start + 2)
    if close < 0:
        raise LiquidSyntaxError(f"expected '{closing}'", token=Token(TOKEN_EOF, "", start, source))
    begin, end = start + 2, close
    trim = end > begin and source[end - 1] == "-"
    end -= trim
    begin += begin < end and source[begin] == "-"
    inside = source[begin:end]
    return end - len(inside.lstrip()), begin + len(inside.rstrip()), close + 2, trim


def _expression(source: str, begin: int, end: int) -> Token:
    token = Token(TOKEN_EXPRESSION, source[begin:end], begin, source)
    if len(token.value) > MAX_EXPRESSION:
        raise _ExceededError(f"an expression is longer than {MAX_EXPRESSION} characters", token)
    if token.value.count("(") + token.value.count("[") > MAX_BRACKETS:
        raise _ExceededError(f"an expression has more than {MAX_BRACKETS} brackets", token)
    return token


def _end_raw(source: str, position: int, start: int) -> tuple[int, int, bool]:
    found = _END_RAW.search(source, position)
    if not found:
        raise LiquidSyntaxError("'raw' is never closed", token=Token(TOKEN_TAG, "raw", start, source))
    return found.start(), found.end(), bool(found.group(1))


def _end_comment(source: str, position: int, start: int) -> tuple[int, bool]:
    depth = 1
    for found in _COMMENT.finditer(source, position):
        depth += -1 if found.group(1) else 1
        if depth == 0:
            _, _, end, trim = _markup(source, found.start(), "%}")
            return end, trim
    raise LiquidSyntaxError("'comment' is never closed", token=Token(TOKEN_TAG, "comment", start, source))


class _MeteredTag(Tag):
    """A tag whose nodes cost work to render."""

    def __init__(self, env: Environment, tag: Tag) -> None:
        super().__init__(env)
        self.tag = tag

    def get_node(self, stream: TokenStream) -> Node:
        begin, source = stream.current.start_index, stream.current.source
        node = self.tag.get_node(stream)
        end = stream.current.start_index + len(stream.current.value)
        price = 40 + 3 * (end - begin)
        if self.tag.name == "case":  # A branch is rendered again for each of its values that matches.
            price += 80 * (source.count(",", begin, end) + source.count("or", begin, end))
        return _MeteredNode(node, price)

    def parse(self, stream: TokenStream) -> Node:
        return self.get_node(stream)


class _MeteredNode(Node):
    """Charges each rendering of a node a price: by the length of its source, what is inside it included, since the
    branches and conditions that it weighs are in there."""

    __slots__ = ("node", "price")

    def __init__(self, node: Node, price: int) -> None:
        super().__init__(node.token)
        self.node = node
        self.blank = node.blank
        self.price = price

    def render(self, context: RenderContext, buffer: TextIO) -> int:
        assert isinstance(context, _Context)
        context.charge(self.price)
        return self.node.render_to_output(context, buffer)

    def render_to_output(self, context: RenderContext, buffer: TextIO) -> int:
        return self.render(context, buffer)

    def children(self, static_context: RenderContext, *, include_partials: bool = True) -> Iterable[Node]:
        return [self.node]


class _OutputNode(OutputNode):
    def render_to_output(self, context: RenderContext, buffer: TextIO) -> int:
        return buffer.write(_text(self.expression.evaluate(context)))


class _Output(Output):
    node_class = _OutputNode


class _RangeEnd(Expression):
    """The end of a range that is charged for the whole of it, since the library walks through a range when it looks
    for something in it. The start is evaluated here too, in a range of ranges twice at each level: hence the flat
    charge."""

    __slots__ = ("start", "stop")

    def __init__(self, literal: RangeLiteral) -> None:
        super().__init__(literal.token)
        self.start = literal.start
        self.stop = literal.stop

    def evaluate(self, context: RenderContext) -> object:
        stop = self.stop.evaluate(context)
        length = _integer(stop) - _integer(self.start.evaluate(context))
        if length >= MAX_ITERATIONS:
            raise _ExceededError(f"a range is longer than {MAX_ITERATIONS}", self.token)
        assert isinstance(context, _Context)
        context.charge(40 + _ELEMENT * max(length, 0))
        return stop

    def children(self) -> Iterable[Expression]:
        return [self.stop]


def _integer(value: Any) -> int:
    """As ranges read it: 0 if it is not an integer."""
    try:
        return to_int(value)
    except (ValueError, TypeError):
        return 0


def _expressions(bound: BoundTemplate) -> Iterator[Expression]:
    """Every expression of a template, at any depth, a parent before its children."""
    context = _Context(bound, {})
    nodes, found = list(bound.nodes), list[Expression]()
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children(context))
        found.extend(node.expressions())
    while found:
        expression = found.pop()
        yield expression
        found.extend(expression.children())


def _keys(analysis: TemplateAnalysis) -> dict[str, frozenset[str] | None]:
    """See Template.keys. A name that a template assigns still counts as read from state, since the assignment may lie
    in a branch not taken; a loop's variable does not."""
    names = analysis.globals.keys() | analysis.locals.keys()
    session, scopes = set[str](), dict[str, set[str] | None](user=set(), app=set())
    for name, variables in analysis.variables.items():
        for root, *path in (variable.segments for variable in variables):
            if not isinstance(root, str):
                return {"session": None, "user": None, "app": None}
            if name not in names:
                continue
            keys = scopes.get(name)
            if name not in scopes:
                session.add(name)
            elif keys is not None and path and isinstance(path[0], str) and path[0] not in {"size", "first", "last"}:
                keys.add(path[0])
            elif not path or not isinstance(path[0], int):
                scopes[name] = None
    return {
        "session": frozenset(session),
        **{name: None if keys is None else frozenset(keys) for name, keys in scopes.items()},
    }


# Rendering: where names come from, and what work costs.


class _State(dict[str, object]):
    """The names that a template can read, each converted to plain values at its first use."""

    def __init__(self, state: Mapping[str, Mapping[str, v1.Value]], charge: Callable[[int], None]) -> None:
        super().__init__()
        self._state = state
        self._charge = charge

    def __missing__(self, name: str) -> object:
        if name in {"user", "app"}:
            self[name] = {key: self._plain(value) for key, value in self._state.get(name, {}).items()}
        else:
            self[name] = self._plain(self._state.get("session", {})[name])
        return self[name]

    def _plain(self, value: v1.Value) -> object:
        if value.WhichOneof("kind") in {"list_value", "map_value"}:
            self._charge(value.ByteSize())
        return plain(value, lambda _: "")


class _Context(RenderContext):
    """One render: it resolves names and charges for what is done with them."""

    __slots__ = ("iterations", "most_work", "work")

    def __init__(
        self, bound: BoundTemplate, state: Mapping[str, Mapping[str, v1.Value]], most_work: int = MAX_WORK
    ) -> None:
        super().__init__(bound)
        self.most_work = most_work
        self.globals = _State(state, self.charge)
        # The library's own scope also knows "now" and "today".
        self.scope = ReadOnlyChainMap(self.locals, self.globals, self.counters)
        self.work = 0
        self.iterations = 0

    def charge(self, units: int) -> None:
        self.work += units
        if self.work > self.most_work:
            raise _ExceededError(f"it takes more than {MAX_WORK} units of work: loops, or values copied too often")

    def get(self, path: list[object], *, token: Token | None, default: object = UNDEFINED) -> object:
        value = super().get(path, token=token, default=default)
        self.charge(20 * self.scope.size() + self._size(value))  # A name is looked up scope by scope.
        return value

    def raise_for_loop_limit(self, length: int = 1) -> None:
        """Called by the library when a loop starts."""
        self.iterations += length
        if self.iterations > MAX_ITERATIONS:
            raise _ExceededError(f"more than {MAX_ITERATIONS} loop iterations")
        self.charge(20 * length)

    def get_buffer(self, buf: TextIO | None = None) -> StringIO:
        # The library's own buffer turns CRLF into LF.
        return LimitedStringIO(MAX_OUTPUT - (buf.size if isinstance(buf, LimitedStringIO) else 0), newline="")

    def filter(self, name: str, token: Token | None) -> Callable[..., object]:
        return partial(self._apply, name, super().filter(name, token))

    def _apply(self, name: str, function: Callable[..., object], left: Any, /, *args: Any, **kwargs: Any) -> object:
        """One filter, paid for before and after."""
        self.charge(60 + self._size(left) + sum(map(self._size, args)) + sum(map(self._size, kwargs.values())))
        if name in _TEXT_FILTERS:
            left, args = _text(left), tuple(map(_text, args))
        elif name in {"truncate", "truncatewords"}:
            left = _text(left)
        try:
            self.charge(_surcharge(name, left, args, self._size))
            result = function(left, *args, **kwargs)
        except _ExceededError:
            raise
        except Exception as error:  # Every failure of a filter with its values has the same message.
            raise FilterArgumentError(f"the filter '{name}' does not accept these values", token=None) from error
        if isinstance(result, int) and not -(1 << 63) <= result < 1 << 63:
            raise _ExceededError("a number has more than 64 bits")
        self.charge(self._size(result))
        return result

    def _size(self, value: object) -> int:
        """Of a value, as far as there is work left."""
        return _size(value, self.most_work - self.work)


def _surcharge(name: str, left: Any, args: tuple[Any, ...], size: Callable[[object], int]) -> int:
    """What a filter costs beyond the size of its values: the copies it will make, and comparisons."""
    if name.startswith("replace") and len(args) == 2:
        times = left.count(args[0]) if name == "replace" else 1
        return times * len(args[1])
    if name == "join" and isinstance(left, list | tuple | range) and args:
        return len(left) * len(_text(args[0]))
    if name == "uniq" and isinstance(left, list | tuple | range):
        return len(left) * size(left) // 64
    if name in {"sort", "sort_natural"} and isinstance(left, list | tuple | range):
        return size(left) * len(left).bit_length() // 8
    return 0


def _join(left: object, separator: object = " ") -> str:
    """The library's `join` writes other values than text as Python would."""
    items = flatten(left) if isinstance(left, list | tuple | range) else [left]
    return _text(separator).join(map(_text, items))


def _size(value: object, most: int) -> int:
    """Units to copy or compare the whole of a value once. What is in it twice counts twice, and counting ends beyond
    `most`: a few lines of template make a list that holds the same large map a million times."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list | tuple | dict | range):
        return 1
    total, rest = 0, [value]
    while rest and total <= most:
        match rest.pop():
            case str() as text:
                total += len(text)
            case dict() as mapping:
                total += _ELEMENT * len(mapping) + sum(map(len, mapping))
                rest.extend(mapping.values())
            case range() as numbers:
                total += _ELEMENT * len(numbers)
            case list() | tuple() as items:
                total += _ELEMENT * len(items)
                rest.extend(items)
    return total


def _text(value: object) -> str:
    """A value as an output writes it."""
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case list() | tuple() | dict():
            return json.dumps(value, ensure_ascii=False, default=lambda _: None)
        case range():
            return f"{value.start}..{value.stop - 1}"
        case _:
            return ""


_LIQUID = _Liquid()
