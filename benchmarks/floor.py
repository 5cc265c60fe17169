"""The smallest program that does a turn, without an agent service. The server is compared with it.

One file, frozen: it is changed only together with a note in docs/performance.md, since every ratio there hangs on it. A
turn is a bare `Run` call, one commit of the question before the model is asked (aiohttp, nothing around it), one commit
of the reply, and four frames: attached, the question, the first token at once, the end; with more tokens one frame for
each 30 ms of them. Nothing is checked, folded, fanned out or resumed. A commit is one transaction over one table, with
the durability of the product, made in a separate thread. The program counts its commits and frames.

`python -m benchmarks.floor serve --listen 127.0.0.1:0 --store sqlite:FILE`, with OPENAI_BASE_URL.
"""

import asyncio
import json
import os
import queue
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import aiohttp
import grpc
import msgspec
import uvloop
from notecase import v1

BATCH_SECONDS = 0.03


class Delta(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    delta: Delta


class Chunk(msgspec.Struct):
    choices: list[Choice]


decode = msgspec.json.Decoder(Chunk).decode


class Log:
    """One table, one thread that writes it."""

    def __init__(self, path: str) -> None:
        self.commits = 0
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[tuple[list[tuple[str, int, bytes]], asyncio.Future[None]]] = queue.SimpleQueue()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute(
            "CREATE TABLE events (session TEXT, sequence INTEGER, body BLOB, PRIMARY KEY (session, sequence))"
            " WITHOUT ROWID"
        )
        threading.Thread(target=self._write, daemon=True).start()

    async def commit(self, rows: list[tuple[str, int, bytes]]) -> None:
        """Returns when the rows are on the disk."""
        future = self._loop.create_future()
        self._jobs.put((rows, future))
        await future

    def _write(self) -> None:
        while True:
            rows, future = self._jobs.get()
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("INSERT INTO events VALUES (?, ?, ?)", rows)
            self._connection.execute("COMMIT")
            self.commits += 1
            self._loop.call_soon_threadsafe(future.set_result, None)


class Floor:
    """The methods that the load calls."""

    def __init__(self, log: Log, http: aiohttp.ClientSession, url: str) -> None:
        self._log = log
        self._http = http
        self._url = url
        self._models: dict[str, str] = {}
        self._heads: dict[str, int] = {}
        self._turns = self._frames = self._batches = 0

    async def create_agent(self, request: v1.CreateAgentRequest, _: Any) -> v1.Agent:
        self._models[f"agents/{request.agent_id}"] = request.agent.llm.model
        return v1.Agent(name=f"agents/{request.agent_id}")

    async def create_session(self, request: v1.CreateSessionRequest, _: Any) -> v1.Session:
        self._heads[f"sessions/{request.session_id}"] = 0
        return v1.Session(name=f"sessions/{request.session_id}")

    async def get_server_info(self, _request: v1.GetServerInfoRequest, _: Any) -> v1.ServerInfo:
        """Says what it counted, after it has checked it: two commits and four frames a turn of one token."""
        if self._log.commits != 2 * self._turns or self._frames != 4 * self._turns + self._batches:
            raise AssertionError(f"{self._turns} turns: {self._log.commits} commits, {self._frames} frames")
        return v1.ServerInfo()

    async def run(self, requests: AsyncIterator[v1.RunRequest], context: Any) -> None:
        start = (await anext(aiter(requests))).start
        session, run, now = start.session, str(uuid.uuid4()), time.time_ns()
        await self._send(context, v1.RunResponse(attached=v1.Attached(session=session)))
        question = [
            v1.Event(run=run, run_started=v1.RunStarted(agent=start.agent)),
            v1.Event(run=run, message_added=start.messages[0]),
        ]
        await self._commit(session, question, now)
        await self._send(context, v1.RunResponse(batch=v1.EventBatch(events=question)))
        reply = await self._reply(start, run, context)
        end = [
            v1.Event(run=run, message_added=v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=[v1.Part(text=reply)])),
            v1.Event(run=run, usage=v1.Usage(model_calls=1)),
            v1.Event(run=run, run_state_changed=v1.RunStateChanged(state=v1.Run.STATE_SUCCEEDED)),
        ]
        await self._commit(session, end, now)
        self._turns += 1
        await self._send(context, v1.RunResponse(batch=v1.EventBatch(events=end)))

    async def _reply(self, start: v1.StartRun, run: str, context: Any) -> str:
        asked = {
            "model": self._models[start.agent],
            "messages": [{"role": "user", "content": start.messages[0].parts[0].text}],
            "stream": True,
        }
        told, waiting, sent, tail = "", "", 0.0, b""
        clock = asyncio.get_running_loop().time
        async with self._http.post(self._url, data=json.dumps(asked).encode()) as response:
            async for data in response.content.iter_any():
                *lines, tail = (tail + data).split(b"\n\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        for choice in decode(line[6:]).choices:
                            waiting += choice.delta.content or ""
                if waiting and (not sent or clock() - sent >= BATCH_SECONDS):
                    self._batches += bool(sent)
                    delta = v1.BlockDelta(start=len(told), end=len(told) + len(waiting), text=waiting)
                    told, waiting, sent = told + waiting, "", clock()
                    batch = v1.EventBatch(events=[v1.Event(run=run, block_delta=delta)])
                    await self._send(context, v1.RunResponse(batch=batch))
        return told + waiting

    async def _commit(self, session: str, events: Sequence[v1.Event], now: int) -> None:
        head = self._heads[session]
        self._heads[session] = head + len(events)
        for sequence, event in enumerate(events, head + 1):
            event.sequence = sequence
            event.create_time.FromNanoseconds(now)
        await self._log.commit([(session, event.sequence, event.SerializeToString()) for event in events])

    async def _send(self, context: Any, response: v1.RunResponse) -> None:
        self._frames += 1
        await context.write(response)


def handlers(floor: Floor) -> list[grpc.GenericRpcHandler]:
    """The methods under the names that the product has for them."""

    def unary(act: Callable[[Any, Any], Awaitable[Any]], request: Any, response: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(act, request.FromString, response.SerializeToString)

    made: dict[str, dict[str, Any]] = {
        "AgentService": {"CreateAgent": unary(floor.create_agent, v1.CreateAgentRequest, v1.Agent)},
        "SessionService": {"CreateSession": unary(floor.create_session, v1.CreateSessionRequest, v1.Session)},
        "ServerService": {"GetServerInfo": unary(floor.get_server_info, v1.GetServerInfoRequest, v1.ServerInfo)},
        "RunService": {
            "Run": grpc.stream_stream_rpc_method_handler(
                floor.run, v1.RunRequest.FromString, v1.RunResponse.SerializeToString
            )
        },
    }
    return [grpc.method_handlers_generic_handler(f"notecase.v1.{name}", methods) for name, methods in made.items()]


async def serve(path: str) -> None:
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    async with aiohttp.ClientSession(headers={"Content-Type": "application/json"}) as http:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(tuple(handlers(Floor(Log(path), http, url))))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        sys.stdout.write(f"listening on port {port}\n")
        sys.stdout.flush()
        await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[-1].removeprefix("sqlite:")))
