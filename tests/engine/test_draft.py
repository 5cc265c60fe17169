"""The draft of a reply: pieces in, blocks that only grow, a message out."""

import itertools

import pytest
from notecase import v1
from notecase_server.engine.draft import MAX_REPLY_BYTES, Draft
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import Call, Reasoning, Text

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


def test_a_lone_surrogate_becomes_a_sign_that_can_be_sent() -> None:
    made = draft()
    made.feed(Text("a\ud800b"))
    assert "a\ufffdb" == made.message("a", COMPLETED).parts[0].text
