"""Any bytes a provider may send end as the reply they mean, or as one typed failure."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.models.answers import chunk as documents
from notecase_server.models.answers.calls import MAX_HELD
from notecase_server.models.answers.chunk import Choice, Chunk, Said
from notecase_server.models.answers.event_stream import MAX_EVENT_BYTES, EventSplitter
from notecase_server.models.answers.redaction import Redactor
from notecase_server.models.chat_stream import MAX_SILENT_BYTES, MAX_TEXT_BYTES, ChatReply, Piece
from notecase_server.models.contract import Returned, Text

from tests.support.openai_server import DONE, MODEL, chunk, event, stream, tool_calls
from tests.support.replies import Reply, fold


def made(**options: Any) -> ChatReply:
    return ChatReply("asked", Redactor(""), **options)


def pieces_of(*chunks: bytes) -> list[Piece]:
    """All pieces of an answer that comes in these chunks and then ends."""
    reply = made()
    pieces: list[Piece] = []
    for data in chunks:
        pieces += reply.feed(data)
        if reply.done:
            break
    return pieces + reply.end()


def read(*chunks: bytes) -> Reply:
    return fold(pieces_of(*chunks))


def failure(*chunks: bytes) -> NotecaseError:
    with pytest.raises(NotecaseError) as caught:
        pieces_of(*chunks)
    return caught.value


def cut(data: bytes, at: Sequence[int]) -> list[bytes]:
    ends = sorted({offset % len(data) for offset in at} | {len(data)})
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def counted(model: str = MODEL, **tokens: int) -> v1.Usage:
    """The usage of one call."""
    usage = v1.Usage(model=model, model_calls=1)
    for name, number in tokens.items():
        setattr(usage, name, number)
    return usage


SAID = chunk({"content": "Hi"})

_ODD = st.sampled_from([None, "", "x", 0, 1, True, False, [], {}, [1], {"a": 1}, "\ud83d", "\ude00", {"text": "t"}])
_TEXTS = st.sampled_from(["Hi", " there", "", "\ud83d", "\ude00", "😀", None])


def _mostly(usual: Mapping[str, Any], *rare: str) -> st.SearchStrategy[dict[str, Any]]:
    """An object with the usual members, and at times with one or two of the rare ones."""
    odd: st.SearchStrategy[dict[str, Any]] = st.one_of(
        st.just({}), st.dictionaries(st.sampled_from(rare), _ODD, max_size=2)
    )
    return st.builds(lambda told, more: told | more, st.fixed_dictionaries({**usual}), odd)


_DELTAS = _mostly({"content": _TEXTS}, *Said.__struct_fields__, "role")
_CHOICES = _mostly({"delta": _DELTAS, "index": st.just(0)}, *Choice.__struct_fields__)
_CHUNKS = _mostly({"choices": st.lists(_CHOICES, min_size=1, max_size=1)}, *Chunk.__struct_fields__, "code", "message")
_COUNTED = _mostly(
    {
        "object": st.just("chat.completion.chunk"),
        "choices": st.just([]),
        "usage": st.just({"prompt_tokens": 3, "completion_tokens": "7"}),
    },
    *(*Chunk.__struct_fields__, "id", "code", "message", "type", "errors", "base_resp", "success", "service_tier"),
)


class TestEvents:
    MIXED = (
        ": hello\n\n"
        'data: {"a": "é😀"}\n\n'
        "event: message\r\nid: 7\r\ndata: one\r\ndata:two\r\ndata:  three\r\n\r\n"
        "retry: 10\n\n"
        "\n\n\n"
        "data: cr\r\r"
        "data\n\n"
        "database: no\n\n"
        "data: last\n\r\n"
    ).encode()
    DATA = ('{"a": "é😀"}'.encode(), b"one\ntwo\n three", b"cr", b"last")

    @given(at=st.lists(st.integers(0, 10_000), max_size=60))
    def test_events_do_not_depend_on_where_reads_cut_them(self, at: list[int]) -> None:
        splitter = EventSplitter()
        assert list(self.DATA) == [data for piece in cut(self.MIXED, at) for data, _ in splitter.feed(piece)]

    def test_events_are_the_same_byte_by_byte(self) -> None:
        splitter = EventSplitter()
        assert list(self.DATA) == [data for byte in self.MIXED for data, _ in splitter.feed(bytes([byte]))]

    def test_an_event_is_given_out_with_its_empty_line_and_no_later(self) -> None:
        splitter = EventSplitter()
        assert [] == splitter.feed(b"data: a\r\n")
        assert [(b"a", "")] == splitter.feed(b"\r")
        assert [(b"b", "")] == splitter.feed(b"\ndata: b\n\n")

    def test_an_event_with_images_passes_and_one_that_no_memory_should_hold_does_not(self) -> None:
        image = b"x" * (MAX_EVENT_BYTES - 100)
        assert [(image, "")] == EventSplitter().feed(b"data: " + image + b"\n\n")
        with pytest.raises(NotecaseError) as caught:
            EventSplitter().feed(b"data: " + b"x" * (MAX_EVENT_BYTES + 1) + b"\n\n")
        assert v1.ERROR_REASON_MODEL_ERROR == caught.value.reason

    def test_many_small_lines_of_one_event_are_bounded_too(self) -> None:
        with pytest.raises(NotecaseError):
            EventSplitter().feed(b"data:x\n" * (MAX_EVENT_BYTES // 64 + 1))

    def test_a_line_that_never_ends_is_refused_once_it_is_too_long(self) -> None:
        splitter = EventSplitter()
        for _ in range(MAX_EVENT_BYTES // 4096):
            assert [] == splitter.feed(b"x" * 4096)
        with pytest.raises(NotecaseError) as caught:
            splitter.feed(b"x")
        assert v1.ERROR_REASON_MODEL_ERROR == caught.value.reason


class TestReply:
    def test_pieces_come_as_they_arrive_and_not_at_the_end(self) -> None:
        reply = made()
        assert [Text("Good")] == reply.feed(chunk({"content": "Good"}))
        assert [Text(" evening")] == reply.feed(chunk({"content": " evening"}))

    @given(at=st.lists(st.integers(0, 10_000), max_size=40))
    def test_a_reply_does_not_depend_on_where_reads_cut_it(self, at: list[int]) -> None:
        answer = stream(chunk({"content": "schön 😀"}), chunk({"reasoning": "hm"}), chunk({"content": "\u2028!"}))
        usage = counted(input_tokens=11, output_tokens=7)
        expected = Reply(text="schön 😀\u2028!", reasoning="hm", reason="stop", usage=usage)
        assert expected == read(*cut(answer.body, at))

    def test_reasoning_comes_under_either_name_and_once_when_under_both(self) -> None:
        answer = stream(
            chunk({"reasoning_content": "a"}),
            chunk({"reasoning": "b"}),
            chunk({"reasoning": "c", "reasoning_content": "c"}),
            SAID,
        )
        assert "abc" == read(answer.body).reasoning

    def test_a_refusal_is_not_text(self) -> None:
        answer = stream(chunk({"refusal": "I will"}), chunk({"refusal": " not."}))
        assert ("", "I will not.") == read(answer.body)[0::2][:2]

    def test_further_choices_are_other_replies_and_left_out(self) -> None:
        other = event({"choices": [{"index": 1, "delta": {"content": "other"}, "finish_reason": "length"}]})
        assert ("mine", "stop") == read(stream(chunk({"content": "mine"}), other).body)[::4]

    def test_null_and_absent_members_mean_nothing(self) -> None:
        odd = {"content": None, "tool_calls": None, "refusal": None, "reasoning": None, "role": None}
        bare = event({"choices": [{"delta": {"content": "!"}}], "usage": None, "error": None})
        answer = stream(chunk(odd), event({}), event({"choices": None}), event({"choices": [{"delta": None}]}), bare)
        assert "!" == read(answer.body).text

    def test_the_answer_names_the_model_and_otherwise_the_request_does(self) -> None:
        assert MODEL == read(stream(chunk({"content": "a"})).body).usage.model
        assert "asked" == read(event({"choices": [{"delta": {"content": "a"}}]}), DONE).usage.model

    def test_a_whole_completion_in_place_of_a_stream_is_a_reply(self) -> None:
        message = {"role": "assistant", "content": "Hi", "tool_calls": [{"id": "x", "function": {"name": "f"}}]}
        body = event({"model": "m", "choices": [{"message": message, "finish_reason": "stop"}]}).removeprefix(b"data: ")
        expected = Reply(text="Hi", calls=(("f", ""),), reason="stop", usage=counted(model="m"))
        assert expected == read(b"\n", body[:9], body[9:])

    def test_a_web_page_in_place_of_a_stream_is_refused_at_its_first_byte(self) -> None:
        reply = made()
        assert [] == reply.feed(b"\r\n <!doctype html>")
        assert reply.done
        with pytest.raises(NotecaseError) as caught:
            reply.end()
        assert v1.ERROR_REASON_MODEL_ERROR == caught.value.reason

    def test_a_whole_completion_without_end_is_refused_once_it_is_too_long(self) -> None:
        reply = made()
        assert [] == reply.feed(b"{" + b" " * (MAX_EVENT_BYTES - 1))
        assert not reply.done
        reply.feed(b" ")
        assert reply.done
        with pytest.raises(NotecaseError) as caught:
            reply.end()
        assert v1.ERROR_REASON_MODEL_ERROR == caught.value.reason


class TestRunsOfTokens:
    """Many tokens that come at once are decoded together, which changes nothing but the time it takes."""

    TOKENS = tuple(chunk({"content": f"token {number} "}) for number in range(60))

    @pytest.mark.parametrize(
        "between",
        [
            b"",
            chunk({"content": None}),
            chunk({"reasoning_content": "hm"}),
            b"".join(chunk({"content": "HALF"}).replace(b"HALF", half) for half in (rb"\ud83d", rb"\ude00")),
            chunk({"content": "other"}, model="another"),
            chunk({"content": "end"}, finish="stop"),
            tool_calls(("f", "{}")).body,
            b": nothing\n\n",
            b"\n\n",
            b"event: message\ndata: {}\n\n",
            b"data: \n\n",
            b"data: [DONE]\n\n",
            SAID.strip() + SAID.replace(b"data: ", b","),
            SAID.strip() + SAID.replace(b"data: ", b"\ndata: "),
            SAID.replace(b"[", b"[\n\ndata: "),
            b'data: {"error":{"message":"no more"}}\n\n',
            b"data: {\n\n",
            SAID.replace(b"\n", b"\r\n"),
        ],
    )
    @given(at=st.lists(st.integers(0, 20_000), max_size=4), where=st.integers(0, 60))
    @settings(max_examples=20)
    def test_they_are_what_they_are_one_by_one(self, between: bytes, at: list[int], where: int) -> None:
        data = b"".join([*self.TOKENS[:where], between, *self.TOKENS[where:]]) + stream().body
        assert self._outcome(cut(data, at)) == self._outcome(cut(data, range(0, len(data), 50)))

    def _outcome(self, chunks: Sequence[bytes]) -> Any:
        try:
            return read(*chunks)
        except NotecaseError as error:
            return error.reason, error.message

    def test_they_are_decoded_at_one_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one_by_one: list[bytes] = []
        monkeypatch.setattr(documents, "token", one_by_one.append)
        read(b"".join(self.TOKENS) + stream().body)
        assert [] == one_by_one


class TestEnd:
    SAID = chunk({"content": "Hi"})
    FINISHED = chunk(finish="length")

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            pytest.param(SAID + FINISHED + DONE, "length", id="reason and done"),
            pytest.param(SAID + FINISHED, "length", id="reason, not done"),
            pytest.param(SAID + DONE, "stop", id="done without a reason"),
            pytest.param(SAID + chunk(finish="") + DONE, "stop", id="done with an empty reason"),
            pytest.param(SAID + DONE.rstrip(), "stop", id="done without an empty line"),
            pytest.param(SAID + b"data:[DONE]\r\n\r\ndata: junk\n\n", "stop", id="junk after done"),
            pytest.param(tool_calls(("f", "{}")).body.replace(b'"tool_calls"}', b"null}"), "tool_calls", id="calls"),
            pytest.param(SAID + FINISHED[:-2], "length", id="the last event without its empty line"),
        ],
    )
    def test_a_reply_is_whole_by_its_reason_or_by_done(self, answer: bytes, reason: str) -> None:
        assert reason == read(answer).reason

    @pytest.mark.parametrize("answer", [b"", SAID, SAID + b": ping\n\n", SAID + FINISHED[:-5], b": ping\n\n"])
    def test_an_answer_that_ends_before_the_reply_is_unavailable(self, answer: bytes) -> None:
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == failure(answer).reason

    @pytest.mark.parametrize("end", [b"", b"\n\n", b"\n\n" + FINISHED])
    def test_half_a_chunk_within_a_frame_cuts_the_reply(self, end: bytes) -> None:
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == failure(SAID + b'data: data: {"choices":[{' + end).reason

    def test_words_in_any_script_say_why_a_reply_was_cut(self) -> None:
        assert "余额不足" in failure(SAID + "data: 余额不足\n\n".encode()).message

    @pytest.mark.parametrize("data", [b"[" * 600 + b"]" * 600, b'{"error":' * 600 + b"1" + b"}" * 600])
    def test_what_is_nested_without_end_is_a_model_error(self, data: bytes) -> None:
        """As one event, and as a separate document."""
        for sent in (SAID + event(None).replace(b"null", data), data):
            assert v1.ERROR_REASON_MODEL_ERROR == failure(sent).reason

    def test_done_without_a_reply_is_asked_again(self) -> None:
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == failure(chunk({"role": "assistant", "content": ""}), DONE).reason


class TestUsage:
    TOLD: Mapping[str, Any] = {
        "prompt_tokens": 20,
        "completion_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 16, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 4},
    }
    COUNTED = counted(input_tokens=20, cached_input_tokens=16, output_tokens=9, reasoning_tokens=4)

    def test_usage_comes_in_a_separate_chunk(self) -> None:
        assert self.COUNTED == read(stream(SAID, usage=self.TOLD).body).usage

    def test_usage_comes_with_the_final_content(self) -> None:
        answer = (chunk({"content": "a"}), chunk({"content": "b"}, finish="stop", usage=self.TOLD), DONE)
        assert ("ab", self.COUNTED) == read(*answer)[::5]

    def test_usage_that_grows_with_each_chunk_counts_once(self) -> None:
        first = chunk({"content": "a"}, usage={"prompt_tokens": 20, "completion_tokens": 1})
        assert self.COUNTED == read(stream(first, usage=self.TOLD).body).usage

    def test_usage_that_was_never_reported_counts_one_model_call(self) -> None:
        assert counted() == read(stream(SAID, usage=None).body).usage

    @pytest.mark.parametrize(("told", "tokens"), [(12.0, 12), (None, 0), (-3, 0), (2**64 - 1, 0), (float("nan"), 0)])
    def test_odd_numbers_of_tokens_do_not_cost_the_reply(self, told: float | None, tokens: int) -> None:
        usage: dict[str, Any] = {"prompt_tokens": told, "prompt_tokens_details": None, "completion_tokens_details": {}}
        assert counted(input_tokens=tokens) == read(stream(SAID, usage=usage).body).usage


def piece(name: str | None = None, arguments: str | None = None, **members: object) -> dict[str, Any]:
    """One piece of a tool call as a server sends it; what is not given is absent."""
    function = {"name": name, "arguments": arguments}
    return {**members, "function": {key: value for key, value in function.items() if value is not None}}


class TestToolCalls:
    TWO = (("f", '{"a":1}'), ("g", '{"b":2}'))

    @pytest.mark.parametrize("held", ['"a\\ud83d"', "[NaN]", str(10**40)])
    def test_arguments_as_an_object_are_written_whatever_is_in_it(self, held: str) -> None:
        call = chunk({"tool_calls": [piece("f", "HELD", index=0, id="x")]})
        ((name, arguments),) = read(call.replace(b'"HELD"', f'{{"é":{held}}}'.encode()), DONE).calls
        assert "f" == name
        assert ["é"] == [*json.loads(arguments)]

    @pytest.mark.parametrize("pieces", [1, 3])
    def test_a_name_ends_where_no_tool_s_is_longer(self, pieces: int) -> None:
        """Whether it comes in parts, or whole with each piece of the call."""
        deltas = [chunk({"tool_calls": [piece("f" * 200_000, "", index=0, id="x")]}) for _ in range(pieces)]
        assert (("f" * 256, "{}"),) == read(*deltas, chunk({"tool_calls": [piece(None, "{}", index=0)]}), DONE).calls

    @pytest.mark.parametrize(
        "deltas",
        [
            pytest.param(
                [
                    [piece("f", "", index=0, id="x")],
                    [piece(None, '{"a"', index=0)],
                    [piece(None, ":1}", index=0)],
                    [piece("g", "", index=1, id="y")],
                    [piece(None, '{"b":2}', index=1)],
                ],
                id="as OpenAI sends them",
            ),
            pytest.param(
                [
                    [piece("f", '{"a"', index=1, id="x")],
                    [piece(None, ":1}", index=1)],
                    [piece("g", '{"b":2}', index=2)],
                ],
                id="first index 1",
            ),
            pytest.param(
                [
                    [piece("f", "", index=0, id="x"), piece("g", "", index=1, id="y")],
                    [piece(None, '{"a', index=0), piece(None, '{"b"', index=1)],
                    [piece(None, ":2}", index=1), piece(None, '":1}', index=0)],
                ],
                id="interleaved by index",
            ),
            pytest.param(
                [
                    [piece("f", '{"a', id="x")],
                    [piece("g", '{"b"', id="y")],
                    [piece(None, '":1}', id="x")],
                    [piece(None, ":2}", id="y")],
                ],
                id="interleaved by id, no index",
            ),
            pytest.param(
                [[piece("f", '{"a":1}', id="x"), piece("g", '{"b":2}', id="y")]],
                id="whole in one piece, no index",
            ),
            pytest.param(
                [[piece("f", '{"a":1}')], [piece("g", '{"b"')], [piece(None, ":2}")]],
                id="neither index nor id",
            ),
            pytest.param(
                [[piece("f", '{"a":1}', index=None, id="")], [piece("g", '{"b":2}', index=None, id=None)]],
                id="null index and empty id",
            ),
            pytest.param(
                [[piece("f", '{"a":1}', index=0, id="x")], [piece("g", '{"b":2}', index=0, id="y")]],
                id="every index 0",
            ),
            pytest.param(
                [
                    [piece("f", "", index=0, id="x1")],
                    [piece(None, '{"a"', index=0, id="x2")],
                    [piece(None, ":1}", index=0, id="x3")],
                    [piece("g", "", index=1, id="y1")],
                    [piece("g", '{"b":2}', index=1, id="y2")],
                ],
                id="another id in each piece",
            ),
            pytest.param(
                [
                    [piece("f", '{"a"', id="x1")],
                    [piece(None, ":1}", id="x2")],
                    [piece("g", "", id="y1")],
                    [piece("g", '{"b":2}', id="y2")],
                ],
                id="another id in each piece, no index",
            ),
            pytest.param(
                [
                    [piece("f", '{"a"', index=0, id="x")],
                    [piece("f", ":1}", index=0, id="x")],
                    [piece("f", "", index=0, id="x")],
                    [piece("g", '{"b":2}', index=1)],
                    [piece("g", "", index=1)],
                ],
                id="the name in each piece",
            ),
            pytest.param(
                [
                    [piece("f", '{"a"', index=0, id="x1")],
                    [piece("f", ":1}", index=0, id="x2")],
                    [piece("f", "", index=0, id="x3")],
                    [piece("g", '{"b":2}', index=1, id="y1")],
                ],
                id="the name and another id in each piece",
            ),
        ],
    )
    def test_calls_are_distinguished_however_the_server_numbers_them(self, deltas: list[list[dict[str, Any]]]) -> None:
        answer = stream(*(chunk({"tool_calls": delta}) for delta in deltas), finish="tool_calls")
        assert self.TWO == read(answer.body).calls

    def test_a_name_may_come_in_parts(self) -> None:
        deltas = [piece("get_", "", index=0, id="x"), piece("weather", "", index=0), piece(None, "{}", index=0)]
        answer = stream(*(chunk({"tool_calls": [delta]}) for delta in deltas))
        assert (("get_weather", "{}"),) == read(answer.body).calls

    def test_calls_without_arguments_and_index_are_distinguished_by_id_and_name(self) -> None:
        deltas = [piece("f", "", id="x"), piece("g", "", id="y")]
        answer = stream(*(chunk({"tool_calls": [delta]}) for delta in deltas))
        assert (("f", ""), ("g", "")) == read(answer.body).calls

    def test_text_may_come_before_between_and_after_calls(self) -> None:
        answer = stream(
            chunk({"content": "a"}),
            chunk({"content": "b", "tool_calls": [piece("f", "{", index=0)]}),
            chunk({"content": "c"}),
            chunk({"tool_calls": [piece(None, "}", index=0)]}),
        )
        assert ("abc", (("f", "{}"),)) == read(answer.body)[::3]

    def test_a_hundred_calls_are_a_hundred(self) -> None:
        calls = tuple((f"tool_{number}", f'{{"n":{number}}}') for number in range(100))
        assert calls == read(tool_calls(*calls).body).calls


class TestFaults:
    @pytest.mark.parametrize(
        "data",
        [
            b"[]",
            b'{"choices": 5}',
            b'{"choices": [{"delta": {"content": 5}}]}',
        ],
        ids=lambda data: data[:24].decode(),
    )
    def test_a_chunk_that_is_none_is_a_model_error(self, data: bytes) -> None:
        caught = failure(chunk({"content": "a"}) + b"data: " + data + b"\n\n")
        assert v1.ERROR_REASON_MODEL_ERROR == caught.reason
        assert "The model provider sent something that is not part of a Chat Completions reply." == caught.message

    @pytest.mark.parametrize(
        "data",
        [
            b'{"choices": [',
            b'{"choices": ' + b"[" * 100_000,
            b'{"else": ' + b"[" * 100_000,
            b'{"model": "\\ud83d", "else": ' + b"[" * 100_000,
        ],
        ids=lambda data: data[:24].decode(),
    )
    def test_a_chunk_that_cannot_be_read_cuts_the_reply(self, data: bytes) -> None:
        caught = failure(chunk({"content": "a"}) + b"data: " + data + b"\n\n" + chunk({"content": "b"}) + DONE)
        assert v1.ERROR_REASON_MODEL_UNAVAILABLE == caught.reason
        assert "The model provider sent a part of the reply that cannot be read." == caught.message

    def test_a_failure_does_not_take_the_pieces_before_it(self) -> None:
        reply = made()
        data = chunk({"content": "a"}) + event({"error": {"message": "no", "code": 500}})
        assert [Text("a")] == reply.feed(data)
        with pytest.raises(NotecaseError):
            reply.end()

    def test_text_that_no_message_could_hold_is_refused(self) -> None:
        assert v1.ERROR_REASON_MODEL_ERROR == failure(chunk({"content": "x" * (MAX_TEXT_BYTES + 1)}), DONE).reason

    def test_arguments_that_are_held_back_are_bounded(self) -> None:
        """They may be sent again as a whole, which only the end tells."""
        reply = made()
        piece = chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"arguments": "x" * (1 << 18)}}]})
        for _ in range(MAX_HELD >> 18):
            assert [] == reply.feed(piece)
            assert reply.heard
        assert not reply.done
        reply.feed(piece)
        with pytest.raises(NotecaseError) as caught:
            reply.end()
        assert v1.ERROR_REASON_MODEL_ERROR == caught.value.reason

    def test_what_says_nothing_is_bounded(self) -> None:
        reply = made()
        for _ in range(MAX_SILENT_BYTES // (1 << 16)):
            assert [] == reply.feed(b":\n\n".ljust(1 << 16, b"\n"))
        assert not reply.done
        reply.feed(b":\n\n")
        with pytest.raises(NotecaseError) as caught:
            reply.end()
        assert v1.ERROR_REASON_MODEL_ERROR == caught.value.reason

    @pytest.mark.parametrize(
        ("texts", "expected"),
        [
            ([rb"\ud83d", rb"\ude00!"], "😀!"),
            ([rb"a\ud83d", b"", rb"\ude00\ud83d", rb"\ude01"], "a😀😁"),
            ([rb"\ud83d\ude00"], "😀"),
            ([rb"a\ud83d", b"b"], "a\ufffdb"),
            ([rb"\ude00b"], "\ufffdb"),
            ([rb"a\ud83d"], "a\ufffd"),
            ([rb"a\ud83d", rb"\ud83d\ude00"], "a\ufffd😀"),
            ([b"a\xf0\x9f", b"b"], "a\ufffdb"),
            ([b"a\x01\tb"], "a\x01\tb"),
        ],
    )
    def test_text_is_valid_unicode_whatever_came(self, texts: list[bytes], expected: str) -> None:
        content = [b'data: {"choices":[{"delta":{"content":"' + text + b'"}}]}\n\n' for text in texts]
        assert expected == read(*content, DONE).text
        arguments = [
            b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"' + text + b'"}}]}}]}\n\n'
            for text in texts
        ]
        assert (("", expected),) == read(*arguments, DONE).calls

    def test_what_goes_back_to_the_provider_is_valid_unicode_too(self) -> None:
        """A half of a character in a member that is kept failed the reply as a defect of the server."""

        def thought(text: str) -> bytes:
            detail = {"type": "reasoning.text", "text": text, "index": 0}
            return b"data: " + json.dumps({"choices": [{"delta": {"reasoning_details": [detail]}}]}).encode() + b"\n\n"

        call = {"index": 0, "id": "c\ud83d", "function": {"name": "f", "arguments": "{}"}}
        called = b"data: " + json.dumps({"choices": [{"delta": {"tool_calls": [call]}}]}).encode() + b"\n\n"
        pieces = pieces_of(thought("a\ud83d"), thought("\ude00\ud83d"), called, DONE)
        told = [(piece.key, piece.data) for piece in pieces if isinstance(piece, Returned)]
        members = '{"reasoning_details":[{"type":"reasoning.text","text":"a😀\ufffd","index":0}]}'
        assert [(0, v1.ProviderData(call_id="c\ufffd")), (None, v1.ProviderData(members=members.encode()))] == told

    @settings(max_examples=200)
    @given(st.lists(st.one_of(_CHUNKS, _CHUNKS, _CHUNKS, _COUNTED), min_size=1, max_size=8))
    def test_the_short_ways_to_read_a_chunk_say_what_the_long_one_says(self, chunks: list[Any]) -> None:
        """Those for a chunk that is text alone, and for one that is the usage alone."""
        data = [b"data: " + json.dumps(told).encode() + b"\n\n" for told in chunks] + [DONE]

        def told() -> tuple[Any, ...]:
            try:
                return tuple(pieces_of(*data))
            except NotecaseError as error:
                return error.reason, error.message, error.metadata, error.usage

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents, "token", lambda data: None)
            patch.setattr(documents, "counted", lambda data: None)
            expected = told()
        assert expected == told()

    def test_names_and_reasons_are_valid_unicode_too(self) -> None:
        call = rb'{"choices":[{"delta":{"tool_calls":[{"function":{"name":"f\ud800"}}]},"finish_reason":"s\udfff"}]'
        reply = read(b"data: " + call + rb',"model":"m\ud800"}' + b"\n\n", DONE)
        assert ((("f\ufffd", ""),), "stop", "asked") == (reply.calls, reply.reason, reply.usage.model)
