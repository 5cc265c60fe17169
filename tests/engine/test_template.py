"""Instruction templates: what they can express, and that no untrusted template stalls or floods the server."""

import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

import liquid
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liquid.exceptions import LiquidError
from notecase import v1
from notecase_server import errors
from notecase_server.engine import template
from notecase_server.errors import NotecaseError

State = dict[str, dict[str, v1.Value]]


def value(plain: object) -> v1.Value:
    match plain:
        case None:
            return v1.Value(null_value=0)  # type: ignore[arg-type]
        case bool():
            return v1.Value(bool_value=plain)
        case int():
            return v1.Value(int_value=plain)
        case float():
            return v1.Value(double_value=plain)
        case str():
            return v1.Value(string_value=plain)
        case bytes():
            return v1.Value(bytes_value=plain)
        case list():
            return v1.Value(list_value=v1.ValueList(values=[value(item) for item in plain]))
        case dict():
            return v1.Value(map_value=v1.ValueMap(values={key: value(item) for key, item in plain.items()}))
    raise TypeError(plain)


def states(session: object = None, user: object = None, app: object = None) -> State:
    scopes = {"session": session, "user": user, "app": app}
    return {kind: dict(value(plain or {}).map_value.values) for kind, plain in scopes.items()}


def render(source: str, session: object = None, user: object = None, app: object = None) -> str:
    return template.parse(source).render(states(session, user, app))


def failure(source: str, session: object = None) -> str:
    with pytest.raises(NotecaseError) as raised:
        render(source, session)
    assert v1.ERROR_REASON_TEMPLATE_ERROR == raised.value.reason
    return raised.value.message


def test_reads_the_three_scopes_by_name() -> None:
    rendered = render(
        "{{ draft }}, {{ user.name }}, {{ app.policy }}", {"draft": "d"}, {"name": "Ada"}, {"policy": "be kind"}
    )
    assert rendered == "d, Ada, be kind"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ missing }}|{{ missing.deeper[0] }}|{{ user.missing }}", "||"),
        ("{{ null }}{{ bytes }}", ""),
        ("{{ yes }} {{ int }} {{ double }}", "true 9007199254740993 0.5"),
        ("{% for x in list %}{{ x }};{% endfor %}", "a;2;true;;"),
        ("{{ list[1] }} {{ list.first }} {{ list.size }}", "2 a 4"),
        ("{{ map.street }} {{ map['street'] }} {{ map.size }}", "Quay <4> Quay <4> 1"),
        ("{% for pair in map %}{{ pair[0] }}={{ pair[1] }}{% endfor %}", "street=Quay <4>"),
        ("{{ list }} {{ map }}", '["a", 2, true, null] {"street": "Quay <4>"}'),
        ("{{ list | join: '-' }} {{ yes | append: '!' }} {{ null | append: '!' }}", "a-2-true- true! !"),
        ("{% if bytes %}there{% endif %}{% if null %}never{% endif %}", "there"),
        ("{{ ['last seen'] }} {{ user['last seen'] }}", "quay harbour"),
        ("{{ partial }} {{ now }}{{ today }}", "mine "),
        ("{{ markup }} {{ trick }}", "<b>&amp;</b> {{ user.name }}"),
        ("one\r\ntwo {{ crlf }}", "one\r\ntwo a\r\nb"),
    ],
)
def test_values_are_written_as_a_person_expects(source: str, expected: str) -> None:
    """Nothing is escaped or evaluated a second time, what is missing is empty, lists and maps alone are JSON, and no
    name is reserved but `user` and `app`."""
    session = {
        "null": None,
        "bytes": b"%PDF",
        "yes": True,
        "int": 2**53 + 1,
        "double": 0.5,
        "list": ["a", 2, True, None],
        "map": {"street": "Quay <4>"},
        "last seen": "quay",
        "partial": "mine",
        "markup": "<b>&amp;</b>",
        "trick": "{{ user.name }}",
        "crlf": "a\r\nb",
    }
    assert expected == render(source, session, {"last seen": "harbour", "name": "Ada"})


ORDINARY = [
    "no markup at all",
    "Hello {{ name }}!",
    "a {{- name -}} b {%- if name -%} c {%- endif -%} d",
    "  {% if nope %}x{% elsif name == 'Ada' %}y{% else %}z{% endif %}  ",
    "{% unless nope %}u{% endunless %}{% case name %}{% when 'Bob', 'Ada' %}w{% else %}e{% endcase %}",
    "{% for i in (1..5) %}{% if i == 2 %}{%continue%}{% endif %}{{ i }}{% if i == 4 %}{%break%}{% endif %}{% endfor %}",
    "{% for x in items reversed limit: 2 offset: 1 %}{{ forloop.index }}{{ x }}{% else %}none{% endfor %}",
    "{% assign a = name | upcase | append: '.' %}{% capture b %}[{{ a }}]{% endcapture %}{{ b }}",
    "{% raw %}{{ not }} {% this %}{% endraw %}{% comment %}{% if %}{% comment %}{% endcomment %}{{{% endcomment %}.",
    "{% # a note %}{% increment n %}{% increment n %}{% decrement m %}{% cycle 'a', 'b' %}{% cycle 'a', 'b' %}",
    "{{ items | sort | join: ', ' }} {{ items | size }} {{ name | slice: 1, 2 }} {{ 7 | divided_by: 2.0 | round }}",
    "{{ 'a,b' | split: ',' | last }} {{ nope | default: 'dflt' }} {{ 'x y z' | truncatewords: 2 }}",
    "{{ name | replace: 'd', 'D' }} {{ name | slice: -2, 2 }} {{ items | where: 'x' | size }} {{ '<' | escape }}",
    "{ { } } %} }} {",
]


@pytest.mark.parametrize("source", ORDINARY)
def test_ordinary_templates_mean_what_they_mean_in_liquid(source: str) -> None:
    """The lexer, the filters and the outputs that are this module's own change nothing in ordinary templates."""
    plain = {"name": "Ada", "items": ["pear", "fig", "apple"]}
    assert liquid.render(source, **plain) == render(source, plain)


@given(st.lists(st.sampled_from(["{{", "}}", "{%", "%}", "-", " ", "\n", "if a", "endif", "raw", "endraw", "comment",
                                 "endcomment", "a", "'", "|", "#", "é"]), max_size=24))  # fmt: skip
def test_the_lexer_agrees_with_the_library_on_short_sources(pieces: list[str]) -> None:
    """Where the library parses a source, so does this module, to the same text: shown on short sources, because on
    long ones the library's own lexer does not come back."""
    source = "".join(pieces)
    try:
        expected = liquid.render(source, a="A")
    except LiquidError:
        return
    assert expected == render(source, {"a": "A"})


def test_the_same_source_is_parsed_once() -> None:
    assert template.parse("{{ once }}") is template.parse("{{ once }}")


@pytest.mark.parametrize(
    ("source", "session", "user", "app"),
    [
        ("plain", set(), set(), set()),
        ("{{ draft }}{{ ['last seen'].place }}", {"draft", "last seen"}, set(), set()),
        ("{{ user.name }}{{ user['last seen'] }}{{ app.policy.x }}", set(), {"name", "last seen"}, {"policy"}),
        ("{% for x in list %}{{ x.y }}{{ forloop.index }}{% endfor %}", {"list"}, set(), set()),
        ("{% if c %}{% assign draft = 1 %}{% endif %}{{ draft }}", {"c", "draft"}, set(), set()),
        ("{{ a | append: b | default: user.c }}{% cycle d: e %}", {"a", "b", "d", "e"}, {"c"}, set()),
        ("{% case a %}{% when b, user.b %}{% endcase %}{% for i in (c..d) limit: e %}{% endfor %}",
         {"a", "b", "c", "d", "e"}, {"b"}, set()),
        ("{{ map[key] }}", {"map", "key"}, set(), set()),
        ("{{ user[key] }}", {"key"}, None, set()),
        ("{% for pair in user %}{% endfor %}{{ app.size }}", set(), None, None),
        ("{% assign u = user %}{{ u.name }}", {"u"}, None, set()),
        ("{{ user.name }}{{ user }}{{ user.other }}", set(), None, set()),
        ("{{ [draft] }}", None, None, None),
    ],
)  # fmt: skip
def test_keys_are_what_a_render_may_read(
    source: str, session: set[str] | None, user: set[str] | None, app: set[str] | None
) -> None:
    """So that a run reads from the store only those."""
    assert {"session": session, "user": user, "app": app} == template.parse(source).keys


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("Dear {{ name", "(line 1, column 6): expected '}}'"),
        ("\n\n  {% if a %}", "expected tag endif"),
        ("a\nb {% include 'x' %}", "(line 2, column 6): unexpected tag 'include'"),
        ("{% render 'x' %}", "unexpected tag 'render'"),
        ("{% extends 'x' %}", "unexpected tag 'extends'"),
        ("{% tablerow x in y %}{% endtablerow %}", "unexpected tag 'tablerow'"),
        ("{% liquid echo 'x' %}", "unexpected tag 'liquid'"),
        ("{{ 'now' | date: '%9999999999d' }}", "there is no filter 'date'"),
        ("{% raw %}", "'raw' is never closed"),
        ("{% comment %}{% comment %}{% endcomment %}", "'comment' is never closed"),
        ("{% %}", "a tag has no name"),
        ("{{ }}", "expected a primitive"),
        ("{% break %}", "outside of a loop"),
        ("{{ x | upcase: 1, 2, 3 }}", "(line 1, column 8): the filter 'upcase' does not accept these values"),
        ("{{ x | join: environment: x }}", "the filter 'join' does not accept these values"),
        ("{% if x > 3 %}{% endif %}", "(line 1, column 9): '<' and '>' are not supported"),
        ("{{ 1 | divided_by: 0 }}", "the filter 'divided_by' does not accept these values"),
        ("{% for i in (1..3) limit: huge %}{% endfor %}", "its values cannot be combined"),
        ("{% for a in list %}{% for b in forloop %}{% endfor %}x{% endfor %}", "its values cannot be combined"),
    ],
)
def test_the_error_of_a_faulty_template_says_what_is_wrong_and_where(source: str, told: str) -> None:
    assert told in failure(source, {"x": "secret", "list": [1, 2], "huge": 1e300 * 1e10})


def test_a_faulty_template_among_other_faults_ends_in_one_full_stop() -> None:
    with pytest.raises(NotecaseError) as raised:
        template.parse("Dear {{ name")
    told = errors.invalid(raised.value.violations).message
    assert told.endswith("expected '}}'.")
    assert not told.endswith("..")


def test_a_failure_quotes_nothing_of_the_state() -> None:
    """Neither in its message nor in the causes that a log would print."""
    with pytest.raises(NotecaseError) as raised:
        render("{{ 1 | plus: draft }}{{ draft | round }}{{ draft | compact: 'x' }}", {"draft": "secret"})
    assert raised.value.__suppress_context__
    assert "secret" not in str(raised.value.to_proto())


def test_python_cannot_be_reached() -> None:
    """Names lead into lists and maps, never to attributes."""
    source = (
        "{{ s.__class__ }}{{ list.append }}{{ list.__class__.__mro__ }}{{ map.items }}{{ map.keys }}{{ forloop.it }}"
    )
    looped = "{% for x in list %}{{ forloop.it }}{{ forloop.__class__ }}{{ forloop._keys }}{% endfor %}"
    assert render(source + looped, {"s": "x", "list": [1], "map": {"a": 1}}) == ""


@given(st.text(max_size=60))
def test_any_text_either_renders_or_is_refused(source: str) -> None:
    """No other failure escapes, whatever is between the braces."""
    for wrapped in (source, "{{" + source + "}}", "{%" + source + "%}", "{% if " + source + " %}x{% endif %}"):
        try:
            render(wrapped, {"a": "A"})
        except NotecaseError as error:
            assert v1.ERROR_REASON_TEMPLATE_ERROR == error.reason


LOOP = "{%% for i in (1..49999) %%}%s{%% endfor %%}"
WORK = "units of work"
MARKUP = "more than 2000 words and signs in tags and outputs"

ATTACKS: dict[str, tuple[str, str]] = {
    # By parsing: the first eight keep the library's own lexer busy for minutes.
    "an output never closed, with spaces": ("{{" + " " * 65_000, "expected '}}'"),
    "a tag never closed, with spaces": ("{%" + " " * 65_000, "expected '%}'"),
    "outputs never closed in a comment": ("{% comment %}" + "{{ " * 21_000, "never closed"),
    "comments never closed": ("{% comment %}" * 4_900, "never closed"),
    "raws never closed in a comment": ("{% comment %}" + "{%raw%}" * 9_000, "never closed"),
    "ends of comments never closed": ("{% comment %}" + "{%endcomment " * 4_900, "expected '%}'"),
    "round brackets": ("{{ " + "(" * 60_000 + " }}", MARKUP),
    "square brackets": ("{{ " + '[""' * 900 + " }}", "more than 64 brackets"),
    "as many brackets as may be": (('{% if a %}{{ a["' + "[" * 63 + " " * 3_900 + '"] }}{% endif %}') * 16, "= 0"),
    "ranges in ranges": ("{{ " + "(" * 60 + "1" + "..2)" * 60 + " }}", WORK),
    "empty ranges in ranges": ("{{ " + "(" * 60 + "1" + "..0)" * 60 + " }}", WORK),
    "names in names": ("{{ " + "a[" * 64 + "a" + "]" * 64 + " }}", "= 0"),
    "a condition without end": ("{% if " + "a or " * 800 + "a %}{% endif %}", "nested too deeply"),
    "one too long": ("{% if " + "a or " * 900 + "a %}{% endif %}", "longer than 4096 characters"),
    "conditions": (("{% if " + "a or " * 120 + "a %}{% endif %}") * 8, "= 0"),
    "64 KiB of open ifs": ("{% if a %}" * 6_500, MARKUP),
    "ifs in ifs": ("{% if a %}" * 400, "nested more than 16 deep"),
    "64 KiB of outputs": ("{{a}}" * 13_000, MARKUP),
    "660 outputs of brackets": (("{{ a" + "[b]" * 30 + " }}") * 660, MARKUP),
    "names in names without end": (("{{ a" + ".b" * 1500 + " }}") * 20, MARKUP),
    "arguments without end": (("{{ a | append: " + ", ".join("b" * 900) + " }}") * 20, MARKUP),
    "as many outputs as may be": ("{{ user.name }}" * 400, "= 0"),
    "one more": ("{{ user.name }}" * 401, MARKUP),
    "too long a source": ("é" * 40_000, "longer than 65536 bytes"),
    "a filter with a long name": ("{{ a | " + "b" * 4_000 + " }}", "there is no filter"),
    "a long number": ("{{ " + "9" * 4_090 + " }}", "= 4090"),
    # By what is copied.
    "a string doubled forty times": ("{% assign s = 'x' %}" + "{% assign s = s | append: s %}" * 40, WORK),
    "a capture doubled forty times": (
        "{% assign s = 'x' %}" + "{% capture s %}{{s}}{{s}}{% endcapture %}" * 40,
        "262144",
    ),
    "a list doubled forty times": ("{% assign l = 'x,y' | split: ',' %}" + "{% assign l = l | concat: l %}" * 40, WORK),
    "a large map a thousand times": (
        "{% assign l = m | compact %}" + "{% assign l = l | concat: l %}" * 10 + "{{ l }}",
        WORK,
    ),
    "a long replacement": ("{{ big | replace: 'x', big }}", WORK),
    "a replacement of nothing": ("{{ big | replace: '', big }}", WORK),
    "a long separator": ("{{ list | join: big }}", WORK),
    "a string split into characters": ("{{ big | split: '' }}", WORK),
    "distinct elements of a long list": ("{{ list | uniq }}", WORK),
    "a long output": ("{% for i in (1..3000) %}" + "bottles" * 15 + "{% endfor %}", "262144"),
    "a long output at once": ("{{ big }}", "262144"),
    "a number squared a hundred times": (
        "{% assign n = 9 %}" + "{% assign n = n | times: n %}" * 100,
        "more than 64 bits",
    ),
    "numbers as text": ("{% assign n = '" + "9" * 4_000 + "' %}{{ n | times: n }}", "more than 64 bits"),
    "a number with a huge exponent": ("{{ '1e999999999' | split: ',' | sum }}", "the filter 'sum'"),
    "rounding to a huge place": ("{{ 1.5 | round: 999999999999 }}", "= 3"),
    # By looping.
    "a range without end": ("{% for i in (1..1000000000) %}x{% endfor %}", "a range is longer than 50000"),
    "a range by variables": ("{% assign n = 1000000000 %}{% assign r = (1..n) %}", "a range is longer than 50000"),
    "a search in a range": ("{% if (1..1000000000) contains 'x' %}{% endif %}", "a range is longer than 50000"),
    "many searches in a range": (LOOP % "{% if (1..49999) contains 'x' %}{% endif %}", WORK),
    "a range reversed": ("{% for i in (1..1000000000) reversed %}{% endfor %}", "a range is longer than 50000"),
    "loops in loops": ("{% for i in (1..999) %}" * 3 + "x" + "{% endfor %}" * 3, "50000 loop iterations"),
    "loops after loops": ("{% for i in (1..49999) %}{% endfor %}" * 140, "50000 loop iterations"),
    "loops fourteen deep": ("{% for i in (1..2) %}" * 14 + "{{a}}{{b.c}}" * 20 + "{% endfor %}" * 14, WORK),
    "a loop around much": (LOOP % ("{{a}}" * 600), WORK),
    "a loop around conditions": (LOOP % ("{% if 1==1 and 1==1 and 1==1 %}{% endif %}" * 20), WORK),
    "a loop around names": (LOOP % "{{ a.b.c.d.e.f.g.h.i.j }}", WORK),
    "a loop around filters": (LOOP % ("{{ 1" + " | abs" * 12 + " }}"), WORK),
    "a loop around assignments": (LOOP % "".join(f"{{% assign a{n} = 1 %}}" for n in range(300)), WORK),
    "a loop around a search": (LOOP % "{% if big contains 'xxxxxxxxxxxxxxxxxxxxxxy' %}{% endif %}", WORK),
    "a loop around comparisons": (LOOP % "{% if list == list %}{% endif %}", WORK),
    "a loop around cycles": (LOOP % "{% cycle list: 1, 2 %}", WORK),
    "a loop around the same value, over and over": (
        LOOP % ("{% case 1 %}{% when " + "1," * 950 + "1 %}{% endcase %}"),
        WORK,
    ),
    "the same value over and over, fourteen deep": (
        ("{% case 1 %}{% when " + "1," * 60 + "1 %}") * 14 + "x" + "{% endcase %}" * 14,
        WORK,
    ),
}
"""By name: a source, and its error, or "= n" if it renders to n characters."""

CHILD = """
import json, resource, sys
from notecase import v1
from notecase_server.engine import template
from notecase_server.errors import NotecaseError
text = lambda s: v1.Value(string_value=s)
strings = lambda n: [text(str(i)) for i in range(n)]
state = {"session": {
    "big": text("x" * 1_000_000),
    "list": v1.Value(list_value=v1.ValueList(values=strings(60_000))),
    "m": v1.Value(map_value=v1.ValueMap(values={str(i): text("v" * 10) for i in range(40_000)})),
}, "user": {}, "app": {}}
pages = int(open("/proc/self/statm").read().split()[0])
roof = pages * resource.getpagesize() + (192 << 20)
resource.setrlimit(resource.RLIMIT_AS, (roof, roof))
resource.setrlimit(resource.RLIMIT_CPU, (90, 90))
for name, source in json.load(sys.stdin).items():
    try:
        told = f"= {len(template.parse(source).render(state))}"
    except NotecaseError as error:
        told = error.message
    print(json.dumps([name, told]), flush=True)
"""


@pytest.fixture(scope="module")
def attacked() -> dict[str, str]:
    """The result of each attack, all in one process that may grow by 192 MiB and use 90 s of CPU: about ten times what
    they need on a slow machine, and far less than one of them takes if a limit is missing."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps({name: source for name, (source, _) in ATTACKS.items()}),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    return dict(json.loads(line) for line in child.stdout.splitlines())


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_or_harmless(name: str, attacked: dict[str, str]) -> None:
    """Each ends soon, in little memory, with a sentence that names the limit. The first one missing from the child's
    output stalled or flooded it."""
    assert name in attacked
    told, expected = attacked[name], ATTACKS[name][1]
    assert expected == told if expected.startswith("= ") else expected in told
    assert len(told) < 300


LOOPS = "{% for a in (1..99) %}{% for b in (1..99) %}{% if a == b %}x{% endif %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "threads"),
    [("{{ draft }}", ["MainThread"]), (LOOPS, ["MainThread", "templates"])],
    ids=["short work", "long work"],
)
async def test_what_takes_long_to_render_is_rendered_in_a_thread(
    source: str, threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started again there, with the same result."""
    seen: list[str] = []
    render_ = template.Template.render

    def noted(self: template.Template, *arguments: Any) -> str:
        seen.append(threading.current_thread().name.partition("_")[0])
        return render_(self, *arguments)

    monkeypatch.setattr(template.Template, "render", noted)
    rendered = await template.parse(source).rendered(states({"draft": "d"}))
    assert (threads, render(source, {"draft": "d"})) == (seen[: len(threads)], rendered)


async def test_a_template_beyond_its_limits_fails_alike_wherever_it_is_rendered() -> None:
    source = "{% assign s = seed %}" + "{% assign s = s | append: s %}" * 30 + "{{ s }}"
    with pytest.raises(NotecaseError) as raised:
        await template.parse(source).rendered(states({"seed": "x" * 100}))
    assert failure(source, {"seed": "x" * 100}) == raised.value.message


async def test_a_long_template_is_parsed_in_a_thread_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    lex = template._lex

    def noted(source: str) -> Any:
        seen.append(threading.current_thread().name.partition("_")[0])
        return lex(source)

    monkeypatch.setattr(template._LIQUID, "tokenizer", lambda: noted)
    long = "{{ a }}" + "x" * template.SHORT + str(time.monotonic_ns())
    first, again = await template.parsed(long), await template.parsed(long)
    assert (["templates"], True) == (seen, first is again)
    with pytest.raises(NotecaseError) as raised:
        await template.parsed("{% if %}" + "x" * template.SHORT)
    assert v1.ERROR_REASON_TEMPLATE_ERROR == raised.value.reason


def test_state_is_charged_for_before_it_is_read() -> None:
    """A map of the state is turned into plain values, which takes longer than to look at it."""
    wide = {"wide": {f"k{number}": number for number in range(10_000)}}
    bound = template.parse("{{ wide.size }}")
    with pytest.raises(template._LongError):
        bound.render(states(wide), 50_000)
    assert "10000" == bound.render(states(wide))
