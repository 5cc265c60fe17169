"""Arguments of a wrong type or value are refused before anything is sent, by an error that names the argument."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from inspect import isawaitable
from typing import Any

import pytest
from notecase import Client, Retry, Tool, v1

from tests.support.openai_server import OpenAIServer, reply


def search(what: str) -> str:
    """Searches."""
    return what


async def first(listing: Any) -> Any:
    return await anext(aiter(listing))


Call = Callable[[Any], Any]

REFUSED: dict[str, tuple[Call, type[Exception], str]] = {
    "said: a number": (lambda c: c.invoke(123, agent="a"), TypeError, "what the user says .* not 123"),
    "said: a dict": (lambda c: c.invoke({"role": "user"}, agent="a"), TypeError, "what the user says .* say only what"),
    "said: a list": (lambda c: c.invoke([{"role": "user"}], agent="a"), TypeError, "what the user says .* say only"),
    "said: a surrogate": (lambda c: c.invoke("\ud800", agent="a"), UnicodeError, "text has characters"),
    "say": (lambda c: c.say("s/r", 5), TypeError, "what the user says"),
    "say when": (lambda c: c.say("s/r", "x", when="now"), ValueError, "when: 'now' is not one of 'steer'"),
    "agent": (lambda c: c.invoke("x", agent=5), TypeError, "agent must be an id, a name, .* not 5"),
    "session": (lambda c: c.invoke("x", session=["s"]), TypeError, "session must be an id"),
    "user": (lambda c: c.create_session("a", user=5), TypeError, "user must be an id"),
    "session_id": (
        lambda c: c.create_session("a", session_id=5),
        TypeError,
        "session_id must be a string, not 5",
    ),
    "labels": (lambda c: c.create_session("a", labels={"n": 5}), TypeError, "labels must be a mapping"),
    "labels: a list": (lambda c: c.create_session("a", labels=["n"]), ValueError, "labels must be a mapping"),
    "state": (lambda c: c.create_session("a", state="draft"), TypeError, "state must be a mapping"),
    "state: a key": (lambda c: c.invoke("x", agent="a", state={1: 2}), TypeError, "keys of state .* not 1"),
    "state: a value": (
        lambda c: c.invoke("x", agent="a", state={"when": timedelta()}),
        TypeError,
        r"state\['when'\]: state cannot hold a timedelta",
    ),
    "state: too large": (lambda c: c.invoke("x", agent="a", state={"n": 1 << 64}), OverflowError, r"state\['n'\]"),
    "tools: a text": (
        lambda c: c.invoke("x", agent="a", tools="search"),
        TypeError,
        "tools must be a list.*'search'",
    ),
    "tools: one": (lambda c: c.put_agent("a", tools=search), TypeError, "tools must be a list"),
    "tools: a Tool": (lambda c: c.attach("s/r", tools=Tool(search)), TypeError, "tools must be a list"),
    "tools: a number in it": (lambda c: c.run("x", agent="a", tools=[5]), TypeError, "a tool is a function, not 5"),
    "tools: a wrong field": (
        lambda c: c.put_agent("a", tools=[{"name": 5}]),
        TypeError,
        r"tools\.name must be a string, not 5",
    ),
    "generation": (
        lambda c: c.invoke("x", agent="a", generation={"temperature": "hot"}),
        TypeError,
        r"generation\.temperature must be a number, not 'hot'",
    ),
    "generation: a list": (
        lambda c: c.invoke("x", agent="a", generation={"stop": 5}),
        TypeError,
        r"generation\.stop must be a list, each entry a string",
    ),
    "generation: a text": (
        lambda c: c.put_agent("a", generation="hot"),
        TypeError,
        "generation must be a v1.Generation",
    ),
    "context": (
        lambda c: c.put_agent("a", context={"max_messages": 1 << 40}),
        ValueError,
        r"context\.max_messages must be an integer of 32 bits",
    ),
    "instruction": (lambda c: c.put_agent("a", 5), TypeError, "instruction must be a string, not 5"),
    "fallbacks": (lambda c: c.put_agent("a", fallbacks=[{"mdl": "x"}]), ValueError, "fallbacks must be a list"),
    "limits": (
        lambda c: c.run("x", agent="a", limits={"timeout": "1s"}),
        TypeError,
        r"limits\.timeout .*'1s'",
    ),
    "limits: NaN": (lambda c: c.run("x", agent="a", limits={"timeout": float("nan")}), ValueError, r"limits\.timeout"),
    "cancel_after": (lambda c: c.run("x", agent="a", cancel_after="1"), TypeError, "cancel_after must be a number of"),
    "on_busy": (
        lambda c: c.run("x", agent="a", on_busy="later"),
        ValueError,
        "on_busy: 'later' is not one",
    ),
    "on_busy: a bool": (lambda c: c.run("x", agent="a", on_busy=True), TypeError, "on_busy: True is not one of"),
    "run_id": (lambda c: c.run("x", agent="a", run_id=5), TypeError, "run_id must be a string"),
    "options": (lambda c: c.attach("s/r", options={"keep": 1}), ValueError, "options must be a v1.WatchOptions"),
    "attach": (lambda c: c.attach(5), TypeError, "name must be an id"),
    "after": (lambda c: first(c.attach("s/r").text(v1.Event())), TypeError, "after must be the block_delta"),
    "after_sequence": (lambda c: c.attach("s/r", "5"), TypeError, "after_sequence must be an integer"),
    "input_id": (lambda c: c.approve("s/r", v1.InputRequest()), TypeError, "input_id must be a string"),
    "arguments": (lambda c: c.approve("s/r", "i", 5), TypeError, "arguments must be a mapping or JSON text"),
    "remember": (lambda c: c.deny("s/r", "i", remember=1.5), TypeError, "remember: 1.5 is not one of"),
    "answer": (lambda c: c.answer("s/r", "i", 5), TypeError, "answer must be a mapping or JSON text"),
    "reason": (lambda c: c.cancel("s/r", 5), TypeError, "reason must be a string"),
    "error": (lambda c: c.give_result("s/r", "c", error=ValueError("x")), TypeError, "error must be a string"),
    "command": (lambda c: c.send("s/r", "stop"), TypeError, r"command must be a v1\.RunRequest"),
    "owner": (lambda c: c.get_state(5), TypeError, "owner must be an id"),
    "keys": (lambda c: c.get_state("app", ["a", "b"]), TypeError, "keys must be a list, each entry a string"),
    "key": (lambda c: c.put_state("app", 5, 5), TypeError, "key must be a string"),
    "if_version": (lambda c: c.put_state("app", "k", 5, if_version="1"), TypeError, "if_version must be an integer"),
    "rewind": (lambda c: c.rewind("s", "1"), TypeError, "to_sequence must be an integer"),
    "filter": (lambda c: first(c.list_sessions(5)), TypeError, "filter must be a string"),
    "filter of runs": (lambda c: first(c.list_runs("s", 5)), TypeError, "filter must be a string"),
    "pieces": (lambda c: c.import_session(b"bytes"), TypeError, "pieces must be a list or an iterator of bytes"),
    "content": (lambda c: c.upload(5, "text/plain"), TypeError, "content must be bytes or the path"),
    "media_type": (lambda c: c.upload(b"", 5), TypeError, "media_type must be a string"),
    "blob": (lambda c: first(c.download(5)), TypeError, "blob must be an id"),
    "target": (lambda _: Client(7431), TypeError, "target must be a string .* not 7431"),  # type: ignore[arg-type]
    "token": (lambda _: Client(token=5), TypeError, "token must be a string, or a function"),  # type: ignore[arg-type]
    "credentials": (lambda _: Client(credentials="x"), TypeError, "credentials must be"),  # type: ignore[arg-type]
    "retry": (lambda _: Client(retry=3), TypeError, "retry must be a notecase.Retry"),  # type: ignore[arg-type]
    "tries": (lambda _: Retry(tries=-1), ValueError, "must not be negative"),
    "first_delay": (lambda _: Retry(first_delay="1"), TypeError, "first_delay must be"),  # type: ignore[arg-type]
    "timeout of a tool": (lambda _: Tool(search, timeout="1"), TypeError, "timeout must be"),  # type: ignore[arg-type]
    "description": (lambda _: Tool(search, description=5), TypeError, "description must be"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED.values(), ids=list(REFUSED))
async def test_it_is_named(call: Call, kind: type[Exception], message: str) -> None:
    async with Client("127.0.0.1:1", retry=Retry(tries=0)) as client:
        with pytest.raises(kind, match=message) as refused:
            made: Any | Awaitable[Any] = call(client)
            if isawaitable(made):
                await made
    assert kind is type(refused.value)


async def test_none_is_not_given(client: Client, model: OpenAIServer) -> None:
    model.script(reply("One."), reply("Two."))
    session = await client.create_session("detective", user=None, labels=None, state=None)
    options: dict[str, Any] = dict.fromkeys(
        ("agent", "state", "tools", "output", "model", "generation", "on_busy", "limits", "cancel_after", "run_id")
    )
    assert "One." == (await client.invoke("One", session=session, **options)).text
    assert "Two." == (await client.invoke("Two", agent="detective", session=None)).text
    await client.put_agent("other", tools=None, output=None, generation=None, context=None, labels=None)


async def test_limits_in_time_are_seconds(client: Client, model: OpenAIServer) -> None:
    """Numbers, or a timedelta; the server names one that is out of bounds as the caller wrote it."""
    model.script(reply("One."))
    given = {"timeout": 1.5, "input_timeout": timedelta(minutes=2)}
    limits = (await client.invoke("One", agent="detective", limits=given)).run.limits
    assert (1500, 120) == (limits.timeout.ToMilliseconds(), limits.input_timeout.ToSeconds())
    with pytest.raises(Exception, match=r"INVALID_FIELD: limits\.timeout: "):
        await client.invoke("One", agent="detective", limits={"timeout": -1})
