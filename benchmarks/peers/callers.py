"""Callers of the peers: the turns of `benchmarks.load`, in the words of each server."""

import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import aiohttp
import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from benchmarks import stub
from benchmarks.load import CONNECTIONS, SAID, Caller, WrongError, connections

A2A = "lf.a2a.v1"


class Peer(Caller):
    """What callers of both have: an agent is the model's name, and a session begins with its first turn."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    async def agent(self, tokens: int, pause_ms: int = 0) -> str:
        return stub.model(tokens, pause_ms)

    async def session(self) -> str:
        return f"s{next(self._numbers)}"


class AgentsSdk(Peer):
    def __init__(self, http: aiohttp.ClientSession) -> None:
        super().__init__()
        self._http = http

    @classmethod
    @asynccontextmanager
    async def connect(cls, port: int) -> AsyncIterator[Self]:
        # HTTP/1.1 has a connection for each question under way.
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as http:
            yield cls(http)

    async def turn(self, session: str, agent: str, tokens: int, lane: int = 0) -> float:
        first, streamed, kept = 0.0, "", ""
        begun = time.perf_counter()
        question = {"session": session, "model": agent, "text": SAID}
        async with self._http.post("/chat", json=question) as response:
            async for line in response.content:
                if line.startswith(b"data: "):
                    piece = json.loads(line[6:])
                    first = first or time.perf_counter() - begun
                    streamed += piece["token"]
                    kept += piece["reply"]
        if not streamed == kept == stub.TOKEN * tokens:
            raise WrongError(f"The Agents SDK streamed {len(streamed)} characters and kept {len(kept)}.")
        return first


class A2aSdk(Peer):
    def __init__(self, channels: list[grpc.aio.Channel], pool: DescriptorPool) -> None:
        super().__init__()
        self._request = GetMessageClass(pool.FindMessageTypeByName(f"{A2A}.SendMessageRequest"))
        response = GetMessageClass(pool.FindMessageTypeByName(f"{A2A}.StreamResponse"))
        states = pool.FindEnumTypeByName(f"{A2A}.TaskState")
        self._completed = states.values_by_name["TASK_STATE_COMPLETED"].number
        method = f"/{A2A}.A2AService/SendStreamingMessage"
        write, read = self._request.SerializeToString, response.FromString
        self._calls = [channel.unary_stream(method, write, read) for channel in channels]

    @classmethod
    @asynccontextmanager
    async def connect(cls, port: int) -> AsyncIterator[Self]:
        async with connections(port) as channels:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield cls(channels, DescriptorPool(ProtoReflectionDescriptorDatabase(channel)))

    async def turn(self, session: str, agent: str, tokens: int, lane: int = 0) -> float:
        number = f"m{next(self._numbers)}"
        said = {"message_id": number, "context_id": session, "role": "ROLE_USER", "parts": [{"text": SAID}]}
        first, streamed, state = 0.0, "", 0
        begun = time.perf_counter()
        call: Any = self._calls[lane % CONNECTIONS](self._request(message=said, metadata={"model": agent}))
        async for response in call:
            if response.HasField("artifact_update"):
                first = first or time.perf_counter() - begun
                streamed += response.artifact_update.artifact.parts[0].text
            elif response.HasField("status_update"):
                state = response.status_update.status.state
        if state != self._completed or streamed != stub.TOKEN * tokens:
            raise WrongError(f"The A2A SDK streamed {len(streamed)} characters and ended in state {state}.")
        return first
