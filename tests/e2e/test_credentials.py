"""The credential for a provider is shown nowhere: not in a session's log, an error, a state or the server's log,
wherever the provider puts it and however it spells it."""

from collections.abc import AsyncIterator, Callable

import pytest
from notecase import v1
from notecase_server.models.openai import OpenAIProvider

from tests.e2e.driving import log_of
from tests.e2e.test_past import turn
from tests.models.test_redaction import KEY, WRITINGS, spelled
from tests.support.openai_server import DONE, Answer, OpenAIServer, chunk, error, event, reply, stream
from tests.support.server import Running, running

HALF = len(KEY) // 2


def call(**members: object) -> Answer:
    made = {"index": 0, "id": "own-1", "function": {"name": "look", "arguments": "{}"}} | members
    return stream(chunk({"tool_calls": [made]}), finish="tool_calls")


PLACES: dict[str, Callable[[str], Answer]] = {
    "finish reason": lambda told: reply("Hi", finish=told),
    "finish reason, behind a word": lambda told: reply("Hi", finish=f"stop_{told}"),
    "finish reason of a failure": lambda told: Answer((chunk({"content": "Hi"}, finish=f"error {told}"), DONE)),
    "model": lambda told: Answer((chunk({"content": "Hi"}, model=told, finish="stop"), DONE)),
    "model, behind a name": lambda told: Answer((chunk({"content": "Hi"}, model=f"gpt-{told}", finish="stop"), DONE)),
    "error": lambda told: error(400, f"Bad key {told}, see the manual."),
    "code of an error": lambda told: error(400, "No.", code=told),
    "refused credential": lambda told: error(401, told, code=told),
    "used up account": lambda told: error(402, told),
    "overload": lambda told: error(503, told, code=told, headers={"retry-after": "3600"}),
    "too long": lambda told: error(400, f"maximum context length: {told}", code="context_length_exceeded"),
    "error within a reply": lambda told: Answer((event({"error": {"message": told, "code": told, "type": told}}),)),
    "body of no shape": lambda told: Answer((told.encode(),), 400, {"Content-Type": "text/plain"}),
    "address of a source": lambda told: stream(
        chunk({"content": "Hi", "annotations": [{"url": f"https://a.example/?k={told}", "title": "A"}]})
    ),
    "title of a source": lambda told: stream(
        chunk({"content": "Hi"}, search_results=[{"url": "https://a.example/", "title": f"A {told}"}])
    ),
    "address of an image": lambda told: stream(
        chunk({"content": "Hi", "images": [f"https://a.example/a.png?k={told}"]})
    ),
    "type of an image": lambda told: stream(chunk({"content": "Hi", "images": [f"data:image/{told};base64,AAAA"]})),
}


@pytest.fixture
async def served(model: OpenAIServer) -> AsyncIterator[Running]:
    async with running("memory:", {"openai": OpenAIProvider(KEY, model.url, "stub-1")}) as server:
        agent = v1.Agent(llm=v1.LlmAgent(), output_key="said")
        await server.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=agent))
        yield server


async def told_of(served: Running, session: str, run: v1.Run) -> str:
    """Returns everything that callers can read of a session and its run."""
    events = await log_of(served, session)
    found = await served.runs.GetRun(v1.GetRunRequest(name=run.name))
    whole = await served.sessions.GetSession(v1.GetSessionRequest(name=session))
    return "\n".join(map(str, [*events, found, whole]))


@pytest.mark.parametrize("place", PLACES)
async def test_the_credential_is_shown_nowhere_in_any_spelling(
    served: Running, model: OpenAIServer, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, told in WRITINGS.items():
        model.script(PLACES[place](told))
        made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent="agents/clerk")))
        done = await turn(served, made.name, "Hello")
        assert done.run.state in {v1.Run.STATE_SUCCEEDED, v1.Run.STATE_FAILED}
        assert f"Bearer {KEY}" == model.received[-1].headers["Authorization"]
        shown = await told_of(served, made.name, done.run) + capsys.readouterr().out
        secret = set().union(*map(spelled, told.split(" and then ")))
        assert set() == secret & spelled(shown), name


async def test_halves_of_the_credential_in_two_members_are_shown_in_neither(
    served: Running, model: OpenAIServer
) -> None:
    model.script(Answer((chunk({"content": "Hi"}, model=f"m-{KEY[:HALF]}", finish=f"stop-{KEY[HALF:]}"), DONE)))
    made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent="agents/clerk")))
    done = await turn(served, made.name, "Hello")
    assert ("stop", "stub-1") == (done.reply.finish_reason, done.reply.usage.model)


@pytest.mark.parametrize("answer", [call(id=KEY), call(extra_content={"google": {"thought_signature": KEY.upper()}})])
async def test_data_that_is_kept_for_the_provider_does_not_hold_the_credential(
    served: Running, model: OpenAIServer, answer: Answer
) -> None:
    model.script(answer, reply("Hi"))
    made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent="agents/clerk")))
    done = await turn(served, made.name, "Hello")
    assert v1.Run.STATE_SUCCEEDED == done.run.state
    assert not spelled(KEY) & spelled(await told_of(served, made.name, done.run))
    export = served.sessions.ExportSession(v1.ExportSessionRequest(name=made.name))
    file = b"".join([response.chunk async for response in export])
    assert KEY.lower().encode() not in file.lower()


async def test_words_that_are_not_secret_are_shown(served: Running, model: OpenAIServer) -> None:
    """So that the tests above do not hold because nothing is."""
    model.script(Answer((chunk({"content": "Hi"}, model="other-1", finish="because"), DONE)))
    made = await served.sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent="agents/clerk")))
    done = await turn(served, made.name, "Hello")
    assert ("because", "other-1") == (done.reply.finish_reason, done.reply.usage.model)
    model.script(error(400, "The pump is broken.", code="pump_broken"))
    failed = (await turn(served, made.name, "Hello")).run.error
    assert "pump_broken" == failed.metadata["code"]
    assert failed.message.endswith(": The pump is broken.")
