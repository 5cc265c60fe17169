"""What a server has to hold before the hostile requests make sense."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from notecase import v1

from tests.hostile import making
from tests.hostile.making import ADA, BIG, CLERK, CONTENT, PARTS, said

AGENTS = {
    "clerk": v1.LlmAgent(provider="offline", instruction="Answer briefly."),
    "looper": v1.LlmAgent(provider="offline", instruction=making.LOOPS),
    "nested": v1.LlmAgent(provider="offline", instruction=making.NESTED_LOOPS),
    "eyes": v1.LlmAgent(provider="openai", model="tokens-1"),
    "brief": v1.LlmAgent(provider="openai", model="tokens-1", context=v1.Context(max_tokens=15_000)),
    "armed": v1.LlmAgent(provider="openai", model="tokens-1", tools=making.tools(126, 8000)),
}


@asynccontextmanager
async def scene(channel: grpc.aio.Channel, many: int) -> AsyncIterator[None]:
    """Makes agents, sessions with much in them, and `many` sessions of one user, each with a run that ended and a
    watcher that stays until the block is left. The server has the providers `openai` and `offline`."""
    agents, sessions = v1.AgentServiceStub(channel), v1.SessionServiceStub(channel)
    for name, llm in AGENTS.items():
        await agents.CreateAgent(v1.CreateAgentRequest(agent_id=name, agent=v1.Agent(llm=llm)))
    case = v1.Session(agent=CLERK, user=ADA)
    await sessions.CreateSession(v1.CreateSessionRequest(session_id="case", session=case, state=making.SEED))
    await _make_album(channel)
    await _make_big(channel)
    await _make_parts(channel)
    await _make_long(channel)
    watchers = [await _watched(channel, number) for number in range(many)]
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.cancel()


async def _make_album(channel: grpc.aio.Channel) -> None:
    blobs = v1.BlobServiceStub(channel)
    await v1.SessionServiceStub(channel).CreateSession(v1.CreateSessionRequest(session_id="album"))
    shown = v1.Message(role=v1.Message.ROLE_USER)
    for number in range(3):
        await blobs.UploadBlob(iter(making.upload(making.picture(number))))
        shown.parts.add(blob=v1.Blob(name=making.picture_name(number), media_type="image/png", size_bytes=CONTENT))
    await v1.MessageServiceStub(channel).AppendMessages(making.append([shown], making.ALBUM))


async def _make_big(channel: grpc.aio.Channel) -> None:
    state = v1.StateServiceStub(channel)
    await v1.SessionServiceStub(channel).CreateSession(v1.CreateSessionRequest(session_id="big"))
    for batch in range(10):
        ops = [v1.StateOp(key=f"key-{batch}-{number}", set=making.text("x" * 50)) for number in range(1000)]
        await state.UpdateState(making.update(ops, f"{BIG}/state"))
    await state.PutState(making.put(making.wide_list(9_998), "0", f"{BIG}/state"))
    for _ in range(12):
        await v1.MessageServiceStub(channel).AppendMessages(making.append([said("x" * 1000)] * 100, BIG))


async def _make_parts(channel: grpc.aio.Channel) -> None:
    await v1.SessionServiceStub(channel).CreateSession(v1.CreateSessionRequest(session_id="parts"))
    asked, replied = making.parts(1000), making.parts(1000, v1.Part(json="1"))
    replied.role = v1.Message.ROLE_ASSISTANT
    for _ in range(10):
        await v1.MessageServiceStub(channel).AppendMessages(making.append([asked, replied], PARTS))


async def _make_long(channel: grpc.aio.Channel) -> None:
    await v1.SessionServiceStub(channel).CreateSession(v1.CreateSessionRequest(session_id="long"))
    for _ in range(2):
        messages = [said("é" * 120_000)] * 13
        await v1.MessageServiceStub(channel).AppendMessages(making.append(messages, making.LONG))


async def _watched(channel: grpc.aio.Channel, number: int) -> Any:
    runs = v1.RunServiceStub(channel)
    labels = {"number": str(number)}
    new = v1.Session(name=f"sessions/many-{number}", agent=CLERK, user=ADA, labels=labels)
    start = v1.StartRun(new_session=new, messages=[said("Good evening.")], labels=labels)
    await runs.Invoke(v1.InvokeRequest(start=start))
    watcher: Any = runs.WatchEvents(v1.WatchEventsRequest(name=new.name, options=v1.WatchOptions(keep_open=True)))
    await watcher.read()
    return watcher
