"""The draft of a reply: pieces in, blocks that only grow, a message out."""

import itertools
from collections.abc import Sized

import pytest
from notecase import v1
from notecase_server.engine.draft import MAX_MEDIA, MAX_REPLY_BYTES, Draft
from notecase_server.engine.unfenced import Unfenced
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import MAX_MEDIA_BYTES, Call, Cited, Link, Reasoning, Source, Text, Thought

COMPLETED = v1.Message.STATUS_COMPLETED


def draft() -> Draft:
    ids = map(str, itertools.count())
    return Draft("m", "r", lambda: next(ids))


def test_text_of_one_kind_grows_one_block_and_calls_keep_their_own() -> None:
    made = draft()
    pieces = (Reasoning("Hm."), Text("a"), Text("b"), Call(0, "look", "{"), Call(1, "ask", "{}"), Call(0, "", "}"))
    assert [True, True, False, True, True, False] == [made.feed(piece) for piece in pieces]
    parts = made.message("a", COMPLETED).parts
    assert ["Hm.", "ab"] == [parts[0].reasoning.text, parts[1].text]
    calls = [part.tool_call for part in parts[2:]]
    assert [("0", "look", "{}"), ("1", "ask", "{}")] == [(call.call_id, call.tool, call.arguments) for call in calls]


def test_text_that_has_turned_out_to_be_reasoning_makes_it_another_message() -> None:
    ids = map(str, itertools.count())
    made = Draft("m", "r", lambda: next(ids), as_json=True)
    for delta in (Text('I weigh {"a": 0}.'), Thought('I weigh {"a": 0}.'), Text('{"a": 1}')):
        made.feed(delta)
    message = made.message("a", COMPLETED)
    assert "0" == message.name
    assert ['I weigh {"a": 0}.', '{"a": 1}'] == [message.parts[0].reasoning.text, message.parts[1].json]


def test_a_reply_that_is_cut_has_no_calls_left_open_and_nothing_is_no_message() -> None:
    made = draft()
    assert made.cut("a") is None
    made.feed(Text("So"))
    made.feed(Call(0, "look", '{"a'))
    cut = made.cut("a")
    assert cut is not None
    assert v1.Message.STATUS_INCOMPLETE == cut.status
    assert v1.ToolCall.OUTCOME_CANCELLED == cut.parts[1].tool_call.outcome


def test_a_reply_is_bounded() -> None:
    made = draft()
    with pytest.raises(NotecaseError) as failed:
        for _ in range(2):
            made.feed(Text("x" * (MAX_REPLY_BYTES // 2)))
    assert v1.ERROR_REASON_LIMIT_EXCEEDED == failed.value.reason


def test_json_beyond_the_bound_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Unfenced, "feed")
    made = Draft("m", "r", str, as_json=True)
    with pytest.raises(NotecaseError) as failed:
        made.feed(Text("[" * (MAX_REPLY_BYTES + 1)))
    assert v1.ERROR_REASON_LIMIT_EXCEEDED == failed.value.reason


def test_a_name_of_a_tool_is_bounded_and_counts() -> None:
    """In one piece or many: a message with it fits into a page."""
    made = draft()
    for _ in range(3):
        made.feed(Call(0, "é" * 200, ""))
    assert 256 == len(made.message("a", COMPLETED).parts[0].tool_call.tool)
    made.feed(Text("x" * (MAX_REPLY_BYTES - 2048 - 512)))
    with pytest.raises(NotecaseError):
        made.feed(Text("x"))


@pytest.mark.parametrize("begun", ["{}", "```json\n{}\n```\nAnd"])
def test_what_is_held_back_of_json_counts_for_the_bound(begun: str) -> None:
    made = Draft("m", "r", str, as_json=True)
    made.feed(Text(begun))
    made.feed(Text(" " * (MAX_REPLY_BYTES // 2)))
    with pytest.raises(NotecaseError) as failed:
        made.feed(Text(" " * (MAX_REPLY_BYTES // 2)))
    assert v1.ERROR_REASON_LIMIT_EXCEEDED == failed.value.reason
    assert "{}" == made.json


def test_a_lone_surrogate_becomes_a_sign_that_can_be_sent() -> None:
    made = draft()
    made.feed(Text("a\ud800b"))
    assert "a\ufffdb" == made.message("a", COMPLETED).parts[0].text


IMAGE = v1.Part(blob=v1.Blob(name="blobs/x", media_type="image/png", size_bytes=5))


def test_content_is_a_separate_block_between_texts() -> None:
    made = draft()
    assert [True, False, True] == [made.feed(piece) for piece in (Text("a"), Link("https://x", "image/*"), Text("b"))]
    made.place(IMAGE)
    kinds = [part.WhichOneof("kind") for part in made.message("a", COMPLETED).parts]
    assert ["text", "file", "text", "blob"] == kinds
    assert [b"a", b"", b"b", b""] == [bytes(block.data) for block in made.blocks]


def test_what_is_not_kept_is_said_in_words_at_its_place() -> None:
    """What is kept elsewhere stays."""
    made = draft()
    made.feed(Link("https://x", "image/*"))
    assert not made.forget_made()
    made.place(IMAGE)
    made.feed(Text("b"))
    assert made.forget_made()
    file, words, text = made.message("a", COMPLETED).parts
    assert ("https://x", "[image/png, 5 bytes, not kept]", "b") == (file.file.uri, words.text, text.text)
    assert not made.forget_made()


def test_an_image_alone_is_kept_of_a_reply_that_is_cut() -> None:
    made = draft()
    made.place(IMAGE)
    cut = made.cut("a")
    assert cut is not None
    assert [IMAGE] == list(cut.parts)


def test_what_is_made_is_bounded() -> None:
    made = draft()
    made.make_room(MAX_MEDIA_BYTES)
    with pytest.raises(NotecaseError) as failed:
        made.make_room(1)
    assert ("reply_media_bytes", str(MAX_MEDIA_BYTES)) == (
        failed.value.metadata["limit"],
        failed.value.metadata["value"],
    )
    made = draft()
    for _ in range(MAX_MEDIA):
        made.make_room(0)
        made.place(IMAGE)
    with pytest.raises(NotecaseError) as failed:
        made.make_room(0)
    assert "reply_media" == failed.value.metadata["limit"]


def test_sources_cost_no_reply() -> None:
    """They are kept while there is room, with text only, in places that the text has."""
    made = draft()
    made.feed(Cited([Source("https://a", "")]))
    made.feed(Text("x" * (MAX_REPLY_BYTES - 4096)))
    made.feed(Cited([Source(f"https://{number}/{'a' * 500}", "", 1, MAX_REPLY_BYTES) for number in range(50)]))
    (part,) = made.message("a", COMPLETED).parts
    assert 0 < len(part.citations) < 10
    assert {(0, 0)} == {(citation.start, citation.end) for citation in part.citations}


def test_many_places_in_a_long_text_are_found_in_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else is served meanwhile."""
    encoded = 0

    def counting(sized: Sized) -> int:
        nonlocal encoded
        encoded += len(sized) if isinstance(sized, bytes) else 0
        return len(sized)

    made, text = draft(), "aé漢🔎" * 10_000
    made.feed(Text(text))
    monkeypatch.setattr("notecase_server.engine.draft.len", counting, raising=False)
    places = [(39_000 - 700 * number, 39_001 - 650 * number) for number in range(50)]
    made.feed(Cited([Source("https://a", "", *place) for place in places]))
    assert encoded <= len(text.encode())
    (part,) = made.message("a", COMPLETED).parts
    told = [(citation.start, citation.end) for citation in part.citations]
    assert [(len(text[:start].encode()), len(text[:end].encode())) for start, end in places] == told
