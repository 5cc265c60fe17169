"""Turns the bytes of a Chat Completions answer into the pieces of a reply; strict about what a complete reply is,
lenient about the form.

There is no I/O here, so that every way to cut the bytes can be tried. The events are split and decoded here and not by
the SDK, whose chunk objects cost ten times as much as the rest of the work for a token.
"""

import re
from contextlib import suppress
from typing import Any

from notecase_server import errors
from notecase_server.errors import NotecaseError
from notecase_server.models.answers import chunk as documents
from notecase_server.models.answers import media, provider_errors
from notecase_server.models.answers.calls import Calls
from notecase_server.models.answers.chunk import CallPiece, Choice, Chunk, Said, thought_of
from notecase_server.models.answers.citations import Citations
from notecase_server.models.answers.event_stream import (
    BETWEEN,
    LAST,
    MAX_EVENT_BYTES,
    EventSplitter,
    documents_of,
    too_large,
)
from notecase_server.models.answers.finish_reasons import Finish as End
from notecase_server.models.answers.finish_reasons import is_cut, is_none, meaning
from notecase_server.models.answers.media import Audio, Encoded
from notecase_server.models.answers.redaction import TOLD_CHARS, Redactor
from notecase_server.models.answers.surrogates import mended
from notecase_server.models.answers.think_tags import ThinkTags
from notecase_server.models.answers.usage import Counts
from notecase_server.models.contract import Call, Cited, Delta, Finish, Link, Reasoning, Refusal, Returned, Text, Used
from notecase_server.models.provider_data import ProviderData

MAX_TEXT_BYTES = 1 << 20
"""What the parts of a message may hold together: text that comes larger than that in one piece could not be kept."""

MAX_SILENT_BYTES = MAX_EVENT_BYTES
"""What may come between two pieces of a reply: comments, empty chunks and whatever else says nothing."""

_MANY_BYTES = 1 << 10
"""A chunk of this much probably holds several tokens, which are taken together."""

_MOST_MISSES = 8
"""How often in a reply a chunk is taken for text alone and is not, before none is taken for that any more. A miss costs
about as much as a token."""

_BOM = b"\xef\xbb\xbf"

_AROUND_WORDS = b" \t\0\"'"
_LAST = frozenset({b"[DONE]", b"DONE"})
_KEEPS_ALIVE = re.compile(
    rb"(?i):.*|[^\w\x80-\xff]*(null|ping|pong|keep[ _-]?alive|heart[ _-]?beat|processing|waiting)?[^a-z_\x80-\xff]*"
)
"""Data that only keeps the connection: Vertex AI sends comments as data (anomalyco/opencode#50871)."""

_FAILS = re.compile(rb"(?i)error|exception|fail|timed? ?out|<html|<!doctype")

_UNREAD = "The model provider sent a part of the reply that cannot be read."

UNREADABLE = (ValueError, TypeError, RecursionError)
"""What reading may raise for values that no check foresaw, such as ones nested by the thousand."""

_WORDS = {
    End.WHOLE: "stop",
    End.CALLS: "tool_calls",
    End.LIMIT: "length",
    End.TOO_LONG: "length",
    End.FILTERED: "content_filter",
}
"""OpenAI's word for each end, for a reply whose server sent none, or one that must not be shown."""


Piece = Delta | Encoded
"""What an answer's bytes come to: content that the model made is left for who has the time to decode it."""


class _Extras:
    """What few replies hold besides their text."""

    def __init__(self, audio_format: str) -> None:
        self.calls = Calls()
        self.data = ProviderData()
        self.audio = Audio(audio_format)
        self.images: set[int] = set()
        """Digests of those that came, which a whole message at the end repeats."""
        self.unread = False
        """An image came in no known shape."""
        self.citations = Citations()


class ChatReply:
    """One reply in the making: bytes in, pieces out, and at the end whether it is whole."""

    def __init__(
        self,
        model: str,
        redactor: Redactor,
        behind_calls: bool = False,
        think_tags: bool = False,
        audio_format: str = "",
    ) -> None:
        """`model` is the one asked for; an answer that names its own is believed. `behind_calls` says that the request
        ended with the outcomes of calls, so that the model may have nothing more to say. `think_tags` says that
        reasoning may come in tags before the text, `audio_format` in which format audio was asked for."""
        self._asked = self._model = self._named = model
        self._redactor = redactor
        self._behind_calls = behind_calls
        self._think = ThinkTags() if think_tags else None
        self._events = EventSplitter()
        self._head = b""
        self._document: bytearray | None = None
        self._begun = False
        self._in_text = True
        """The next chunk is probably text alone."""
        self._misses = 0
        self._counts = Counts()
        self._reason = ""
        self._spoken = False
        self._audio_format = audio_format
        self._found: _Extras | None = None
        self._so_far: list[str] = []
        self._silent = 0
        self._ragged = False
        self._halves: dict[type[Text | Reasoning | Refusal] | int, str] = {}
        self._failure: NotecaseError | None = None
        self._broken: bytes | None = None
        """The words that cut the reply; empty where half a chunk did."""
        self._remark = b""
        """What was said besides the reply."""
        self.done = False
        """Nothing that follows matters: the server said that this was all, or the reply has failed."""
        self.heard = False
        """The bytes fed last held something of the reply, if only for a later piece."""

    def feed(self, chunk: bytes) -> list[Piece]:
        """Returns the pieces that `chunk` completes, in order. A failure is raised by `end`, so that the pieces before
        it do not depend on how the bytes were cut."""
        pieces: list[Piece] = []
        self.heard = False
        try:
            self._feed(chunk, pieces)
        except NotecaseError as failure:
            self._fail(failure)
        except UNREADABLE:
            self._fail(documents.malformed())
        self.heard = self.heard or bool(pieces)
        if self._counts.changed and not self.done:
            self._counts.changed = False
            pieces.append(Used(self._counts.usage(self._model)))
        return pieces

    def end(self, cut: NotecaseError | None = None) -> list[Piece]:
        """Returns the last pieces, Finish being the very last. `cut` is raised if the connection broke before the reply
        was complete. Raises the error that an error within the answer means; MODEL_UNAVAILABLE when the reply is not
        complete, was cut by a failure or is empty; MODEL_ERROR when it is not a reply, or is empty for a reason that a
        repeat would meet again; CONTENT_UNSUPPORTED when it has only images of an unknown shape."""
        pieces: list[Piece] = []
        try:
            if self._failure is None:
                if not self.done or self._document is not None:
                    self._rest(pieces)
                self._judge(pieces, cut)
        except NotecaseError as failure:
            self._fail(failure)
        except UNREADABLE:
            self._fail(documents.malformed())
        if self._failure is not None:
            raise self._failure
        return pieces

    def _fail(self, failure: NotecaseError) -> None:
        self._failure = failure
        self.done = True
        if (used := self._counts.usage(self._model)).input_tokens or used.output_tokens:
            failure.usage = used

    def _feed(self, chunk: bytes, pieces: list[Piece]) -> None:
        if not self._begun:
            self._head += chunk
            if not self._begin():
                self._bound_silence(len(chunk))
                return
            chunk, self._head = self._head, b""
        if self._document is not None:
            self._document += chunk
            if len(self._document) > MAX_EVENT_BYTES:
                raise too_large(MAX_EVENT_BYTES)
            return
        size = len(chunk)
        if self._in_text and size >= _MANY_BYTES and not self._halves:
            chunk = self._take_tokens(chunk, pieces)
        for data, name in self._events.feed(chunk) if chunk else ():
            if self._in_text and not name and self._take_token(data, pieces):
                continue
            if data.startswith(b"[DONE]"):
                self.done = True
                return
            try:
                self._take(data, name, pieces)
            except documents.NotJsonError:
                self._take_words(data, name, pieces)
                if self.done:
                    return
        if pieces or self.heard:
            self._silent = 0
        else:
            self._bound_silence(size)

    def _bound_silence(self, size: int) -> None:
        self._silent += size
        if self._silent > MAX_SILENT_BYTES:
            raise errors.model_error(
                f"The model provider sent {MAX_SILENT_BYTES} bytes without any part of a reply.",
                limit=MAX_SILENT_BYTES,
            )

    def _begin(self) -> bool:
        """Looks at the first byte: what a server calls its answer's media type says less than what it is."""
        if len(self._head) < len(_BOM) and _BOM.startswith(self._head):
            return False
        first = self._head.removeprefix(_BOM).lstrip()[:1]
        self._begun = bool(first)
        if first in {b"{", b"["}:
            self._document = bytearray()
        elif first == b"<":
            raise errors.model_error(
                "The model provider answered with a web page in place of a reply; its base URL may be wrong."
            )
        return self._begun

    def _rest(self, pieces: list[Piece]) -> None:
        """Takes what the end of the answer completes. What is cut within a document is none."""
        if self._document is not None:
            whole = bytes(self._document).removeprefix(_BOM)
            try:
                self._take_plain(documents.plain(whole), False, pieces)
                self.done = True
                return
            except documents.NotJsonError:
                rest = documents_of(whole)
        else:
            rest = self._events.end()
        for data, name in rest:
            if data.startswith(b"[DONE]"):
                self.done = True
                break
            try:
                self._take(data, name, pieces)
            except documents.NotJsonError:
                if _is_json(data):
                    break
                self._take_words(data, name, pieces)

    def _take_tokens(self, chunk: bytes, pieces: list[Piece]) -> bytes:
        """Takes those events of a chunk that are text alone, if there are many, and returns what is left to be fed."""
        found, rest = self._events.plain(chunk, MAX_TEXT_BYTES)
        if not found:
            return rest
        tokens = documents.tokens(found)
        if tokens is None:
            return b"data: " + BETWEEN.join(found) + b"\n\n" + rest
        for token in tokens:
            if token.model != self._named:
                self._name(token.model)
        if text := "".join([token.choices[0].delta.content or "" for token in tokens]):
            self._take_text(text, pieces)
        self._in_text = not rest.endswith(LAST)
        return rest

    def _take_token(self, data: bytes, pieces: list[Piece]) -> bool:
        """Takes a chunk that is text alone, as `_take` would. Returns False for any other."""
        if len(data) > MAX_TEXT_BYTES:
            return False
        token = documents.token(data)
        if token is None:
            self._in_text = False
            self._misses += 1
            return False
        if token.model != self._named:
            self._name(token.model)
        if text := token.choices[0].delta.content:
            self._take_text(self._mended(Text, text) if self._halves else text, pieces)
        return True

    def _take(self, data: bytes, name: str, pieces: list[Piece]) -> None:
        chunk, ragged = documents.decode(data)
        self._ragged = self._ragged or ragged
        named = bool(name) and any(word in name.lower() for word in ("error", "exception", "fail"))
        if (
            chunk is not None
            and not chunk.choices
            and chunk.usage
            and not named
            and (counted := documents.counted(data)) is not None
        ):
            self._counts.take(counted.usage)
            if counted.model != self._named:
                self._name(counted.model)
            return
        if chunk is None or not chunk.choices or named or chunk.may_fail:
            self._take_plain(self._plain(data, named), named, pieces)
            return
        for choice in chunk.choices:
            if choice.may_fail:
                self._take_plain(documents.plain(data), False, pieces)
                return
        if chunk.usage or chunk.timings:
            self._counts.take(chunk.usage or chunk.timings)
        if chunk.x_groq:
            self._counts.take_all({"x_groq": chunk.x_groq})
        before = len(pieces)
        self._take_chunk(chunk, pieces)
        if len(data) > MAX_TEXT_BYTES:
            self._bound_text(pieces, before)

    def _take_words(self, data: bytes, name: str, pieces: list[Piece]) -> None:
        """Takes data that is not JSON. Comments that keep the connection open are ignored. A chunk that was cut on its
        way means that a part of the reply is lost. Other words count if the reply does not continue to its end, and
        those of a failure in any case."""
        text = data.strip(_AROUND_WORDS)
        if text.startswith(b"data:"):  # some proxies frame what is framed
            text = text[5:].lstrip()
            if _is_json(text):
                with suppress(documents.NotJsonError):
                    self._take(text, name, pieces)
                    return
        if text.upper() in _LAST:
            self.done = True
        elif _is_json(text):
            if (error := provider_errors.find(documents.last_line(text))) is not None:
                raise provider_errors.failure(None, provider_errors.told_by(error), self._asked, self._redactor)
            if not self._reason:
                self._broken = b""
        elif not _KEEPS_ALIVE.fullmatch(text[:TOLD_CHARS]):
            self._remark = text
            if _FAILS.search(text):
                self._broken = self._remark

    def _said_by(self, text: bytes) -> NotecaseError:
        told = provider_errors.told_by(text.decode("utf-8", "replace"))
        return provider_errors.failure(None, told, self._asked, self._redactor)

    def _plain(self, data: bytes, named: bool) -> Any:
        try:
            return documents.plain(data)
        except documents.NotJsonError:
            if named:
                return data.decode("utf-8", "replace")
            raise

    def _take_plain(self, value: Any, named: bool, pieces: list[Piece]) -> None:
        if not named and (value is None or isinstance(value, str | int | float)):
            raise documents.NotJsonError  # JSON, but none of a reply
        before = len(pieces)
        for document in provider_errors.documents_in(value):
            if (error := provider_errors.find(document, named=named)) is not None:
                told = provider_errors.told_by(error)
                self._counts.take_all(document)
                raise provider_errors.failure(None, told, self._asked, self._redactor)
            self._ragged = True
            chunk = documents.loose(document)
            self._counts.take_all(document)
            self._take_chunk(chunk, pieces)
        self._bound_text(pieces, before)

    def _bound_text(self, pieces: list[Piece], start: int) -> None:
        for piece in pieces[start:]:
            text = piece.arguments if isinstance(piece, Call) else getattr(piece, "text", "")
            if len(text) > MAX_TEXT_BYTES:
                del pieces[start:]
                raise too_large(MAX_TEXT_BYTES)

    def _take_chunk(self, chunk: Chunk, pieces: list[Piece]) -> None:
        if chunk.model != self._named:
            self._name(chunk.model)
        if chunk.citations or chunk.search_results:
            self._extras().citations.listed(chunk.citations, chunk.search_results)
        for choice in chunk.choices or ():
            # With `n` above 1 the further choices are other replies, and there is one.
            if choice.index and choice.index != "0":
                continue
            if choice.usage:
                self._counts.take(choice.usage)
            if choice.delta is not None:
                self._take_said(choice.delta, pieces)
            if choice.message is not None:
                self._take_message(choice, chunk.object, pieces)
            if choice.finish_reason and not is_none(choice.finish_reason):
                self._reason = choice.finish_reason

    def _name(self, model: Any) -> None:
        if model and isinstance(model, str):
            self._named = model
            self._model = self._redactor.name(model) or self._model

    def _take_message(self, choice: Choice, kind: Any, pieces: list[Piece]) -> None:
        """Takes of a message in an object of that kind what the pieces before it did not say. Some servers repeat the
        reply so at its end, some send all of it so far each time, and some call each delta a message."""
        message = choice.message
        assert message is not None
        if choice.delta is not None and (choice.delta.content or choice.delta.tool_calls):
            return
        message.content = _words(message)
        extras = self._extras()
        if isinstance(message.audio, dict):
            repeated = extras.audio and kind != "chat.completion.chunk"
            message.audio = None if repeated else message.audio | {"transcript": None}
        if self._so_far or extras.calls:
            said, content = "".join(self._so_far), message.content or ""
            repeated = kind == "chat.completion" or content.strip() == said.strip()
            if content.startswith(said):
                message.content, repeated = content[len(said) :], True
            elif repeated:
                message.content = None
            if repeated:
                message.reasoning_content = message.reasoning = message.refusal = None
                message.reasoning_details = None
            if extras.calls:
                message.tool_calls = message.function_call = None
        self._take_said(message, pieces)

    def _take_said(self, said: Said, pieces: list[Piece]) -> None:
        if said == Said(content=said.content):
            if said.content and (text := self._mended(Text, said.content)):
                self._in_text = self._misses < _MOST_MISSES
                self._take_text(text, pieces)
            return  # a token of text and nothing else, as nearly every piece is
        extras = self._extras()
        extras.data.message(said)
        # Some servers send two fields with the same text.
        thought = said.reasoning_content or said.reasoning
        if not thought:
            for other in (
                said.reasoning_text,
                said.thinking,
                said.thought,
                said.reasoning_details,
                said.thinking_blocks,
            ):
                if other and (thought := thought_of(other)):
                    break
        content = _words(said)
        if said.extra_content is not None and _is_thought(said.extra_content):
            thought, content = content, None
        if reasoning := self._mended(Reasoning, thought):
            self._interrupt(pieces)
            pieces.append(Reasoning(reasoning))
        if text := self._mended(Text, content):
            self._take_text(text, pieces)
        if said.refusal or said.images or said.image or said.tool_calls or said.function_call:
            self._interrupt(pieces)
        if refusal := self._mended(Refusal, said.refusal):
            pieces.append(Refusal(refusal))
            self._spoken = True
        if said.images or said.image:
            self._take_images(said, pieces)
        if isinstance(said.audio, dict) and extras.audio.take(said.audio):
            self.heard = True
        if said.annotations:
            extras.citations.annotated(said.annotations)
        before = None
        for piece in said.tool_calls or ():
            self._take_call(piece, pieces, before)
            before = piece
        # Gateways that know both forms send each call twice.
        if isinstance(said.function_call, dict) and (not extras.calls or extras.calls.has_number("function_call")):
            self._take_call(documents.call_piece(said.function_call, "function_call"), pieces)

    def _take_text(self, text: str, pieces: list[Piece]) -> None:
        self._so_far.append(text)
        if self._think is None or self._think.settled:
            pieces.append(Text(text))
        else:
            pieces += self._think.feed(text)

    def _interrupt(self, pieces: list[Piece]) -> None:
        if self._think is not None:
            pieces += self._think.interrupt()

    def _extras(self) -> _Extras:
        if self._found is None:
            self._found = _Extras(self._audio_format)
        return self._found

    def _take_images(self, said: Said, pieces: list[Piece]) -> None:
        extras = self._extras()
        for entry in media.entries(said.images, said.image):
            found = media.find(entry)
            if isinstance(found, Link) and not self._redactor.link(found.uri):
                found = None
            if isinstance(found, Encoded):
                found = self._typed(found)
            if found is None:
                extras.unread = True
            elif (digest := hash(found)) not in extras.images:
                extras.images.add(digest)
                pieces.append(found)
                self._spoken = True

    def _typed(self, found: Encoded) -> Encoded:
        """Content with a known media type."""
        return found._replace(media_type=self._redactor.name(found.media_type))

    def _cited(self, citations: Citations) -> list[Cited]:
        found = citations.all(self._redactor, self._think.skipped if self._think else 0)
        return [Cited(found)] if found else []

    def _returned(self, extras: _Extras) -> list[Returned]:
        """What goes back, without what holds the key, since callers can read it."""
        given = extras.calls.given()
        return [
            returned
            for returned in extras.data.all()
            if (returned.key is None or returned.key in given)
            and not self._redactor.is_echoed(returned.data.members + returned.data.call_id.encode())
        ]

    def _take_call(self, piece: CallPiece, pieces: list[Piece], before: CallPiece | None = None) -> None:
        if not piece.is_usual:
            piece = documents.usual(piece)
        extras = self._extras()
        call = extras.calls.take(piece, before)
        extras.data.call(call.key, piece)
        self.heard = True
        if call.tool or call.arguments:
            pieces.append(Call(call.key, mended(call.tool), self._mended(call.key, call.arguments)))

    def _judge(self, pieces: list[Piece], cut: NotecaseError | None) -> None:
        """Adds the text that was held back, and the end of the reply. Raises the error of an answer that is not a
        reply."""
        if self._think is not None:
            pieces += self._think.end()
            self._spoken = self._spoken or self._think.begun
        else:
            self._spoken = self._spoken or any(map(str.strip, self._so_far))
        extras = self._found
        if extras is not None:
            pieces += [Call(call.key, "", self._mended(call.key, call.arguments)) for call in extras.calls.end()]
        for key in self._halves:
            pieces.append(Call(key, "", "\ufffd") if isinstance(key, int) else key("\ufffd"))
        if extras is not None and (clip := extras.audio.made()) is not None:
            pieces.append(self._typed(clip))
            self._spoken = True
        called = extras is not None and bool(extras.calls)
        end = meaning(self._reason) if self._reason else (End.CALLS if called else End.WHOLE)
        word = _WORDS.get(end, "stop")
        if self._reason != word:
            word = self._redactor.reason(mended(self._reason)) or word
        if self._broken is not None:
            raise self._said_by(self._broken) if self._broken else errors.model_unavailable(_UNREAD)
        if not self._reason and self._remark:
            raise self._said_by(self._remark)
        if not (self._reason or self.done or (extras is not None and extras.audio.whole)):
            if cut is None and self._events.stray:
                raise self._said_by(self._events.stray)
            raise cut or errors.model_unavailable("The model provider ended its answer before the reply was complete.")
        if end is End.FAILED:
            raise errors.model_unavailable(
                f"The model provider cut the reply because of a failure (finish reason {word!r}).", finish_reason=word
            )
        if end is End.AGAIN:
            failed = errors.model_error(
                f"The model provider could not read a call that the model wrote (finish reason {word!r}).",
                finish_reason=word,
            )
            failed.repeats = 1
            raise failed
        if not called and not self._spoken:
            self._judge_empty(end, word)
        if extras is not None:
            pieces += [*self._cited(extras.citations), *self._returned(extras)]
        pieces.append(Finish(word, self._counts.usage(self._model), is_cut(end)))

    def _judge_empty(self, end: End, word: str) -> None:
        """Raises the error of an empty reply, unless the request ended with the outcomes of calls and the model says
        that it is done."""
        told = f"(finish reason {word!r})" if self._reason else "(no finish reason)"
        match end:
            case End.TOO_LONG:
                raise errors.model_error(
                    f"The conversation is too long for the model {self._asked!r} {told}.",
                    code="context_length_exceeded",
                    finish_reason=word,
                )
            case End.LIMIT:
                raise errors.model_error(
                    f"The model reached its token limit before it wrote any text {told}.", finish_reason=word
                )
            case End.FILTERED:
                raise errors.model_error(f"The model provider withheld the reply {told}.", finish_reason=word)
        if self._found is not None and self._found.unread:
            raise errors.content_unsupported("The model answered only with an image that cannot be read.")
        if not (self._behind_calls and end is End.WHOLE and self._reason):
            raise errors.model_unavailable(
                f"The model provider ended its answer without a reply {told}.", finish_reason=word
            )

    def _mended(self, key: type[Text | Reasoning | Refusal] | int, text: str | None) -> str:
        """`text` in valid Unicode: the halves of a surrogate pair that two pieces share are joined, a half that stays
        alone becomes U+FFFD. `key` says which pieces belong together."""
        if not text or not (self._ragged or self._halves):
            return text or ""
        text = self._halves.pop(key, "") + text
        if "\ud800" <= text[-1] <= "\udbff":
            self._halves[key] = text[-1]
            text = text[:-1]
        return mended(text)


def _is_json(data: bytes) -> bool:
    return data.startswith((b"{", b"[{"))


def _words(said: Said) -> str | None:
    """What is said in text, or else in sound."""
    if said.content or not isinstance(said.audio, dict):
        return said.content
    transcript = said.audio.get("transcript")
    return transcript if isinstance(transcript, str) else said.content


def _is_thought(extra: Any) -> bool:
    """Whether Gemini's compatible endpoint marks the content as a thought."""
    google = extra.get("google") if isinstance(extra, dict) else None
    return isinstance(google, dict) and google.get("thought") is True
