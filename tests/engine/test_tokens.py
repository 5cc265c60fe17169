"""The tokens of a message: exact if a provider reported them, otherwise by the ratio in this conversation."""

import pytest
from notecase import v1
from notecase_server.engine.tokens import Gauge


def reply(text: str, output: int, reasoning: int = 0) -> v1.Message:
    usage = v1.Usage(output_tokens=output, reasoning_tokens=reasoning)
    return v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=[v1.Part(text=text)], usage=usage)


def data(media_type: str, size: int) -> v1.Part:
    return v1.Part(data=v1.InlineData(media_type=media_type, data=b"0" * size))


def test_a_reply_counts_as_its_provider_counted_it() -> None:
    """Without the reasoning, which is not shown again, whatever its bytes say; with what its calls came to."""
    made = reply("x" * 4000, 30, reasoning=20)
    made.parts.add().reasoning.text = "x" * 4000
    assert Gauge().tokens(made) == 4 + 10
    call = made.parts.add().tool_call
    call.result.add().text = "y" * 40
    assert Gauge().tokens(made) == 4 + 10 + 4 + 10
    del call.result[:]
    call.error = "z" * 8
    assert Gauge().tokens(made) == 4 + 10 + 4 + 2


def test_what_nothing_was_reported_of_counts_by_its_bytes() -> None:
    """An incomplete reply, for one, with the calls it asks for and without its reasoning."""
    cut = reply("x" * 41, 0)
    cut.parts.add().reasoning.text = "x" * 400
    assert Gauge().tokens(cut) == 4 + 11
    cut.parts.add().tool_call.CopyFrom(v1.ToolCall(tool="lens", arguments="{}"))
    assert Gauge().tokens(cut) == 4 + 12 + 4


@pytest.mark.parametrize(
    ("replies", "ratio"),
    [
        ([], 4.0),
        ([("", 9)], 4.0),
        ([("x" * 30, 10)], 3.0),
        ([("x" * 30, 10), ("日本語", 6)], 39 / 16),
        ([("ok", 7)], 1.0),
        ([("x" * 1000, 1)], 8.0),
    ],
    ids=["nothing", "only calls or silence", "one", "two", "less than a byte", "more than words have"],
)
def test_a_conversation_shows_how_its_text_falls_into_tokens(replies: list[tuple[str, int]], ratio: float) -> None:
    assert Gauge(reply(*each) for each in replies).bytes_per_token == ratio


@pytest.mark.parametrize(
    ("part", "tokens"),
    [
        (v1.Part(file=v1.FileUri(uri="https://example.org/a.png", media_type="image/png")), 1000),
        (data("image/png", 5), 1000),
        (data("IMAGE/JPEG", 500_000), 1000),
        (data("audio/wav", 32_000), 32),
        (data("application/pdf", 75_000), 1500),
        (data("text/csv", 400), 100),
        (data("application/json; charset=utf-8", 400), 100),
        (v1.Part(blob=v1.Blob(media_type="image/png", size_bytes=5)), 1000),
        (v1.Part(blob=v1.Blob(media_type="application/pdf", size_bytes=75_000)), 1500),
        (v1.Part(json="1" * 400), 100),
    ],
    ids=lambda each: "" if isinstance(each, int) else str(each).split()[0],
)
def test_content_counts_too(part: v1.Part, tokens: int) -> None:
    """In what a user says, and in what a tool gave."""
    assert Gauge().tokens(v1.Message(parts=[part])) == 4 + tokens
    called = v1.Message(parts=[v1.Part(tool_call=v1.ToolCall(result=[part]))])
    assert Gauge().tokens(called) == 4 + 4 + tokens


def test_content_from_a_model_is_described_in_words_and_counts_no_tokens() -> None:
    """Its provider counted the image as well, which says nothing of text; long text of a reply is shown whole."""
    image = v1.Part(blob=v1.Blob(media_type="image/png", size_bytes=5))
    made = v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=[v1.Part(text="x" * 40), image])
    made.usage.output_tokens = 1300
    assert Gauge([made]).tokens(made) == 4 + 10
    long = v1.Part(blob=v1.Blob(media_type="text/plain", size_bytes=400))
    assert Gauge().tokens(v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=[long])) == 4 + 100
