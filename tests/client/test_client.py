"""The client against a real server: what it promises beyond the stubs, whatever becomes of the connection."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, assert_type

import grpc
import pytest
from notecase import Client, NotecaseError, Resource, Retry, RunStream, text_of, v1
from notecase.retry import Backoff
from notecase_server.auth.principal import AuthContext, Metadata, Principal, Role
from notecase_server.engine.content import Contents
from notecase_server.rpc.run import Streams
from notecase_server.rpc.watch import Pace

from tests.client.conftest import QUICK
from tests.client.proxy import Proxy
from tests.support.openai_server import OpenAIServer, error, reply
from tests.support.ports import free_port
from tests.support.server import Running, Spawned, running

SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64 << 10))
"""So that little is read in advance."""

EAGER = v1.WatchOptions()
EAGER.max_batch_delay.FromMilliseconds(0)


@asynccontextmanager
async def through(served: Running, retry: Retry = QUICK) -> AsyncIterator[tuple[Proxy, Client]]:
    """A proxy before the server, and a client behind it."""
    async with Proxy(served.address) as proxy, Client(proxy.address, retry=retry) as client:
        yield proxy, client


async def log_of(client: Client, session: str) -> list[v1.Event]:
    """The whole log of an idle session."""
    async with client.attach(session, 0) as stream:
        return [event async for event in stream]


def durable(events: list[v1.Event]) -> list[v1.Event]:
    return [event for event in events if event.sequence]


async def test_a_conversation_reads_as_in_the_readme(client: Client, model: OpenAIServer) -> None:
    """Open a session with a note, hear a reply as it comes, put a note, ask again: the model of the next reply gets
    it."""
    model.script(reply("At the harbour, près du quai. 🎻", chunks=7), reply("Still there."))
    session = await client.create_session(agent="agents/detective", state={"case": "The missing violin"})
    async with client.run("Where was it last seen?", session=session.name) as run:
        pieces = [text async for text in run.text()]
    assert "".join(pieces) == "At the harbour, près du quai. 🎻" == text_of(run.result.reply)
    assert run.result.state == v1.Run.STATE_SUCCEEDED
    assert (run.result.usage.output_tokens, run.session) == (7, session.name)
    await client.put_state(session.name, "seen", "the harbour")
    answer = await client.invoke("And now?", session=session.name)
    assert answer.text == "Still there."
    assert model.requests[1]["messages"][0]["content"] == "Case: The missing violin. Seen: the harbour."
    assert await client.get_state(session.name) == {"case": "The missing violin", "seen": "the harbour"}


async def test_the_view_and_the_result_are_what_the_server_would_tell(
    client: Client, session: str, model: OpenAIServer
) -> None:
    """Run, messages and state rebuilt from events equal those that the server has."""
    model.script(reply("Hm.", chunks=2), reply("Yes."))
    await client.invoke("One", session=session, state={"count": 1})
    async with client.run("Two", session=session) as run:
        await run.update_state(ops=[v1.StateOp(key="count", increment=2)])
        async for _ in run:
            pass
    async with client.attach(session, 0) as whole:
        async for _ in whole:
            pass
    listed = await client.messages.ListMessages(v1.ListMessagesRequest(parent=session))
    state = await client.state.GetState(v1.GetStateRequest(name=f"{session}/state"))
    assert await client.runs.GetRun(v1.GetRunRequest(name=run.name)) == run.result == whole.view.run
    assert list(whole.view.messages.values()) == list(listed.messages)
    assert whole.view.state == {key: entry.value for key, entry in state.entries.items()}
    assert await client.get_state(session, "count", "absent") == {"count": 3}


async def test_a_run_may_open_its_session(client: Client, model: OpenAIServer) -> None:
    """Without a session, a new one is made for the agent, and belongs to it from then on."""
    model.script(reply("Good evening."), reply("Again."))
    async with client.run("Hello", agent="agents/detective@1") as run:
        async for _ in run:
            pass
    session = await client.sessions.GetSession(v1.GetSessionRequest(name=run.session))
    assert session.agent == "agents/detective"
    assert (await client.invoke("Hello again", session=run.session)).text == "Again."


async def test_several_messages_and_parts_are_said_at_once(client: Client, session: str, model: OpenAIServer) -> None:
    """Texts and messages mix, in their order."""
    model.script(reply("Seen."))
    note = v1.Message(role=v1.Message.ROLE_SYSTEM, parts=[v1.Part(text="Be kind.")])
    async with client.run("First", note, "Last", session=session) as run:
        async for _ in run:
            pass
    said = [(m.role, text_of(m)) for m in run.view.messages.values()]
    user, system, assistant = v1.Message.ROLE_USER, v1.Message.ROLE_SYSTEM, v1.Message.ROLE_ASSISTANT
    assert said == [(user, "First"), (system, "Be kind."), (user, "Last"), (assistant, "Seen.")]


async def test_all_of_a_large_state_is_read(client: Client, session: str) -> None:
    """Pages are the client's affair."""
    for start in (0, 800):
        ops = [v1.StateOp(key=f"k{n:04}", set=v1.Value(int_value=n)) for n in range(start, start + 800)]
        await client.state.UpdateState(v1.UpdateStateRequest(name=f"{session}/state", ops=ops))
    assert await client.get_state(session) == {f"k{n:04}": n for n in range(1600)}


async def test_a_refusal_tells_its_reason_everywhere(client: Client, served: Running) -> None:
    """By a raw stub, by the client's methods, on entering a stream, and from a synchronous stub."""
    missing = Resource("notecase.v1.Session", "sessions/nowhere")
    with pytest.raises(NotecaseError) as raw:
        await client.sessions.GetSession(v1.GetSessionRequest(name="sessions/nowhere"))
    with pytest.raises(NotecaseError) as method:
        await client.put_state("sessions/nowhere", "key", 1)
    with pytest.raises(NotecaseError) as entered:
        await client.run("Hello", session="sessions/nowhere").__aenter__()
    with pytest.raises(NotecaseError) as attached:
        await client.attach("sessions/nowhere").__aenter__()
    with grpc.insecure_channel(served.address) as channel:
        stub = v1.SessionServiceStub(channel)
        with pytest.raises(grpc.RpcError) as blocking:
            await asyncio.to_thread(stub.GetSession, v1.GetSessionRequest(name="sessions/nowhere"))
        decoded = NotecaseError.from_rpc_error(blocking.value)
    for told in (raw.value, method.value, entered.value, attached.value, decoded):
        assert (told.code, told.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
        assert told.resource == missing


async def test_all_violations_are_listed(client: Client) -> None:
    """A program can point at every field that is wrong."""
    with pytest.raises(NotecaseError) as refused:
        await client.sessions.CreateSession(v1.CreateSessionRequest(session_id="A b", session=v1.Session(user="ada")))
    assert sorted(violation.field for violation in refused.value.violations) == ["session.user", "session_id"]


async def test_a_busy_session_names_its_run_and_is_not_asked_again(
    client: Client, session: str, served: Running, model: OpenAIServer
) -> None:
    """RUN_ACTIVE is an answer, not a failure of the connection."""
    release = asyncio.Event()
    model.script(reply("One.").held(release, 0))
    async with client.run("One", session=session) as run:
        with pytest.raises(NotecaseError) as refused:
            await client.invoke("Two", session=session)
        release.set()
        async for _ in run:
            pass
    assert (refused.value.reason, refused.value.metadata["run"]) == ("RUN_ACTIVE", run.name)
    assert "on_busy" in str(refused.value)
    assert len(model.requests) == 1


async def test_a_failed_run_is_data_and_where_it_matters_an_exception(
    client: Client, session: str, model: OpenAIServer
) -> None:
    """Events and `result` tell it; `text` and `invoke`, which would else pass it over, raise it."""
    model.script(error(400), error(400))
    with pytest.raises(NotecaseError) as invoked:
        await client.invoke("Speak", session=session)
    async with client.run("Again", session=session) as run:
        with pytest.raises(NotecaseError) as told:
            async for _ in run.text():
                pass
    assert (invoked.value.reason, told.value.reason) == ("MODEL_ERROR", "MODEL_ERROR")
    assert (run.result.state, run.result.error.message) == (v1.Run.STATE_FAILED, told.value.message)


async def test_a_run_is_cancelled_from_within_its_loop(client: Client, session: str, model: OpenAIServer) -> None:
    """What was said stays, the text ends with an error, and a second cancel is refused."""
    model.script(reply("Half of it", chunks=2).held(asyncio.Event(), 2))
    async with client.run("Speak", session=session, options=EAGER) as run:
        pieces = []
        with pytest.raises(NotecaseError, match="was cancelled"):
            async for text in run.text():
                pieces.append(text)
                sequence = await run.cancel("enough")
        with pytest.raises(NotecaseError, match="RUN_ENDED"):
            await run.cancel()
    assert run.result.state == v1.Run.STATE_CANCELLED
    assert run.last_sequence == sequence
    said = [message for message in run.view.messages.values() if message.role == v1.Message.ROLE_ASSISTANT]
    assert [(text_of(m), m.status) for m in said] == [("".join(pieces), v1.Message.STATUS_INCOMPLETE)]


async def test_invoke_raises_when_its_run_is_cancelled(client: Client, session: str, model: OpenAIServer) -> None:
    """There is no reply to return."""
    model.script(reply("Never.").held(asyncio.Event(), 0))
    invoked = asyncio.create_task(client.invoke("Wait", session=session, run_id="r1"))
    await model.request(0)
    await client.runs.CancelRun(v1.CancelRunRequest(name=f"{session}/runs/r1"))
    with pytest.raises(NotecaseError) as cancelled:
        await invoked
    assert cancelled.value.code is grpc.StatusCode.CANCELLED


async def test_state_changes_are_commands_of_the_stream(client: Client, session: str, model: OpenAIServer) -> None:
    """They come back as events, at the sequence that was returned; a refused one is raised and changes nothing."""
    release = asyncio.Event()
    model.script(reply("Noted.").held(release, 0))
    async with client.run("Note it", session=session) as run:
        sequence = await run.update_state({"seen": "quay", "n": 1}, ops=[v1.StateOp(key="n2", increment=1)])
        with pytest.raises(NotecaseError, match="STATE_TYPE_MISMATCH"):
            await run.update_state({"seen": "nowhere"}, ops=[v1.StateOp(key="n", append=v1.Value(int_value=1))])
        with pytest.raises(NotecaseError, match="STATE_VERSION_MISMATCH"):
            await run.update_state({"seen": "nowhere"}, if_version=0)
        release.set()
        events = [event async for event in run]
    changed = [event for event in events if event.HasField("state_changed")]
    assert [event.sequence for event in changed] == [sequence]
    assert await client.get_state(session) == {"seen": "quay", "n": 1, "n2": 1}


async def test_leaving_a_stream_leaves_the_run_alone(client: Client, session: str, model: OpenAIServer) -> None:
    """The run goes on in the server, and attaching to it tells all of it."""
    release = asyncio.Event()
    model.script(reply("Said to nobody.", chunks=3).held(release, 2))
    async with client.run("Speak", session=session, options=EAGER) as run:
        async for event in run:
            if event.HasField("block_delta"):
                break
    with pytest.raises(RuntimeError, match="not ended"):
        _ = run.result
    release.set()
    await client.runs.WaitRun(v1.WaitRunRequest(name=run.name))
    async with client.attach(run.name) as again:
        assert [text async for text in again.text()] == ["Said to nobody."]
    assert again.result.state == v1.Run.STATE_SUCCEEDED


async def test_attaching_begins_at_the_given_sequence(client: Client, session: str, model: OpenAIServer) -> None:
    """At the head of an idle session there is nothing; after a sequence, what follows it; beyond it, a refusal."""
    model.script(reply("One."))
    await client.invoke("One", session=session)
    events = await log_of(client, session)
    async with client.attach(session) as head:
        assert [event async for event in head] == []
    async with client.attach(session, 2) as rest:
        assert [event async for event in rest] == events[2:]
    assert (head.name, head.last_sequence, rest.last_sequence) == ("", len(events), len(events))
    with pytest.raises(NotecaseError, match="SEQUENCE_AHEAD"):
        await client.attach(session, len(events) + 1).__aenter__()


async def test_a_timeout_while_waiting_for_an_event_loses_none(
    client: Client, session: str, served: Running, model: OpenAIServer
) -> None:
    """The next iteration attaches again and goes on; a client without patience does so too, for nothing broke."""
    release = asyncio.Event()
    model.script(reply("Slowly but whole", chunks=4).held(release, 3))
    events: list[v1.Event] = []
    async with (
        Client(served.address, retry=Retry(tries=0)) as impatient,
        impatient.run("Speak", session=session, options=EAGER) as run,
    ):
        while True:
            try:
                # Nothing more comes while the model is held; the deadline is over as soon as the task must wait.
                async with asyncio.timeout(0 if len(events) >= 3 and not release.is_set() else None):
                    events.append(await anext(run))
            except TimeoutError:
                release.set()
            except StopAsyncIteration:
                break
    assert release.is_set()
    assert durable(events) == await log_of(client, session)


@pytest.mark.parametrize("kind", ["run_started", "message_added", "block_delta"])
async def test_a_cut_connection_is_mended_without_gap_or_repeat(
    client: Client, session: str, served: Running, model: OpenAIServer, kind: str
) -> None:
    """Each entry of the log comes once, whichever event came last before the cut."""
    release = asyncio.Event()
    model.script(reply("Räuber, überall Räuber! 🦹", chunks=6).held(release, 4))
    events = []
    async with through(served) as (proxy, behind), behind.run("Who?", session=session, options=EAGER) as run:
        async for event in run:
            events.append(event)
            if event.HasField(kind) and not release.is_set():  # type: ignore[arg-type]
                proxy.cut()
                release.set()
    assert proxy.opened > 1
    assert durable(events) == await log_of(client, session)
    assert text_of(run.result.reply) == "Räuber, überall Räuber! 🦹"


async def test_a_watch_cut_after_every_entry_still_tells_all(client: Client, session: str, served: Running) -> None:
    """Patience is counted from the last entry, so progress is never given up on; and each time only what is missing
    comes over the wire."""
    large = 200_000
    events = []
    async with (
        Proxy(served.address) as proxy,
        Client(proxy.address, retry=Retry(tries=3, first_delay=0.01)) as behind,
        behind.attach(session, 0, options=v1.WatchOptions(keep_open=True)) as watching,
    ):
        for number in range(6):
            await client.put_state(session, "n", "." * (1 if number else large))
            events.append(await anext(watching))
            proxy.cut()
    assert events == await log_of(client, session)
    assert large < proxy.told < 2 * large


async def test_a_mended_stream_is_watched_as_before(
    client: Client, session: str, served: Running, model: OpenAIServer
) -> None:
    """Its options hold for every attachment: without deltas, it stays without."""
    release = asyncio.Event()
    model.script(reply("Quietly done.", chunks=4).held(release, 4))
    quiet = v1.WatchOptions(durable_only=True)
    events = []
    async with through(served) as (proxy, behind), behind.run("Speak", session=session, options=quiet) as run:
        async for event in run:
            events.append(event)
            if event.HasField("message_added") and not release.is_set():
                async with client.attach(run.name) as other:
                    while not (await anext(other)).HasField("block_delta"):
                        pass
                proxy.cut()
                await run.update_state({"cut": True})
            if event.HasField("state_changed"):
                release.set()
    assert proxy.opened > 1
    assert events == await log_of(client, session)


async def test_printed_text_goes_on_where_it_was_cut(
    client: Client, session: str, served: Running, model: OpenAIServer
) -> None:
    """The open block comes again whole; what was printed of it is not printed again."""
    release = asyncio.Event()
    model.script(reply("Räuber, überall Räuber! 🦹", chunks=6).held(release, 4))
    async with through(served) as (proxy, behind), behind.run("Who?", session=session, options=EAGER) as run:
        pieces = []
        async for text in run.text():
            pieces.append(text)
            if not release.is_set():
                proxy.cut()
                release.set()
    assert len(pieces) > 1
    assert "".join(pieces) == "Räuber, überall Räuber! 🦹"
    assert proxy.opened > 1


async def test_a_start_whose_answer_is_lost_happens_once(
    client: Client, session: str, served: Running, model: OpenAIServer
) -> None:
    """The client does not know whether its start arrived; it says the same again and finds the run."""
    model.script(reply("Once."))
    async with through(served) as (proxy, behind):
        await behind.server.GetServerInfo(v1.GetServerInfoRequest())  # the connection is established
        proxy.deaf = True
        said = asyncio.create_task(behind.invoke("Hello", session=session))
        await model.request(0)
        proxy.deaf = False
        proxy.cut()
        assert (await said).text == "Once."
    runs = await client.runs.ListRuns(v1.ListRunsRequest(parent=session))
    assert (len(runs.runs), len(model.requests)) == (1, 1)


async def test_a_write_whose_answer_is_lost_happens_once(client: Client, session: str, served: Running) -> None:
    """The request_id makes the repeat the first answer again."""
    keep = v1.WatchOptions(keep_open=True)
    async with through(served) as (proxy, behind), client.attach(session, options=keep) as watching:
        await behind.server.GetServerInfo(v1.GetServerInfoRequest())
        proxy.deaf = True
        put = asyncio.create_task(behind.put_state(session, "n", 1))
        event = await anext(watching)
        proxy.deaf = False
        proxy.cut()
        assert (await put).version == 1
    assert event.state_changed.version == 1
    assert durable(await log_of(client, session)) == [event]


async def test_a_command_whose_answer_is_lost_takes_effect_once(
    client: Client, session: str, served: Running, model: OpenAIServer
) -> None:
    """The command_id makes the repeat a duplicate, answered with the first one's sequence."""
    release = asyncio.Event()
    model.script(reply("Counted.").held(release, 0))
    async with through(served) as (proxy, behind), behind.run("Count", session=session) as run:
        async with client.attach(session) as watching:
            proxy.deaf = True
            told = asyncio.create_task(run.update_state(ops=[v1.StateOp(key="n", increment=1)]))
            event = await anext(watching)
            proxy.deaf = False
            proxy.cut()
            assert await told == event.sequence
        release.set()
        async for _ in run:
            pass
    assert await client.get_state(session) == {"n": 1}


async def test_patience_ends(session: str, served: Running, model: OpenAIServer) -> None:
    """With no tries left the failure is raised, as what it is; the run itself goes on."""
    release = asyncio.Event()
    model.script(reply("Unheard.").held(release, 0))
    async with (
        Proxy(served.address) as proxy,
        Client(proxy.address, retry=Retry(tries=0)) as behind,
        behind.run("Speak", session=session) as run,
    ):
        with pytest.raises(NotecaseError) as broken:
            async for event in run:
                if event.HasField("message_added"):
                    proxy.cut()
        opened = proxy.opened
    release.set()
    found = await served.runs.WaitRun(v1.WaitRunRequest(name=run.name))
    assert (broken.value.code, broken.value.reason, opened) == (grpc.StatusCode.UNAVAILABLE, "", 1)
    assert found.state == v1.Run.STATE_SUCCEEDED


async def test_a_watch_outlives_the_servers_restart(tmp_path: Path) -> None:
    """A stop in good order and a start: the stream that was open before goes on, and a write that came in between is
    carried out."""
    store, log = f"sqlite:{tmp_path / 'notecase.db'}", tmp_path / "log"
    port = free_port()
    server = await Spawned.start(store, log, port=port)
    patient = Retry(tries=1000, max_delay=0.5)  # a restart may take a busy machine longer than the usual tries do
    try:
        async with Client(server.address, retry=patient) as client:
            session = await client.create_session(session_id="s")
            keep = v1.WatchOptions(keep_open=True)
            async with client.attach(session.name, 0, options=keep) as watching:
                await client.put_state(session.name, "n", 1)
                events = [await anext(watching)]
                stopped = asyncio.create_task(server.stop())
                following = asyncio.create_task(anext(watching))
                assert await stopped == 0
                put = asyncio.create_task(client.put_state(session.name, "n", 2))
                server = await Spawned.start(store, log, port=port)
                await put
                events.append(await following)
            assert await client.get_state(session.name) == {"n": 2}
    finally:
        await server.kill()
    assert [event.sequence for event in events] == [1, 2]


async def test_a_command_that_is_sent_again_is_another(client: Client, session: str, model: OpenAIServer) -> None:
    """Unless its sender gives it an id, under which it is the same."""
    release = asyncio.Event()
    model.script(reply("Counted.").held(release, 0))
    count = v1.RunRequest(update_state=v1.StateUpdate(ops=[v1.StateOp(key="n", increment=1)]))
    async with client.run("Count", session=session):
        await client.send(session, count)
        await client.send(session, count)
        assert not count.command_id
        count.command_id = "once"
        assert await client.send(session, count) == await client.send(session, count)
        release.set()
    assert await client.get_state(session) == {"n": 3}


async def test_another_session_of_the_same_name_is_not_followed(
    client: Client, session: str, served: Running, model: OpenAIServer
) -> None:
    """A session that is deleted and created again is another one: neither its events nor commands to it."""
    keep = v1.WatchOptions(keep_open=True)
    patient = Retry(tries=1000, first_delay=0.01, max_delay=0.05)
    async with through(served, patient) as (proxy, behind), behind.attach(session, 0, options=keep) as watching:
        await client.put_state(session, "who", "alice")
        await anext(watching)
        proxy.away = True
        proxy.cut()
        following = asyncio.create_task(anext(watching))
        await client.sessions.DeleteSession(v1.DeleteSessionRequest(name=session))
        await client.create_session("detective", session_id=session.removeprefix("sessions/"))
        for _ in range(2):
            await client.put_state(session, "who", "bob")
        proxy.away = False
        with pytest.raises(NotecaseError, match="SESSION_NOT_FOUND"):
            await following
        with pytest.raises(NotecaseError, match="SESSION_NOT_FOUND"):
            await watching.update_state({"who": "alice"})
    assert await client.get_state(session) == {"who": "bob"}


async def test_a_stream_may_be_read_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server lets a reader go who takes nothing for long; the stream goes on where it was."""
    gone, follow = asyncio.Event(), Streams._follow

    async def told(*arguments: Any) -> None:
        try:
            await follow(*arguments)
        finally:
            gone.set()

    monkeypatch.setattr(Streams, "_follow", told)
    async with running(pace=Pace(stall=0.1)) as served, Client(served.address, options=SMALL_WINDOW) as client:
        session = (await client.create_session()).name
        for number in range(40):
            await client.put_state(session, "n", f"{number}" + 200_000 * ".")
        async with client.attach(session, 0) as watching:
            events = [await anext(watching)]
            await gone.wait()
            events += [event async for event in watching]
    assert [event.sequence for event in events] == list(range(1, 41))


async def test_a_viewer_watches(model: OpenAIServer) -> None:
    """Attaching, and attaching again, needs no more rights than watching."""

    class Viewers:
        async def principal(self, metadata: Metadata, transport: AuthContext) -> Principal:
            return Principal("default", "", Role.VIEWER if metadata.get("authorization") else Role.ADMIN)

    async with (
        running(authenticators=[Viewers()]) as served,
        Client(served.address) as admin,
        Proxy(served.address) as proxy,
        Client(proxy.address, token="viewer", retry=QUICK) as viewer,
    ):
        session = (await admin.create_session()).name
        async with viewer.attach(session, 0, options=v1.WatchOptions(keep_open=True)) as watching:
            for number in (1, 2):
                await admin.put_state(session, "n", number)
                assert (await anext(watching)).sequence == number
                proxy.cut()


async def test_a_deleted_session_ends_its_streams(client: Client, session: str) -> None:
    """There is nothing to attach to again, and trying is not tried."""
    async with client.attach(session, options=v1.WatchOptions(keep_open=True)) as watching:
        await client.sessions.DeleteSession(v1.DeleteSessionRequest(name=session))
        with pytest.raises(NotecaseError, match="SESSION_NOT_FOUND"):
            await anext(watching)


async def test_a_reply_begun_again_is_set_apart(client: Client, session: str, model: OpenAIServer) -> None:
    """A model call that broke off is repeated as another message, after a blank line."""
    heard = asyncio.Event()
    model.script(reply("Half of it", chunks=2).held(heard, 2).cut(3), reply("All of it"))
    text = ""
    async with client.run("Speak", session=session, options=EAGER) as run:
        async for piece in run.text():
            text += piece
            heard.set()
    assert text == "Half \n\nAll of it"
    assert text_of(run.result.reply) == "All of it"


async def test_calls_keep_their_metadata_and_every_style(client: Client, served: Running, session: str) -> None:
    """The calls of stubs can be read and written by hand, and have metadata, like those of grpc."""
    call = client.server.GetServerInfo(v1.GetServerInfoRequest())
    info = assert_type(await call, v1.ServerInfo)
    assert info == await served.info.GetServerInfo(v1.GetServerInfoRequest())
    assert await call.code() is grpc.StatusCode.OK
    stream = client.runs.Run()
    await stream.write(v1.RunRequest(attach=v1.AttachRun(name=session)))
    first = await stream.read()
    assert isinstance(first, v1.RunResponse)
    assert first.attached.session == session
    await stream.done_writing()
    assert [frame.batch.caught_up async for frame in _frames(stream)] == [True]


async def _frames(
    stream: "grpc.aio.StreamStreamCall[v1.RunRequest, v1.RunResponse]",
) -> AsyncIterator[v1.RunResponse]:
    while isinstance(frame := await stream.read(), v1.RunResponse):
        yield frame


async def test_a_stream_made_by_hand_takes_every_field(client: Client, session: str, model: OpenAIServer) -> None:
    """`RunStream` over any request: here a condition on the log, which misses."""
    start = v1.StartRun(
        session=session, run_id="r1", if_last_sequence=7, messages=[v1.Message(parts=[v1.Part(text="Hi")])]
    )
    with pytest.raises(NotecaseError) as refused:
        await RunStream(client.runs, v1.RunRequest(start=start)).__aenter__()
    assert (refused.value.reason, refused.value.metadata) == ("SEQUENCE_MISMATCH", {"last_sequence": "0"})


async def test_content_is_sent_and_read_through_cuts(served: Running, tmp_path: Path) -> None:
    """The server goes on where the connection broke, in both directions."""
    path = tmp_path / "plan.pdf"
    data = bytes(range(256)) * (12 << 10)
    path.write_bytes(data)
    async with Proxy(served.address) as proxy, Client(proxy.address, retry=QUICK) as client:
        sending = asyncio.create_task(client.upload(path, upload_id="plan"))
        request = v1.GetUploadRequest(upload_id="plan")
        while True:
            try:
                if (await served.blobs.GetUpload(request)).committed_bytes:
                    break
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.NOT_FOUND
        proxy.cut()
        blob = await sending
        assert blob == v1.Blob(
            name=f"blobs/{hashlib.sha256(data).hexdigest()}",
            size_bytes=len(data),
            media_type="application/pdf",
            filename="plan.pdf",
        )
        read = b""
        async for piece in client.download(blob):
            if not read:
                proxy.cut()
            read += piece
        assert read == data
        assert b"".join([piece async for piece in client.download(blob.name, 5, 300)]) == data[5:305]
        assert (await client.upload(b"", "text/plain")).size_bytes == 0
        with pytest.raises(ValueError, match="media_type"):
            await client.upload(b"\xff")
        with pytest.raises(FileNotFoundError):
            await client.upload(tmp_path / "missing.pdf")
        with pytest.raises(NotecaseError) as missing:
            await anext(aiter(client.download("blobs/" + "0" * 64)))
        assert missing.value.reason == "BLOB_NOT_FOUND"


async def test_what_a_pipe_gives_is_uploaded(client: Client) -> None:
    """It cannot be read again, as the standard input or the output of another program in a shell."""
    read, write = os.pipe()
    os.write(write, b"A plan.")
    os.close(write)
    blob = await client.upload(f"/dev/fd/{read}", "text/plain")
    os.close(read)
    assert [b"A plan."] == [piece async for piece in client.download(blob)]


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="the system has no such files")
async def test_a_file_of_the_system_is_uploaded_whatever_size_it_says(client: Client) -> None:
    """Its size is 0, or a page."""
    blob = await client.upload("/proc/version")
    assert [Path("/proc/version").read_bytes()] == [piece async for piece in client.download(blob)]


async def test_no_more_is_read_of_a_device_than_can_be_held(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("notecase.content.PIPE_BYTES", 1 << 20)
    with pytest.raises(OSError, match="more than 1 MiB"):
        await client.upload("/dev/zero", "text/plain")


async def test_an_upload_is_patient_as_long_as_it_gets_on(served: Running) -> None:
    """Failures are counted in a row: two tries outlast five cuts when something got through before each."""
    data = bytes(range(256)) * (96 << 10)
    async with Proxy(served.address) as proxy, Client(proxy.address, retry=Retry(tries=2, first_delay=0.01)) as client:
        sending = asyncio.create_task(client.upload(data, "image/png", upload_id="much"))
        at = 0
        for _ in range(5):
            while (now := await committed(served, "much")) <= at:
                assert not sending.done()
            at = now
            proxy.cut()
        assert (await sending).name == f"blobs/{hashlib.sha256(data).hexdigest()}"


async def test_an_upload_waits_while_the_server_has_too_much_to_do(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * (8 << 10)
    refused, wait = asyncio.Event(), Backoff.wait

    async def noted(backoff: Backoff, error: Any, **options: Any) -> None:
        assert error.reason == "RATE_LIMITED"
        refused.set()
        await wait(backoff, error, **options)

    monkeypatch.setattr(Backoff, "wait", noted)
    async with Client(served.address, retry=Retry(first_delay=0.01)) as client:
        gate = served.server.gate
        gate.requested += 1 << 40
        sending = asyncio.create_task(client.upload(data, "image/png"))
        await refused.wait()
        gate.requested -= 1 << 40
        assert (await sending).name == f"blobs/{hashlib.sha256(data).hexdigest()}"


async def committed(served: Running, upload_id: str) -> int:
    try:
        return (await served.blobs.GetUpload(v1.GetUploadRequest(upload_id=upload_id))).committed_bytes
    except grpc.aio.AioRpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND
        return 0


async def test_an_upload_asks_again_when_its_offset_is_outdated(
    client: Client, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier call had sent may be stored only after the server has said how far it came."""
    told = [v1.Upload(upload_id="plan")]
    get_upload = client.blobs.GetUpload

    async def late(request: v1.GetUploadRequest) -> v1.Upload:
        return told.pop() if told else await get_upload(request)

    cut = v1.UploadBlobRequest(upload_id="plan", chunk=b"abc")
    with pytest.raises(grpc.aio.AioRpcError):
        await served.blobs.UploadBlob(iter([cut]))
    monkeypatch.setattr(client.blobs, "GetUpload", late)
    blob = await client.upload(b"abcdef", "image/png", upload_id="plan")
    assert blob.name == f"blobs/{hashlib.sha256(b'abcdef').hexdigest()}"
    assert told == []


async def test_a_download_may_be_read_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server lets a reader go who takes nothing for long; the client goes on where it was."""
    gone, download = asyncio.Event(), Contents.download

    async def told(*arguments: Any) -> AsyncIterator[v1.DownloadBlobResponse]:
        try:
            async with aclosing(download(*arguments)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            gone.set()

    monkeypatch.setattr(Contents, "download", told)
    data = bytes(range(256)) * (64 << 10)
    async with running(pace=Pace(stall=0.1)) as served, Client(served.address, options=SMALL_WINDOW) as client:
        blob = await client.upload(data, "image/png")
        pieces = aiter(client.download(blob))
        read = await anext(pieces)
        await gone.wait()
        assert read + b"".join([piece async for piece in pieces]) == data


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        *(("plan.pdf", "application/pdf"), ("facts.csv.gz", "application/gzip"), ("facts.tar.xz", "application/x-xz")),
        *((name, "text/plain") for name in ("a.rs", "a.py", "a.sh", "a.yaml", "a.toml", "a.log", "a.go", "Makefile")),
        *(
            ("a.md.csv", "text/csv"),
            ("a.json", "application/json"),
            ("a.svg", "image/svg+xml"),
            ("a.html", "text/html"),
        ),
    ],
)
async def test_a_files_media_type_is_what_its_bytes_are(
    client: Client, tmp_path: Path, name: str, media_type: str
) -> None:
    """A compressed table is no table, and source code is text, whatever the machine's own types say."""
    (tmp_path / name).write_bytes("é".encode())
    assert (await client.upload(tmp_path / name)).media_type == media_type


async def test_content_that_is_not_text_needs_a_name_or_a_media_type(client: Client) -> None:
    """What begins like text and has other bytes further on is not text; a character may be cut by what is looked at."""
    for content in (b"\xff", b"a\0", b"a" * 100 + b"\xc3"):
        with pytest.raises(ValueError, match="media_type"):
            await client.upload(content)
        assert (await client.upload(content, filename="a.png")).media_type == "image/png"
    assert (await client.upload(("a" + "é" * (64 << 10)).encode())).media_type == "text/plain"


async def test_the_plain_stubs_upload_too(served: Running) -> None:
    """Without asyncio and without this client: the generated stub on grpc's own channel."""

    def upload() -> v1.Blob:
        with grpc.insecure_channel(served.address) as channel:
            first = v1.UploadBlobRequest(blob=v1.Blob(media_type="text/plain"), chunk=b"abc")
            blob: v1.Blob = v1.BlobServiceStub(channel).UploadBlob(
                iter([first, v1.UploadBlobRequest(chunk=b"def", last=True)])
            )
            return blob

    blob = await asyncio.to_thread(upload)
    assert blob.name == f"blobs/{hashlib.sha256(b'abcdef').hexdigest()}"
