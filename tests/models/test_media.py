"""What a model makes besides words, from a server over a real socket: decoded off the loop, bounded, never fetched."""

import base64
import binascii
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.models.answers import media
from notecase_server.models.answers.event_stream import MAX_EVENT_BYTES
from notecase_server.models.answers.redaction import Redactor
from notecase_server.models.chat_stream import MAX_SILENT_BYTES, ChatReply
from notecase_server.models.contract import Cited, Delta, Link, Media, ModelRequest, Source, Text
from notecase_server.models.openai import OpenAIProvider

from tests.support.openai_server import Answer, OpenAIServer, chunk, reply, stream

KEY = "test-Secret.0123/456+789=="
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer() as started:
        yield started


@pytest.fixture
async def provider(server: OpenAIServer) -> AsyncIterator[OpenAIProvider]:
    made = OpenAIProvider(KEY, server.url, "default-model")
    yield made
    await made.close()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def image(data: bytes, **members: Any) -> bytes:
    return chunk({"images": [{"image_url": {"url": f"data:image/png;base64,{b64(data)}"}}], **members})


async def pieces_of(provider: OpenAIProvider, **extra: Any) -> list[Delta]:
    generation = v1.Generation(extra=json.dumps(extra) if extra else "")
    asked = v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text="Hello")])
    return [piece async for piece in provider.stream(ModelRequest("", "", [asked], generation))]


async def failure(provider: OpenAIProvider) -> NotecaseError:
    with pytest.raises(NotecaseError) as caught:
        await pieces_of(provider)
    return caught.value


async def test_an_image_of_megabytes_is_decoded_off_the_loop_and_in_pieces(
    server: OpenAIServer, provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, decoded = binascii.a2b_base64, list[tuple[int, bool]]()

    def noted(text: bytes, *, strict_mode: bool) -> bytes:
        decoded.append((len(text), threading.current_thread() is threading.main_thread()))
        return decode(text, strict_mode=strict_mode)

    monkeypatch.setattr(binascii, "a2b_base64", noted)
    large = PNG * (4 << 12)
    server.script(stream(image(large, content="Here:")))
    (made,) = [piece for piece in await pieces_of(provider) if isinstance(piece, Media)]
    assert Media(large, "image/png", "image-1.png") == made
    assert len(b64(large)) == sum(size for size, _ in decoded)
    assert {(True, False)} == {(size <= media.STEP_CHARS, on_loop) for size, on_loop in decoded}


async def test_content_has_a_name_and_is_where_it_came(server: OpenAIServer, provider: OpenAIProvider) -> None:
    """But for sound, which is whole at the end only."""
    sound = chunk({"audio": {"data": b64(b"OggS")}})
    server.script(stream(sound, image(PNG + b"1"), chunk({"content": "and"}), image(PNG + b"2")))
    pieces = await pieces_of(provider)
    told = [
        piece.filename if isinstance(piece, Media) else piece.text
        for piece in pieces
        if isinstance(piece, Media | Text)
    ]
    assert ["image-1.png", "and", "image-2.png", "audio-3.ogg"] == told


@pytest.mark.parametrize(
    ("asked", "data", "media_type"),
    [
        ("mp3", b"??", "audio/mpeg"),
        ("opus", b"??", "audio/ogg"),
        ("pcm16", b"??", "audio/wav"),
        ("wav", b"RIFF\0\0\0\0WAVE", "audio/wav"),
        ("pcm16", b"RIFF\0\0\0\0WAVE", "audio/wav"),
        (None, b"fLaC", "audio/flac"),
        (None, b"??", "audio/wav"),
        ({}, b"??", "audio/wav"),
    ],
)
async def test_sound_has_the_requested_format(
    server: OpenAIServer, provider: OpenAIProvider, asked: Any, data: bytes, media_type: str
) -> None:
    """Unless it says another itself. Samples alone become a file."""
    server.script(stream(chunk({"audio": {"data": b64(data)}})))
    extra = {} if asked is None else {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": asked}}
    (made,) = [piece for piece in await pieces_of(provider, **extra) if isinstance(piece, Media)]
    assert media_type == made.media_type
    assert made.data.endswith(data)
    assert made.data.startswith(b"RIFF" if media_type == "audio/wav" else data)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            stream(chunk({"images": ["data:image/png;base64,AAAAA"]})),
            "The model provider sent an image that is not base64.",
        ),
        (
            stream(chunk({"images": ["data:image/png;base64,AA*A"]})),
            "The model provider sent an image that is not base64.",
        ),
        (stream(chunk({"audio": {"data": "AAAé"}})), "The model provider sent an audio that is not base64."),
        (
            stream(chunk({"images": ["data:image/png;base64," + "A" * MAX_EVENT_BYTES]})),
            f"The model provider sent more than {MAX_EVENT_BYTES} bytes at once; that is no part of a reply.",
        ),
    ],
    ids=["too short", "a star", "beyond ASCII", "too large"],
)
async def test_invalid_content_is_one_typed_failure(
    server: OpenAIServer, provider: OpenAIProvider, answer: Answer, words: str
) -> None:
    server.script(answer)
    failed = await failure(provider)
    assert (v1.ERROR_REASON_MODEL_ERROR, words) == (failed.reason, failed.message)


async def test_sound_is_bounded_by_its_bytes_and_by_its_pieces(
    server: OpenAIServer, provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "MAX_MEDIA_BYTES", 3000)
    for pieces in (["A" * 3000, "A" * 2000], ["A"] * 200):
        server.script(stream(*(chunk({"audio": {"data": piece}}) for piece in pieces)))
        failed = await failure(provider)
        assert (v1.ERROR_REASON_MODEL_ERROR, "3000") == (failed.reason, failed.metadata["limit"])
    server.script(stream(chunk({"audio": {"data": "A" * 3800}})))
    assert any(isinstance(piece, Media) for piece in await pieces_of(provider))


def test_sound_does_not_count_as_silence() -> None:
    """However much of it comes before a word does; what only names it is."""
    reply = ChatReply("asked", Redactor(""))
    data = chunk({"audio": {"data": "A" * (1 << 20)}})
    for _ in range(MAX_SILENT_BYTES // len(data) + 2):
        assert [] == reply.feed(data)
        assert reply.heard
    assert [] == reply.feed(chunk({"audio": {"id": "x", "expires_at": 1}}))
    assert not reply.heard
    assert not reply.done


async def test_an_image_elsewhere_is_named_and_not_fetched(server: OpenAIServer, provider: OpenAIProvider) -> None:
    url = f"{server.url}/a.png"
    server.script(stream(chunk({"content": "Here:", "images": [{"image_url": {"url": url}}]})))
    assert Link(url, "image/png") in await pieces_of(provider)
    assert 1 == len(server.received)


@pytest.mark.parametrize(
    "url",
    [
        f"https://images.example/a?key={KEY}",
        "https://images.example/a?key=test-Secret.0123%2F456%2B789%3D%3D",
        f"https://images.example/{b64(KEY.encode())}",
        "https://images.example/" + "a" * 2048,
        "https://images.example/a b",
        "https://images.example/\u202ea",
    ],
)
async def test_an_address_that_may_not_be_shown_is_left_out(
    server: OpenAIServer, provider: OpenAIProvider, url: str
) -> None:
    annotation = {"type": "url_citation", "url_citation": {"url": url, "title": "A"}}
    server.script(stream(chunk({"images": [url]})), stream(chunk({"content": "Hi", "annotations": [annotation]})))
    assert v1.ERROR_REASON_CONTENT_UNSUPPORTED == (await failure(provider)).reason
    assert not [piece for piece in await pieces_of(provider) if isinstance(piece, Link | Cited)]


async def test_sources_are_few_and_their_titles_short_and_without_the_key(
    server: OpenAIServer, provider: OpenAIProvider
) -> None:
    results = [{"url": f"https://{number}.example", "title": "a" * 999} for number in range(60)]
    results[0]["title"] = f"It is {KEY.upper()}."
    server.script(stream(chunk({"content": "Hi"}), chunk(search_results=results)))
    (cited,) = [piece for piece in await pieces_of(provider) if isinstance(piece, Cited)]
    assert 50 == len(cited.sources)
    assert Source("https://0.example", "It is [key].") == cited.sources[0]
    assert {300} == {len(source.title) for source in cited.sources[1:]}
    long = [f"https://{number}.example/{'a' * 1000}" for number in range(60)]
    server.script(stream(chunk({"content": "Hi"}), chunk(citations=long)))
    (cited,) = [piece for piece in await pieces_of(provider) if isinstance(piece, Cited)]
    assert long[:16] == [source.uri for source in cited.sources]


@given(st.binary(max_size=60), st.lists(st.integers(0, 100), max_size=8))
def test_base64_is_decoded_however_it_was_cut(data: bytes, at: list[int]) -> None:
    """Cut as text, and encoded piece by piece."""
    text = b64(data)
    ends = [*sorted({offset for offset in at if offset < len(text)}), len(text)]
    cut = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    places = [*sorted({offset for offset in at if offset < len(data)}), len(data)]
    encoded = [b64(data[start:end]) for start, end in zip([0, *places], places, strict=False)]
    for pieces in (cut, encoded):
        assert data == media.decoded(media.Encoded(pieces, "image", "image/png"), 1).data


async def test_a_conversation_with_images_goes_on(server: OpenAIServer, provider: OpenAIProvider) -> None:
    """Content that is not shown is not loaded, and images that there is no room for are left out."""
    loaded = list[str]()

    async def load(blob: v1.Blob) -> bytes:
        loaded.append(blob.name)
        return b"png"

    def asked(model: str, size: int) -> ModelRequest:
        blobs = [v1.Blob(name=f"blobs/{kind}", media_type=kind, size_bytes=size) for kind in ("image/png", "audio/ogg")]
        given = v1.Blob(name="blobs/given", media_type="image/png", size_bytes=1 << 20)
        made = [v1.Part(text="Here:"), *(v1.Part(blob=blob) for blob in blobs)]
        user = v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text="More"), v1.Part(blob=given)])
        messages = [v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=made), user]
        return ModelRequest(model, "", messages, v1.Generation(), load=load)

    for model, size, expected in (
        ("m", 40 << 20, ["blobs/given"]),
        ("some-image-model", 1 << 20, ["blobs/image/png", "blobs/given"]),
        ("some-image-model", 40 << 20, ["blobs/given"]),
    ):
        server.script(reply("Hi"))
        loaded.clear()
        assert [piece async for piece in provider.stream(asked(model, size))]
        assert expected == loaded
