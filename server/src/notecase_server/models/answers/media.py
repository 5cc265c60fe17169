"""Finds the images and the audio that a model made, in whatever members a server puts them, and decodes their base64.

Content comes as text within JSON. Finding it is cheap and is done where the answer is read; decoding megabytes is not,
and is left to the caller.
"""

import binascii
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from notecase_server import errors
from notecase_server.models.contract import MAX_MEDIA_BYTES, Link, Media

STEP_CHARS = 1 << 20
"""Base64 decoded at once, which takes about 3 ms: another thread has its turn in between."""

_PIECE_BYTES = 64
"""What a piece costs besides its characters, so that many small ones are bounded too."""

_PCM_RATE = 24_000
"""Of audio without a head: samples of 16 bits a second, little-endian, one channel, as OpenAI documents `pcm16`."""


class Place(NamedTuple):
    """A place of an image within an entry that holds one."""

    path: tuple[str, ...]
    source: str


PLACES = (
    Place(("image_url", "url"), "OpenRouter, LiteLLM, Vercel's gateway: as requests have it"),
    Place(("image_url",), "OpenAI's Responses through gateways: output_image"),
    Place(("inline_data", "data"), "Gemini gateways"),
    Place(("inlineData", "data"), "Gemini's own spelling"),
    Place(("source", "data"), "Anthropic gateways"),
    Place(("source", "url"), "Anthropic gateways"),
    Place(("url",), "LiteLLM before 1.77: `image`"),
    Place(("b64_json",), "MiXaiLL76/auto_ai_router#66: as image endpoints have it"),
    Place(("result",), "OpenAI's Responses through gateways: image_generation_call"),
    Place(("data",), "gateways that pass on MCP's content"),
)

TYPES = (
    Place(("inline_data", "mime_type"), "Gemini gateways"),
    Place(("inlineData", "mimeType"), "Gemini's own spelling"),
    Place(("source", "media_type"), "Anthropic gateways"),
    Place(("mime_type",), "gateways"),
    Place(("mimeType",), "gateways that pass on MCP's content"),
)
"""Places of the media type if the image is not a data URL, which would name it."""


class Format(NamedTuple):
    """A kind of content, by its first bytes and its names."""

    begins: bytes
    media_type: str
    ending: str
    source: str
    name: str = ""
    """OpenAI's word for it in `audio.format`."""


FORMATS = (
    Format(b"\x89PNG", "image/png", ".png", "RFC 2083"),
    Format(b"\xff\xd8\xff", "image/jpeg", ".jpg", "ITU T.81"),
    Format(b"GIF8", "image/gif", ".gif", "GIF89a"),
    Format(b"RIFF....WEBP", "image/webp", ".webp", "RFC 9649"),
    Format(b"RIFF....WAVE", "audio/wav", ".wav", "platform.openai.com/docs/guides/audio", "wav"),
    Format(b"ID3", "audio/mpeg", ".mp3", "platform.openai.com/docs/guides/audio", "mp3"),
    Format(b"\xff\xfb", "audio/mpeg", ".mp3", "ISO 11172-3: without tags"),
    Format(b"fLaC", "audio/flac", ".flac", "platform.openai.com/docs/guides/audio", "flac"),
    Format(b"OggS", "audio/ogg", ".ogg", "platform.openai.com/docs/guides/audio", "opus"),
    Format(b"\xff\xf1", "audio/aac", ".aac", "platform.openai.com/docs/guides/audio", "aac"),
)
"""How content begins; "." is any byte."""

_MEDIA_TYPE = re.compile(r"(image|audio|video)/[a-z0-9][a-z0-9.+-]{0,63}")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{1,64}={0,2}")
_PADDING = re.compile(rb"=+")
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_SPACE = b" \t\r\n"


class Encoded(NamedTuple):
    """Content that is not decoded yet."""

    pieces: Sequence[str]
    """Its base64, in one piece or in several that may each be padded."""
    kind: str
    """"image" or "audio"."""
    media_type: str = ""
    """As the server says; empty where it does not, or says what cannot be."""
    name: str = ""
    """The word for its format that was asked for."""


def entries(*held: Any) -> Iterator[Any]:
    """The images of members that hold one, or a list of them."""
    for value in held:
        yield from value if isinstance(value, list) else [value] if value else ()


def find(entry: Any) -> Encoded | Link | None:
    """Returns the image that an entry holds; None for one of no known shape."""
    if isinstance(entry, str):
        entry = {"url": entry}
    if not isinstance(entry, dict):
        return None
    for place in PLACES:
        held = _at(entry, place.path)
        if not isinstance(held, str) or not held:
            continue
        if held.startswith("data:"):
            return _of_data_url(held, "image")
        if held.startswith(("http://", "https://")):
            return Link(held, _linked_type(held))
        if _BASE64.fullmatch(held[:64]):
            told = next((told for each in TYPES if isinstance(told := _at(entry, each.path), str)), "")
            return Encoded((held,), "image", _known(told))
    return None


def _at(entry: Any, path: Sequence[str]) -> Any:
    for name in path:
        entry = entry.get(name) if isinstance(entry, dict) else None
    return entry


def _known(media_type: str) -> str:
    plain = media_type[:100].partition(";")[0].strip().lower()
    return plain if _MEDIA_TYPE.fullmatch(plain) else ""


def _of_data_url(url: str, kind: str) -> Encoded | None:
    head, comma, _ = url[:300].partition(",")
    if not comma or not head.endswith(";base64"):
        return None
    return Encoded((url[len(head) + 1 :],), kind, _known(head.removeprefix("data:")))


def _linked_type(uri: str) -> str:
    path = re.split(r"[?#]", uri, maxsplit=1)[0].lower().replace(".jpeg", ".jpg")
    found = (each.media_type for each in FORMATS if path.endswith(each.ending) and each.media_type.startswith("image/"))
    return next(found, "image/*")


class Audio:
    """Puts the audio of one reply together."""

    def __init__(self, asked: str = "") -> None:
        """`asked` is the format that the request names."""
        self._asked = asked
        self._pieces: list[str] = []
        self._size = 0
        self.whole = False
        """The server has sent the expiry of the audio, which comes after the last piece."""

    def __bool__(self) -> bool:
        return self._size > 0

    def take(self, piece: dict[str, Any]) -> bool:
        """Takes what one delta or message says of it, and returns whether there was sound in it. Raises MODEL_ERROR for
        more than a reply may have."""
        data = piece.get("data")
        if heard := isinstance(data, str) and data != "":
            self._size += len(data) + _PIECE_BYTES
            if self._size > MAX_MEDIA_BYTES * 4 // 3 + 4:
                raise errors.model_error(
                    f"The model provider sent more than {MAX_MEDIA_BYTES} bytes of audio.", limit=MAX_MEDIA_BYTES
                )
            self._pieces.append(data)
        self.whole = bool(self._size and piece.get("expires_at"))
        return heard

    def made(self) -> Encoded | None:
        """Returns all of it; None where there is none."""
        if not self._pieces:
            return None
        if self._pieces[0].startswith("data:"):
            return _of_data_url("".join(self._pieces), "audio")
        return Encoded(self._pieces, "audio", name=self._asked)


def decoded(found: Encoded, number: int) -> Media:
    """Returns the content, the reply's `number`th. It may have megabytes: see STEP_CHARS. Raises MODEL_ERROR for what
    is not base64."""
    try:
        data = _bytes_of(found.pieces)
    except ValueError:
        raise errors.model_error(f"The model provider sent an {found.kind} that is not base64.") from None
    media_type = found.media_type or next((each.media_type for each in FORMATS if _begins(data, each.begins)), "")
    if not media_type and found.kind == "audio":
        named = (each.media_type for each in FORMATS if each.name and each.name == found.name)
        if not (media_type := next(named, "")):
            data, media_type = _wav(data), "audio/wav"
    media_type = media_type or "application/octet-stream"
    ending = next((each.ending for each in FORMATS if each.media_type == media_type), "")
    return Media(data, media_type, f"{found.kind}-{number}{ending}")


def _begins(data: bytes, begins: bytes) -> bool:
    if len(data) < len(begins):
        return False
    return all(expected in (byte, 0x2E) for byte, expected in zip(data, begins, strict=False))


def _bytes_of(pieces: Sequence[str]) -> bytes:
    """Decodes base64 that was cut anywhere, or encoded piece by piece: padding ends a whole, and what follows it begins
    another. Raises ValueError."""
    data, rest = bytearray(), b""
    for piece in pieces:
        for start in range(0, len(piece), STEP_CHARS):
            step = piece[start : start + STEP_CHARS].encode("ascii")
            *wholes, rest = _PADDING.split(rest + step.translate(_FROM_URL_SAFE, _SPACE))
            for whole in wholes:
                data += _decode(whole)
            end = len(rest) - len(rest) % 4
            data += _decode(rest[:end])
            rest = rest[end:]
    return bytes(data + _decode(rest))


def _decode(text: bytes) -> bytes:
    return binascii.a2b_base64(text + b"=" * (-len(text) % 4), strict_mode=True) if text else b""


def _wav(samples: bytes) -> bytes:
    """Samples without a head as a file that players and models take."""
    samples = samples[: len(samples) // 2 * 2]
    head = struct.pack(
        "<4sI8sIHHIIHH4sI",
        *(b"RIFF", 36 + len(samples), b"WAVEfmt ", 16),
        *(1, 1, _PCM_RATE, _PCM_RATE * 2, 2, 16),
        *(b"data", len(samples)),
    )
    return head + samples
