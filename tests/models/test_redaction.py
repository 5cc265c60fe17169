"""A provider's words are shown if they are safe: short, of a known shape, and without the key in any spelling."""

import base64
import html
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from notecase_server.models.answers.redaction import TOLD_CHARS, Redactor, is_secret

KEY = "test-Secret.0123/456+789=="


def spelled(text: str) -> set[str]:
    """Every run of eight letters and digits of a text, in lower case."""
    bare = "".join(char for char in text.lower() if char.isascii() and char.isalnum())
    return {bare[at : at + 8] for at in range(len(bare) - 7)}


WRITINGS = {
    "as it is": KEY,
    "upper case": KEY.upper(),
    "lower case": KEY.lower(),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 for URLs": base64.urlsafe_b64encode(KEY.encode()).decode(),
    "base64 of a header": base64.b64encode(f"::{KEY}".encode()).decode(),
    "base64 of basic": base64.b64encode(f":{KEY}".encode()).decode(),
    "base32": base64.b32encode(KEY.encode()).decode(),
    "hex": KEY.encode().hex(),
    "hex in upper case": KEY.encode().hex().upper(),
    "hex with colons": KEY.encode().hex(":"),
    "quoted for URLs": quote(KEY, safe=""),
    "quoted twice": quote(quote(KEY, safe=""), safe=""),
    "every character quoted": "".join(f"%{byte:02x}" for byte in KEY.encode()),
    "every character quoted twice": "".join(f"%25{byte:02x}" for byte in KEY.encode()),
    "wide letters": "".join(chr(ord(char) + 0xFEE0) for char in KEY),
    "base64 of UTF-16": base64.b64encode(KEY.encode("utf-16-le")).decode(),
    "hex of UTF-16": KEY.encode("utf-16-le").hex(),
    "bytes as numbers": ", ".join(str(byte) for byte in KEY.encode()),
    "bytes as octals": "".join(f"\\{byte:03o}" for byte in KEY.encode()),
    "a dump": KEY.encode().hex(" "),
    "quoted-printable": "".join(f"={byte:02X}" for byte in KEY.encode()),
    "escapes of JavaScript": "".join(f"\\u{{{byte:x}}}" for byte in KEY.encode()),
    "escapes of C": "".join(f"\\x{byte:02x}" for byte in KEY.encode()),
    "quoted HTML": quote("".join(f"&#{byte};" for byte in KEY.encode())),
    "HTML": "".join(f"&#{byte};" for byte in KEY.encode()),
    "HTML's names": html.escape(KEY).replace("/", "&sol;"),
    "JSON": "".join(f"\\u00{byte:02x}" for byte in KEY.encode()),
    "split by spaces": " ".join(KEY),
    "split by lines": "\n".join(KEY[at : at + 5] for at in range(0, len(KEY), 5)),
    "split by dashes": "-".join(KEY[at : at + 4] for at in range(0, len(KEY), 4)),
    "its first half": KEY[: len(KEY) // 2 + 2],
    "its second half": KEY[len(KEY) // 2 - 2 :],
    "in quotes": f"'{KEY}'",
    "after words": f"apikey{KEY}",
    "in halves, apart": f"{KEY[:13]} and then {KEY[13:]}",
}


@pytest.mark.parametrize("name", WRITINGS)
def test_the_key_is_shown_in_no_spelling(name: str) -> None:
    told = Redactor(KEY).told(f"Wrong key: {WRITINGS[name]}, see the manual.")
    assert "[key]" in told
    assert not spelled(WRITINGS[name]) & spelled(told.replace("[key]", "\0"))


@pytest.mark.parametrize("name", WRITINGS)
def test_no_name_holds_the_key(name: str) -> None:
    for shaped in (Redactor(KEY).name, Redactor(KEY).reason):
        assert "" == shaped(WRITINGS[name])
        assert "" == shaped(f"model-{WRITINGS[name]}")


@pytest.mark.parametrize("name", WRITINGS)
def test_no_address_holds_the_key(name: str) -> None:
    assert "" == Redactor(KEY).link(f"https://images.example/a?sign={WRITINGS[name]}")


@pytest.mark.parametrize("part", ["name", "reason", "link", "told"])
def test_half_of_the_key_is_a_secret_too(part: str) -> None:
    """So that a provider which spreads it over two members tells it in none."""
    for half in (KEY[:13], KEY[13:]):
        before = "https://a.example/" if part == "link" else ""
        assert half[:8] not in getattr(Redactor(KEY), part)(before + half)


@pytest.mark.parametrize("key", ["sk-proj-" + "aB3" * 50, "0123456789abcdef0123", "A" * 40])
def test_what_is_read_of_the_key_costs_others_nothing(key: str) -> None:
    """Words, codes and addresses without parts of it are shown unchanged."""
    redactor = Redactor(key)
    words = "The request has 115 107 45 tokens; see https://example.org/a%20b?x=1&y=%2F for =3D and 100% more."
    assert (words, "model-1") == (redactor.told(words), redactor.name("model-1"))
    assert "https://example.org/a%20b?x=1&y=%2F" == redactor.link("https://example.org/a%20b?x=1&y=%2F")


def test_text_around_the_key_is_shown() -> None:
    assert "Incorrect API key [key]. You can find yours online." == Redactor(KEY).told(
        f"Incorrect API key {KEY}. You can find yours online."
    )


@pytest.mark.parametrize(
    "key", ["", "x", "e", "none", "EMPTY", "ollama", "lm-studio", "not-needed", "sk-no-key", "abc123"]
)
def test_a_placeholder_key_is_not_a_secret_and_is_not_replaced_in_words_and_codes(key: str) -> None:
    words = "context_length_exceeded: none of the not-needed ollama lm-studio abc123 text was EMPTY"
    assert not is_secret(key)
    assert words == Redactor(key).told(words)
    assert "context_length_exceeded" == Redactor(key).name("context_length_exceeded")


@pytest.mark.parametrize("text", ["Bearer abcdefg", "sk-proj-abcdef123", "SK-ABCDEFGHIJ"])
def test_text_that_looks_like_a_key_is_not_shown(text: str) -> None:
    assert "a [key]" == Redactor("").told(f"a {text}")


@pytest.mark.parametrize("name", ["stop", "gpt-4.1-mini", "accounts/fireworks/models/x", "qwen2.5:7b", "a b"])
def test_a_name_of_known_shape_is_kept(name: str) -> None:
    assert name == Redactor(KEY).name(name)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("stop", "stop"),
        ("eos found", "eos_found"),
        ("FinishReason.STOP", "FinishReason.STOP"),
        ("stop-sequence", "stop-sequence"),
        ("x" * 64, "x" * 64),
        ("x" * 65, ""),
        ("Call +1 555 0100", ""),
        ("1", ""),
        ("a/b", ""),
        ("é", ""),
        ("a\x00", ""),
        ("Bearer abc", ""),
        ("sk-abcdefgh", ""),
        ("", ""),
    ],
)
def test_a_finish_reason_is_one_short_word(word: str, told: str) -> None:
    assert told == Redactor(KEY).reason(word)


def test_opaque_data_is_looked_through_for_the_key_itself() -> None:
    assert Redactor(KEY).is_echoed(f'{{"a":"{KEY.upper()}"}}'.encode())
    assert not Redactor(KEY).is_echoed(b'{"a":"c2lnbmVk"}')
    assert not Redactor("none").is_echoed(b"none")


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 200, "<b>", "\x1b[31m", "é", " a"])
def test_a_name_of_no_shape_is_not(name: str) -> None:
    assert "" == Redactor(KEY).name(name)


@given(st.text(max_size=2000))
def test_whatever_is_said_is_one_short_printable_line(text: str) -> None:
    told = Redactor(KEY).told(text)
    assert len(told) <= TOLD_CHARS
    assert told.isprintable()


@given(st.text(max_size=50), st.text(max_size=50))
def test_the_key_is_found_between_any_words(before: str, after: str) -> None:
    assert KEY.lower() not in Redactor(KEY).told(before + KEY + after).lower()
