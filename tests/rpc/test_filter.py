"""List filters: what they mean, and that whatever is no filter is refused with its position."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from notecase import v1
from notecase_server.errors import NotecaseError, Violation
from notecase_server.rpc.filter import EnumField, FieldKind, Operator, parse
from notecase_server.store.contract import And, Compare, Filter, Not, Or

FIELDS: Mapping[str, FieldKind] = {
    "user": "text",
    "activity": EnumField(v1.Session.Activity, "ACTIVITY_"),
    "create_time": "time",
    "labels": "labels",
}
A, B, C, D = (Compare(f"labels.{name}", "=", name) for name in "abcd")


def violation(text: str) -> str:
    with pytest.raises(NotecaseError) as raised:
        parse(text, FIELDS)
    assert v1.ERROR_REASON_INVALID_FIELD == raised.value.reason
    (found,) = raised.value.violations
    assert isinstance(found, Violation)
    assert found.field == "filter"
    return found.description


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_nothing_filters_nothing(text: str) -> None:
    assert parse(text, FIELDS) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('user = "users/ada"', Compare("user", "=", "users/ada")),
        ("user=users/ada", Compare("user", "=", "users/ada")),
        ("user != 'O\\'Hara \\\\ \"x\"'", Compare("user", "!=", 'O\'Hara \\ "x"')),
        ('user = ""', Compare("user", "=", "")),
        ("user >= -5", Compare("user", ">=", "-5")),
        ("user < ä\u00a0OR user = x", Or((Compare("user", "<", "ä"), Compare("user", "=", "x")))),
        ("activity = IDLE", Compare("activity", "=", v1.Session.ACTIVITY_IDLE)),
        ('activity != "ACTIVITY_RUNNING"', Compare("activity", "!=", v1.Session.ACTIVITY_RUNNING)),
        ("create_time > 1970-01-01T00:00:01.5Z", Compare("create_time", ">", 1_500_000)),
        ('create_time <= "1970-01-01t02:00:00+02:00"', Compare("create_time", "<=", 0)),
        ("create_time < 1969-12-31T23:59:59.999999999Z", Compare("create_time", "<", -1)),
        ("labels.team = night", Compare("labels.team", "=", "night")),
        ("labels.a.b = x", Compare("labels.a.b", "=", "x")),
        ('labels."a b\\"c" = x', Compare('labels.a b"c', "=", "x")),
        ("labels.'x=y' != \"\"", Compare("labels.x=y", "!=", "")),
    ],
)
def test_a_term_compares_a_field_with_a_value_of_its_kind(text: str, expected: Filter) -> None:
    assert expected == parse(text, FIELDS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a} AND {b}", And((A, B))),
        ("{a} {b}", And((A, B))),
        ("{a} OR {b}", Or((A, B))),
        ("{a} AND {b} OR {c}", And((A, Or((B, C))))),
        ("{a} OR {b} AND {c}", And((Or((A, B)), C))),
        ("{a} {b} OR {c} AND {d}", And((A, Or((B, C)), D))),
        ("({a} AND {b}) OR {c}", Or((And((A, B)), C))),
        ("NOT {a} OR {b}", Or((Not(A), B))),
        ("-{a} {b}", And((Not(A), B))),
        ("NOT ({a} OR {b})", Not(Or((A, B)))),
        ("-(({a}))", Not(A)),
    ],
)
def test_or_binds_tighter_than_and_and_side_by_side_is_and(text: str, expected: Filter) -> None:
    """As AIP-160 has it, and unlike most languages."""
    terms = {name: f"labels.{name} = {name}" for name in "abcd"}
    assert expected == parse(text.format(**terms), FIELDS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("colour = red", "unknown field; the fields are activity, create_time, labels.KEY, user (character 1)"),
        ("labels = red", "unknown field; the fields are activity, create_time, labels.KEY, user (character 1)"),
        ("labels. = red", "unknown field; the fields are activity, create_time, labels.KEY, user (character 1)"),
        (
            "user:ada",
            "unknown field; the fields are activity, create_time, labels.KEY, user; ':' is not supported, write = "
            "(character 1)",
        ),
        ("user", "expected one of = != < <= > >= (character 5)"),
        ("user = a AND", "expected a field (character 13)"),
        ("user = a OR OR user = b", "expected a field (character 13)"),
        ("NOT NOT user = a", "expected a field (character 5)"),
        ("user = ", "expected a value (character 8)"),
        ("user = AND", "expected a value (character 8)"),
        ("user = (a)", "expected a value (character 8)"),
        ("user == a", "expected a value (character 7)"),
        ("user = a b", "unknown field; the fields are activity, create_time, labels.KEY, user (character 10)"),
        ("(user = a", "a '(' is never closed (character 1)"),
        ("user = a)", "a ')' without its '(' (character 9)"),
        ("()", "expected a field (character 2)"),
        ('user = "a', "a quote is never closed (character 8)"),
        ("user ! a", "unexpected character (character 6)"),
        ("activity = SLEEPING", "expected one of UNSPECIFIED, IDLE, RUNNING, WAITING (character 12)"),
        ("activity > IDLE", "this field supports only = and != (character 10)"),
        ("create_time > yesterday", "expected a time such as 2026-11-01T08:30:00Z (character 15)"),
        ("create_time > 2026-11-01", "expected a time such as 2026-11-01T08:30:00Z (character 15)"),
        ("create_time > 2026-13-01T00:00:00Z", "expected a time such as 2026-11-01T08:30:00Z (character 15)"),
        ("create_time > 2026-11-01T00:00:00", "expected a time such as 2026-11-01T08:30:00Z (character 15)"),
        ("(" * 33 + "user = a" + ")" * 33, "parentheses are nested more than 32 deep (character 33)"),
        ("user = " + "é" * 1024, "longer than 2048 bytes"),
    ],
)
def test_an_invalid_filter_is_refused_with_the_position(text: str, told: str) -> None:
    assert told == violation(text)


def test_filters_up_to_the_limits_are_taken() -> None:
    assert Compare("user", "=", "a") == parse("(" * 32 + "user = a" + ")" * 32, FIELDS)
    assert Compare("user", "=", "x" * 2041) == parse("user = " + "x" * 2041, FIELDS)


WORDS = [
    *("user", "activity", "create_time", "labels.a", 'labels."b c"', "IDLE", "AND", "OR", "NOT", "-", "(", ")"),
    *("=", "!=", "<", ">=", "!", '"', "'", '"q"', "\\", ":", "*", ".", "\0", "ß", "2026-11-01T08:30:00Z"),
    *("0000-00-00T99:99:99+99:99", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59"),
]


@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=5)), max_size=40), st.sampled_from(["", " "]))
def test_any_text_is_a_filter_or_is_refused(words: list[str], between: str) -> None:
    """Nothing but the one typed failure escapes, and it is always inside the text."""
    text = between.join(words)
    try:
        parse(text, FIELDS)
    except NotecaseError as error:
        (found,) = error.violations
        if "(character " in found.description:
            position = int(found.description.rpartition("(character ")[2].rstrip(")"))
            assert 1 <= position <= len(text) + 1


OPERATORS: tuple[Operator, ...] = ("=", "!=", "<", ">", "<=", ">=")
COMPARISONS = st.builds(Compare, st.sampled_from(["user", "labels.k"]), st.sampled_from(OPERATORS), st.text())


def written(where: Filter) -> str:
    match where:
        case Compare(field, op, value):
            escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
            return f'{field} {op} "{escaped}"'
        case Not(term):
            return f"NOT ({written(term)})"
        case And(terms):
            return " AND ".join(f"({written(term)})" for term in terms)
        case Or(terms):
            return " OR ".join(f"({written(term)})" for term in terms)


@given(
    st.recursive(
        COMPARISONS,
        lambda inner: st.one_of(
            st.builds(Not, inner),
            st.builds(lambda terms: And(tuple(terms)), st.lists(inner, min_size=2, max_size=3)),
            st.builds(lambda terms: Or(tuple(terms)), st.lists(inner, min_size=2, max_size=3)),
        ),
        max_leaves=6,
    )
)
def test_every_filter_can_be_written(where: Filter) -> None:
    """Whatever its values hold, a quoted filter reads back as it was meant."""
    text = written(where)
    if len(text.encode()) <= 2048:
        assert where == parse(text, FIELDS)
