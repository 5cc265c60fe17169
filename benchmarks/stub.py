"""A model that costs almost nothing: an OpenAI-compatible endpoint whose answers are prepared bytes.

The model's name says how it answers: `tokens-200` writes 200 tokens as fast as the connection takes them,
`tokens-200-every-10` one every 10 ms. `calls-20` first calls the tool `look`, and writes 20 tokens once it has the
result. Each token is a separate event, HTTP chunk and write, as providers send them. Run as a module it prints its port
and serves until it is terminated.
"""

import asyncio
import functools
import json
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple, cast

import uvloop

TOKEN = " violin"

TOOL = "look"
"""The tool that is called."""

_MODEL = re.compile(rb'"model": ?"(tokens|calls)-(\d+)(?:-every-(\d+))?"')
_LENGTH = re.compile(rb"\r\ncontent-length: ?(\d+)", re.IGNORECASE)

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
_REFUSED = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Answer(NamedTuple):
    """What is written, and how many seconds lie between two tokens."""

    first: bytes
    """The headers and the event that only names the role."""
    token: bytes
    tokens: int
    last: bytes
    """The finish reason, the usage and the end of the body."""
    pause: float


def model(tokens: int, pause_ms: int = 0) -> str:
    """The name of the model that answers so."""
    return f"tokens-{tokens}-every-{pause_ms}" if pause_ms else f"tokens-{tokens}"


@functools.cache
def _answer(tokens: int, pause_ms: int) -> Answer:
    return Answer(
        first=_HEAD + _event(_choice({"role": "assistant", "content": "", "refusal": None})),
        token=_event(_choice({"content": TOKEN})),
        tokens=tokens,
        last=_last("stop", tokens),
        pause=pause_ms / 1000,
    )


@functools.cache
def _call() -> Answer:
    function = {"name": TOOL, "arguments": '{"at":"the harbour"}'}
    return Answer(
        first=_HEAD + _event(_choice({"role": "assistant", "content": None, "refusal": None})),
        token=_event(_choice({"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]})),
        tokens=1,
        last=_last("tool_calls", 10),
        pause=0.0,
    )


def _last(finish: str, tokens: int) -> bytes:
    usage = {"prompt_tokens": 100, "completion_tokens": tokens, "total_tokens": 100 + tokens}
    end = (_event(_choice({}, finish)), _event(choices=[], usage=usage), _chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n")
    return b"".join(end)


def _choice(delta: dict[str, object], finish: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}], "usage": None}


def _event(choice: dict[str, object] | None = None, **members: object) -> bytes:
    """One event with every member that OpenAI sends, as an HTTP chunk."""
    made = {
        "id": "chatcmpl-C9FzJ8eHn0q3VhYkT2dWmXbLpRs41",
        "object": "chat.completion.chunk",
        "created": 1761955200,
        "model": "gpt-4.1-mini-2025-04-14",
        "service_tier": "default",
        "system_fingerprint": "fp_6f2eabb9a5",
    }
    return _chunk(b"data: %s\n\n" % json.dumps(made | (choice or {}) | members, separators=(",", ":")).encode())


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Connection(asyncio.Protocol):
    """One connection; its requests come one after the other."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._loop = asyncio.get_running_loop()
        self._next: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._next is not None:
            self._next.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        if head < 0:
            return
        length = _LENGTH.search(self._received, 0, head)
        end = head + 4 + (int(length[1]) if length else 0)
        if len(self._received) < end:
            return
        asked = _MODEL.search(self._received, head, end)
        body = bytes(self._received[head + 4 : end]) if asked and asked[1] == b"calls" else b""
        self._received = self._received[end:]
        if asked is None:
            self._transport.write(_REFUSED)
            self._transport.close()
            return
        if body and json.loads(body)["messages"][-1]["role"] != "tool":
            answer = _call()
        else:
            answer = _answer(int(asked[2]), int(asked[3] or 0))
        self._transport.write(answer.first)
        self._write(answer, iter(range(1, answer.tokens + 1)), self._loop.time())

    def _write(self, answer: Answer, numbers: Iterator[int], begun: float) -> None:
        """Writes one token and comes back for the next in a later step of the loop, so that connections take turns."""
        number = next(numbers, None)
        if number is None:
            self._next = None
            self._transport.write(answer.last)
            return
        self._transport.write(answer.token)
        again = functools.partial(self._write, answer, numbers, begun)
        # Counted from the beginning, so that what is late does not delay what follows.
        at = begun + number * answer.pause
        self._next = self._loop.call_at(at, again) if answer.pause else self._loop.call_soon(again)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
    sys.stdout.write(f"listening on port {server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve())
