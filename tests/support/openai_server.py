"""An OpenAI-compatible server over a real socket, scripted to the byte: what a provider is shown and how it answers.

async with OpenAIServer() as server: server.script(reply("Good evening."), error(429, headers={"retry-after-ms": "1"}))
provider = OpenAIProvider("key", server.url, "model-1") ... assert server.requests[0]["messages"] == [{"role": "user",
"content": "Hello"}]

Answers are given in the scripted order, to any caller; `OpenAIServer(answer=…)` decides by the request, for concurrent
runs. `python -m tests.support.openai_server` serves one fixed reply and prints its URL.
"""

import argparse
import asyncio
import enum
import json
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from aiohttp import web

Json = dict[str, Any]

MODEL = "stub-1"
USAGE: Mapping[str, Any] = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
EVENT_STREAM = {"Content-Type": "text/event-stream; charset=utf-8"}
DONE = b"data: [DONE]\n\n"


class Cut(enum.Enum):
    """A piece at which the server closes the connection, the body being unfinished."""

    CUT = enum.auto()


CUT = Cut.CUT

Piece = bytes | asyncio.Event | Cut


@dataclass(frozen=True)
class Answer:
    """One HTTP answer. Its body is written piece by piece, each flushed by itself; at an event the server waits for it.
    The head goes out with the first bytes, so that what comes before them holds up or cuts the answer as a whole."""

    pieces: tuple[Piece, ...]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: EVENT_STREAM)

    @property
    def body(self) -> bytes:
        """All of its bytes."""
        return b"".join(piece for piece in self.pieces if isinstance(piece, bytes))

    def held(self, event: asyncio.Event, after: int = 1) -> Self:
        """Waits for `event` once `after` pieces are written."""
        return replace(self, pieces=(*self.pieces[:after], event, *self.pieces[after:]))

    def cut(self, after: int = 1) -> Self:
        """Ends with the connection once `after` pieces are written."""
        return replace(self, pieces=(*self.pieces[:after], CUT))

    def split(self, at: Sequence[int]) -> Self:
        """The same bytes, written in pieces that end at the offsets `at`, which ascend."""
        body, offsets = self.body, [0, *at]
        ends = [*at, len(body)]
        pieces = (body[start:end] for start, end in zip(offsets, ends, strict=True))
        return replace(self, pieces=tuple(piece for piece in pieces if piece))


@dataclass(frozen=True)
class Received:
    """One request, and what became of it."""

    path: str
    headers: Mapping[str, str]
    body: Json
    client_port: int
    """Two requests from one port came over one connection."""
    query: str = ""
    sent: asyncio.Event = field(default_factory=asyncio.Event)
    """The answer was written to its end."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """The client went away before the end of the answer."""


class OpenAIServer:
    """Serves POST /v1/chat/completions, and any other path alike, on a free port of the loopback interface while its
    context is entered."""

    def __init__(self, answer: Callable[[Json], Answer] | None = None, *, port: int = 0) -> None:
        """`answer` makes the answer to a request body once the script is used up; without it that is a status 400."""
        self.received: list[Received] = []
        self._answer = answer or (lambda body: error(400, "The test scripted no answer for this request."))
        self._script: deque[Answer] = deque()
        self._arrived = asyncio.Condition()
        self._port = port
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes every connection; answers under way end as if cut."""
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        """The base URL, as a provider is given it."""
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def requests(self) -> list[Json]:
        """The body of every request so far, in full, in the order of arrival."""
        return [received.body for received in self.received]

    def script(self, *answers: Answer) -> None:
        """Adds answers to be given, each once."""
        self._script.extend(answers)

    async def request(self, number: int) -> Received:
        """Waits for the request of that number, from 0, to arrive."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.received) > number)
        return self.received[number]

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        peer = request.transport.get_extra_info("peername") if request.transport else ("", 0)
        received = Received(
            request.path, request.headers.copy(), json.loads(await request.read()), peer[1], request.query_string
        )
        async with self._arrived:
            self.received.append(received)
            self._arrived.notify_all()
        answer = self._script.popleft() if self._script else self._answer(received.body)
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        try:
            for piece in answer.pieces:
                if isinstance(piece, bytes):
                    if not response.prepared:
                        await response.prepare(request)
                    await response.write(piece)
                elif isinstance(piece, asyncio.Event):
                    await piece.wait()
                elif request.transport is not None:
                    request.transport.close()
                    return response
            if not response.prepared:
                await response.prepare(request)
            await response.write_eof()
        except (asyncio.CancelledError, ConnectionError):
            received.left.set()
            raise
        received.sent.set()
        return response


def event(data: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def chunk(delta: Json | None = None, *, finish: str | None = None, **members: object) -> bytes:
    """One chunk of a reply as an event. Without a delta and a finish reason it has no choices, as the chunk with the
    usage has none. `members` are added to it or replace its own."""
    choices = [] if delta is None and finish is None else [{"index": 0, "delta": delta or {}, "finish_reason": finish}]
    made: Json = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": MODEL,
        "choices": choices,
    }
    return event(made | members)


def stream(*pieces: bytes, finish: str = "stop", usage: Mapping[str, Any] | None = USAGE) -> Answer:
    """A reply of these chunks, ended as OpenAI ends one: the finish reason, the usage, [DONE]."""
    first = chunk({"role": "assistant", "content": ""})
    counted = () if usage is None else (chunk(usage=usage),)
    return Answer((first, *pieces, chunk(finish=finish), *counted, DONE))


def reply(text: str, *, chunks: int = 1, finish: str = "stop", usage: Mapping[str, Any] | None = USAGE) -> Answer:
    """A reply of that text, cut evenly into `chunks`."""
    size = -(-len(text) // chunks) or 1
    parts = (text[start : start + size] for start in range(0, len(text), size))
    return stream(*(chunk({"content": part}) for part in parts), finish=finish, usage=usage)


def tool_calls(*calls: tuple[str, str], usage: Mapping[str, Any] | None = USAGE) -> Answer:
    """A reply that calls tools: (name, arguments) each. The arguments come in two halves, one call after the other."""
    pieces = []
    for index, (name, arguments) in enumerate(calls):
        half = len(arguments) // 2
        opened = {"index": index, "id": f"call_{index}", "type": "function"}
        pieces += [
            chunk({"tool_calls": [{**opened, "function": {"name": name, "arguments": ""}}]}),
            chunk({"tool_calls": [{"index": index, "function": {"arguments": arguments[:half]}}]}),
            chunk({"tool_calls": [{"index": index, "function": {"arguments": arguments[half:]}}]}),
        ]
    return stream(*pieces, finish="tool_calls", usage=usage)


def error(
    status: int,
    message: str = "refused by the stub",
    *,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """A refusal in OpenAI's shape."""
    body = {"error": {"message": message, "type": "stub_error", "param": None, "code": code}}
    return Answer((json.dumps(body).encode(),), status, {"Content-Type": "application/json", **(headers or {})})


async def _main() -> None:
    parser = argparse.ArgumentParser(description="Serve one fixed reply to every request, until interrupted.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--text", default="This is the stub speaking.")
    options = parser.parse_args()
    async with OpenAIServer(lambda body: reply(options.text, chunks=5), port=options.port) as server:
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
