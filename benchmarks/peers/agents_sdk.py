"""The OpenAI Agents SDK with its SQLite sessions, behind FastAPI: `python -m benchmarks.peers.agents_sdk FILE`.

A turn is a POST to /chat; the answer is a stream of server-sent events, one for each token, and a last one with the
whole reply. Tracing is off, since it would send to OpenAI, and so are the lines of the access log.
"""

import socket
import sys
from collections.abc import AsyncIterator

import uvicorn
from agents import Agent, Runner, SQLiteSession, set_default_openai_api, set_tracing_disabled
from fastapi import FastAPI
from fastapi.sse import EventSourceResponse
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel

app = FastAPI()


class Question(BaseModel):
    session: str
    model: str
    text: str


class Piece(BaseModel):
    token: str = ""
    reply: str = ""


@app.post("/chat", response_class=EventSourceResponse)
async def chat(question: Question) -> AsyncIterator[Piece]:
    agent = Agent(name="Detective", instructions="You are a detective.", model=question.model)
    session = SQLiteSession(question.session, sys.argv[-1])
    try:
        result = Runner.run_streamed(agent, question.text, session=session)
        async for event in result.stream_events():
            if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent):
                yield Piece(token=event.data.delta)
        yield Piece(reply=result.final_output)
    finally:
        session.close()


def main() -> None:
    set_default_openai_api("chat_completions")
    set_tracing_disabled(True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sys.stdout.write(f"listening on port {listener.getsockname()[1]}\n")
        sys.stdout.flush()
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
