"""Writes parts of messages as Chat Completions has them (words, images, audio, documents), and loads their content."""

import asyncio
import mimetypes
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from functools import partial

from notecase import v1

from notecase_server import errors
from notecase_server.models.contract import ModelRequest, is_text, looked_at
from notecase_server.models.pieces import Base64
from notecase_server.models.profiles import Profile
from notecase_server.models.request_tools import Json

MAX_CONTENT_BYTES = 32 << 20
"""Bytes of all content in one request, before it grows by a third as base64: providers take 50 MB, and each call holds
it in memory."""

_AUDIO_FORMATS = {
    **dict.fromkeys(("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave"), "wav"),
    **dict.fromkeys(("audio/mpeg", "audio/mp3"), "mp3"),
}


async def loaded(request: ModelRequest, profile: Profile) -> ModelRequest:
    """Returns the request with the content that its messages refer to within them, as far as it is shown.

    What has no place there, and the oldest content when there is more than a request may carry, stays as it is, and
    `body` names it. Raises CONTENT_UNSUPPORTED only where the newest messages of a user, which one run began with, have
    such content or too much of it, before any is read."""
    if request.texts is not None:
        return request
    messages, look = request.messages, partial(_look, request.messages, profile)
    newest, chosen = await looked_at(messages, request.size, look)
    if chosen is None:
        return request
    assert request.load is not None, "who refers to content brings the means to load it"
    filled = list(messages)
    for index, places in sorted(chosen.items()):
        filled[index] = deepcopy(messages[index])
        for place, part in enumerate(_carried(filled[index], index == newest)):
            if place not in places:
                continue
            media_type, filename = part.blob.media_type, part.blob.filename
            data = await request.load(part.blob)
            part.data.media_type, part.data.filename = media_type, filename
            await asyncio.to_thread(setattr, part.data, "data", data)
    return request._replace(messages=filled)


def _look(messages: Sequence[v1.Message], profile: Profile) -> tuple[int, dict[int, set[int]] | None]:
    """Returns the results of `newest_images` and `_chosen`; None in place of the latter if there is no content."""
    newest = newest_images(messages, profile)
    if not any(any(_carried(message, index == newest)) for index, message in enumerate(messages)):
        return newest, None
    return newest, _chosen(messages, newest)


def _chosen(messages: Sequence[v1.Message], newest: int) -> dict[int, set[int]]:
    """Returns the content that a request has room for, by message: places in what `_carried` yields. The newest
    messages of a user come first, then the others from the newest on."""
    asked = {index: [part.blob for part in _carried(messages[index], False)] for index in newest_of_user(messages)}
    held = [blob for blobs in asked.values() for blob in blobs]
    for blob in held:
        _check_media_type(blob.media_type)
    if (total := sum(blob.size_bytes for blob in held)) > MAX_CONTENT_BYTES:
        raise errors.content_unsupported(
            f"The run's messages refer to {total} bytes of content; the model accepts at most {MAX_CONTENT_BYTES}."
        )
    room = MAX_CONTENT_BYTES - total
    chosen = {index: set(range(len(blobs))) for index, blobs in asked.items() if blobs}
    for index in range(len(messages) - 1, -1, -1):
        if index in asked:
            continue
        for place, part in reversed([*enumerate(_carried(messages[index], index == newest))]):
            if not _is_taken(part.blob.media_type):
                continue
            room -= part.blob.size_bytes
            if room < 0:
                return chosen
            chosen.setdefault(index, set()).add(place)
    return chosen


def newest_of_user(messages: Sequence[v1.Message]) -> list[int]:
    """Returns the indices of the newest message of a user and of those before it that the same run began with. One that
    a run without a reply began with is not among them: what cannot be shown of it would fail each later run."""
    found: list[int] = []
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if message.role == v1.Message.ROLE_USER and (not found or message.run == messages[found[0]].run):
            found.append(index)
        elif found and message.role != v1.Message.ROLE_SYSTEM:
            break
    return found


def in_names(messages: Sequence[v1.Message]) -> list[v1.Message] | None:
    """Returns the messages with content that is not text replaced by its name, for a model that takes only text; the
    newest ones of a user keep theirs. Returns None where that changes nothing."""
    asked = set(newest_of_user(messages))
    made = [message if index in asked else _all_in_words(message) for index, message in enumerate(messages)]
    return None if all(new is old for new, old in zip(made, messages, strict=True)) else made


def _all_in_words(message: v1.Message) -> v1.Message:
    if not any(map(_is_media, _parts(message))):
        return message
    made = v1.Message()
    made.CopyFrom(message)
    for part in _parts(made):
        if _is_media(part):
            part.text = _named(part)
    return made


def _parts(message: v1.Message) -> Iterator[v1.Part]:
    """Yields the parts of a message and of the results in it."""
    for part in message.parts:
        yield part
        yield from part.tool_call.result


def _is_media(part: v1.Part) -> bool:
    return part.WhichOneof("kind") in {"blob", "data", "file"} and not is_text(
        part.blob.media_type or part.data.media_type
    )


def newest_images(messages: Sequence[v1.Message], profile: Profile) -> int:
    """Returns the index of the newest reply with images, if such are shown; -1 for none."""
    if profile.made_images == "words":
        return -1
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if message.role == v1.Message.ROLE_ASSISTANT and not is_one_text(message) and any(map(is_image, message.parts)):
            return index
    return -1


def _carried(message: v1.Message, images: bool) -> Iterator[v1.Part]:
    """Yields the parts whose content a request carries. Of what a model made that is text alone, unless its `images`
    are shown."""
    if is_one_text(message):
        return
    reply = message.role == v1.Message.ROLE_ASSISTANT
    for part in message.parts:
        if part.HasField("blob") and (not reply or is_text(part.blob.media_type) or (images and is_image(part))):
            yield part
        yield from (inner for inner in part.tool_call.result if inner.HasField("blob"))


def is_one_text(message: v1.Message) -> bool:
    """Whether a message is one text and nothing else, as nearly every one is."""
    parts = message.parts
    return len(parts) == 1 and bool(parts[0].text)


def is_image(part: v1.Part) -> bool:
    """Whether a part is an image, here or elsewhere."""
    return _media_type(part.blob.media_type or part.data.media_type or part.file.media_type).startswith("image/")


def content_of(part: v1.Part, named: bool = False) -> Json | None:
    """Returns a part of a user's message; None when it is empty or blank. What has no place there is `named`, or
    else refused with CONTENT_UNSUPPORTED."""
    if (words := in_words(part) if named else _words(part)) is not None:
        return {"type": "text", "text": words} if words and not words.isspace() else None
    match part.WhichOneof("kind"):
        case "file":
            if not is_image(part):
                raise errors.content_unsupported(
                    f"The model accepts only images by URI, not media type {part.file.media_type!r}; send the data."
                )
            return {"type": "image_url", "image_url": {"url": part.file.uri}}
        case "data":
            return _data(part.data)
        case kind:
            raise errors.content_unsupported(
                f"A user's message contains a part of kind {kind!r}, which only models can write."
            )


def _data(data: v1.InlineData) -> Json:
    _check_media_type(data.media_type)
    media_type = _media_type(data.media_type)
    if audio_format := _AUDIO_FORMATS.get(media_type):
        return {"type": "input_audio", "input_audio": {"data": Base64("", data.data), "format": audio_format}}
    url = Base64(f"data:{media_type};base64,", data.data)
    if media_type.startswith("image/"):
        return {"type": "image_url", "image_url": {"url": url}}
    # Providers want a name, and go by its ending.
    name = data.filename or f"file{mimetypes.guess_extension(media_type) or ''}"
    return {"type": "file", "file": {"filename": name, "file_data": url}}


def system_text(parts: Iterable[v1.Part]) -> str:
    """Returns the text of a system message. Raises CONTENT_UNSUPPORTED for what cannot be said in words."""
    texts = []
    for part in parts:
        words = _named(part) if part.HasField("blob") else _words(part)
        if words is None:
            media_type = part.data.media_type or part.file.media_type
            held = f"media type {media_type!r}" if media_type else f"a part of kind {part.WhichOneof('kind')!r}"
            raise errors.content_unsupported(f"A system message contains {held}; the model accepts only text there.")
        texts.append(words)
    return "".join(texts)


def reply_text(parts: Sequence[v1.Part], named: bool) -> str:
    """Returns a reply in words, since an assistant's message can be nothing else. What was made there is `named`; sound
    is not, where words say what it says."""
    spoken = any(_words(part) for part in parts)
    texts = []
    for part in parts:
        if (words := _words(part)) is not None:
            texts.append(words)
        elif named or is_text(part.blob.media_type):
            label = _label(part)
            texts.append("" if spoken and label.startswith("audio/") else f"\n[{label}]\n")
    text = "".join(texts)
    return text if len(parts) == 1 and spoken else text.strip("\n")


def outcome(call: v1.ToolCall) -> str:
    """Returns the result of a call as text, or its error."""
    if call.outcome == v1.ToolCall.OUTCOME_CANCELLED:
        return call.error or "cancelled"
    words = [in_words(part) for part in call.result]
    return "".join(filter(None, words)) or call.error or ("Its content follows." if None in words else "")


def _words(part: v1.Part) -> str | None:
    """Returns what of a part can be said in words; None for what cannot."""
    match part.WhichOneof("kind"):
        case "text":
            return part.text
        case "json":
            return part.json
        case "data" if is_text(part.data.media_type):
            text = part.data.data.decode(errors="replace")
            # No provider takes a text file as a file; all of them read text.
            return f"{part.data.filename}:\n{text}" if part.data.filename else text
    return None


def in_words(part: v1.Part) -> str | None:
    """As `_words`; of what is not sent or cannot be, its name."""
    if (words := _words(part)) is not None:
        return words
    sent = _is_taken(part.data.media_type) if part.HasField("data") else part.HasField("file") and is_image(part)
    return None if sent else _named(part)


def _named(part: v1.Part) -> str:
    return f"[{_label(part)}, not shown]"


def _label(part: v1.Part) -> str:
    """Returns the media type of a part, or else its kind, and the name of its file."""
    kind = part.WhichOneof("kind") or "text"
    content = getattr(part, kind)
    filename = getattr(content, "filename", "")
    return f"{getattr(content, 'media_type', '') or kind}{filename and ': '}{filename}"


def _check_media_type(given: str) -> None:
    if not _is_taken(given):
        raise errors.content_unsupported(
            f"The model accepts text, images, documents and audio as WAV or MP3, not media type {given!r}."
        )


def _is_taken(given: str) -> bool:
    media_type = _media_type(given)
    return media_type.startswith(("image/", "application/", "text/")) or media_type in _AUDIO_FORMATS


def _media_type(given: str) -> str:
    """Returns a media type without parameters, in lower case."""
    return given.partition(";")[0].strip().lower()
