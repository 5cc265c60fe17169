"""What Python puts into state comes out equal and of one type."""

from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from notecase import Plain, from_value, text_of, to_message, to_value, v1

_texts = st.text(st.characters(exclude_categories=["Cs"]))
_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | _texts
    | st.binary()
)
plains = st.recursive(_scalars, lambda inner: st.lists(inner) | st.dictionaries(_texts, inner), max_leaves=20)


def _typed(plain: Any) -> Any:
    """A value with the types said, for Python holds True, 1 and 1.0 to be equal."""
    if isinstance(plain, list):
        return [_typed(held) for held in plain]
    if isinstance(plain, dict):
        return {key: _typed(held) for key, held in plain.items()}
    return type(plain), plain


@given(plains)
def test_a_value_comes_back_equal_and_of_its_type(plain: Any) -> None:
    """Over the wire too: the message is serialized and parsed in between."""
    carried = v1.Value.FromString(to_value(plain).SerializeToString())
    assert _typed(from_value(carried)) == _typed(plain)


@pytest.mark.parametrize(
    ("given", "back"),
    [
        ((1, (2,)), [1, [2]]),
        (range(2), [0, 1]),
        (OrderedDict(a=1), {"a": 1}),
        (bytearray(b"\xff"), b"\xff"),
        (memoryview(b"\x00\x01"), b"\x00\x01"),
        ("a\x00b", "a\x00b"),
    ],
)
def test_relatives_become_the_plain_type(given: Plain, back: object) -> None:
    """Other sequences come back as lists, mappings as dicts, buffers as bytes; U+0000 survives."""
    assert _typed(from_value(to_value(given))) == _typed(back)


@pytest.mark.parametrize("number", [1 << 63, -(1 << 63) - 1])
def test_an_integer_beyond_64_bits_is_refused(number: int) -> None:
    """It would not come back as it went in."""
    with pytest.raises(OverflowError, match="64 bits"):
        to_value({"deep": [number]})


@pytest.mark.parametrize("odd", [{1: "key"}, {"deep": {2.5}}, object(), [1j]])
def test_what_state_cannot_hold_is_refused_by_type(odd: Any) -> None:
    """Nothing is turned into its `str` in passing."""
    with pytest.raises(TypeError, match="state"):
        to_value(odd)


def test_an_unset_value_is_none() -> None:
    """As is one of a kind that this client does not know."""
    unknown = v1.Value.FromString(b"\xfa\x01\x01x")  # field 31, length-delimited
    assert [from_value(v1.Value()), from_value(unknown)] == [None, None]


def test_text_becomes_a_users_message_and_back() -> None:
    """A plain string is what a user says; a message stays itself."""
    message = to_message("Grüße")
    assert message == v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text="Grüße")])
    assert to_message(message) is message
    message.parts.add(refusal="no")
    message.parts.add(text=", Ada")
    assert text_of(message) == "Grüße, Ada"


def test_a_blob_in_state_is_one_that_was_uploaded() -> None:
    """No other could be looked up, and would be a reference to nothing."""
    with pytest.raises(TypeError, match="uploaded"):
        to_value([v1.Blob(media_type="image/png")])
