"""What is kept of long sessions between their turns: always what the store has, bounded, and gone with the session."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from notecase import v1
from notecase_server.engine.caused import Caused
from notecase_server.engine.context import FEW
from notecase_server.engine.transcripts import LONGEST, MESSAGE_BYTES, Transcript, Transcripts
from notecase_server.models.contract import Call, Delta, Finish, ModelRequest, Text, texts_of
from notecase_server.store.contract import Answer, Commit, Committed, Once, Page, Query, SessionKey, Store

from tests.engine.rooms import TENANT, House, client_tool, house
from tests.store.build import ManualClock

KEY, OTHER = SessionKey(TENANT, "s", "1"), SessionKey(TENANT, "t", "2")
USER, ASSISTANT = v1.Message.ROLE_USER, v1.Message.ROLE_ASSISTANT


def said(sequence: int, text: str = "", role: v1.Message.Role.ValueType = USER) -> v1.Message:
    return v1.Message(name=f"m{sequence}", role=role, sequence=sequence, parts=[v1.Part(text=text or f"n{sequence}")])


def whole(*messages: v1.Message) -> Transcript:
    return Transcript(messages, texts_of(messages), sum(message.ByteSize() for message in messages))


def made(first: int, *messages: v1.Message, events: Sequence[v1.Event] = ()) -> Committed:
    """A commit from that sequence on."""
    added = [v1.Event(message_added=message) for message in messages]
    numbered = [v1.Event(sequence=first + index) for index in range(len(added) + len(events))]
    for event, payload in zip(numbered, [*added, *events], strict=True):
        event.MergeFrom(payload)
    return Committed(v1.Session(), 0, numbered, {}, {message.name: message for message in messages}, {})


def test_a_transcript_follows_the_commits_behind_it_and_is_used_at_its_own_sequence_only() -> None:
    kept = Transcripts()
    kept.keep(KEY, 5, whole(said(2), said(5)))
    found = kept.find(KEY, 5)
    assert found == whole(said(2), said(5))._replace(messages=[said(2), said(5)])
    assert [None, None] == [kept.find(KEY, 4), kept.find(OTHER, 5)]
    kept.follow(KEY, made(6, said(6)))
    assert kept.find(KEY, 5) is None
    assert kept.find(KEY, 6) == whole(said(2), said(5), said(6))._replace(messages=[said(2), said(5), said(6)])
    assert found.messages == [said(2), said(5)], "who holds it does not see it change"


def test_a_message_that_a_commit_changes_takes_its_own_place() -> None:
    kept = Transcripts()
    kept.keep(KEY, 3, whole(said(1), said(2, role=ASSISTANT), said(3)))
    changed = v1.Message(name="m2", role=ASSISTANT, sequence=2)
    changed.parts.add().tool_call.call_id = "c"
    change = v1.Event(sequence=4, state_changed=v1.StateChanged())
    kept.follow(KEY, Committed(v1.Session(), 0, [change], {}, {"m2": changed}, {}))
    replaced = [said(1), changed, said(3)]
    assert kept.find(KEY, 4) == whole(*replaced)._replace(messages=replaced)
    changed.name = "other"
    assert (found := kept.find(KEY, 4)) is not None
    assert "m2" == found.messages[1].name, "it is a copy"


def test_the_texts_of_changed_messages_follow_and_are_counted() -> None:
    kept, fresh = Transcripts(), Transcripts()
    kept.keep(KEY, 3, whole(said(1), said(2), said(3)))
    longer = said(2, "x" * 1000 + "\N{GRINNING FACE}")
    change = v1.Event(sequence=4, state_changed=v1.StateChanged())
    kept.follow(KEY, Committed(v1.Session(), 0, [change], {}, {"m2": longer}, {}))
    assert (found := kept.find(KEY, 4)) is not None
    assert found.texts == ["n1", longer.parts[0].text, "n3"]
    fresh.keep(KEY, 4, whole(said(1), longer, said(3)))
    assert kept.size == fresh.size
    assert kept.size > 5 * 1001, "one wide character makes all of its text wide"


@pytest.mark.parametrize(
    "committed",
    [
        made(7, said(7)),
        made(5, said(5)),
        made(6, events=[v1.Event(rewound=v1.Rewound(to_sequence=2))]),
    ],
    ids=["a gap", "known already", "a rewind"],
)
def test_what_cannot_be_followed_is_forgotten(committed: Committed) -> None:
    kept = Transcripts()
    kept.keep(KEY, 5, whole(said(5)))
    kept.follow(KEY, committed)
    assert [None] * 9 == [kept.find(KEY, head) for head in range(9)]
    assert 0 == kept.size


def test_all_together_are_bounded_and_the_one_used_last_stays() -> None:
    kept = Transcripts(most_bytes=3 * MESSAGE_BYTES)
    kept.keep(KEY, 1, whole(said(1)))
    kept.keep(OTHER, 1, whole(said(1)))
    assert kept.find(KEY, 1) is not None
    kept.follow(OTHER, made(2, said(2)))
    assert [False, True] == [kept.find(key, head) is None for key, head in ((KEY, 1), (OTHER, 2))]
    kept.keep(SessionKey(TENANT, "u", "3"), 1, whole(said(1, "x" * MESSAGE_BYTES)))
    assert kept.size <= 3 * MESSAGE_BYTES
    assert kept.find(OTHER, 2) is None


def test_a_session_that_is_too_long_is_not_kept() -> None:
    kept = Transcripts()
    many = [said(sequence) for sequence in range(1, LONGEST + 1)]
    kept.keep(OTHER, LONGEST + 1, whole(*many, said(LONGEST + 1)))
    assert kept.find(OTHER, LONGEST + 1) is None
    kept.keep(KEY, LONGEST, whole(*many))
    assert kept.find(KEY, LONGEST) is not None
    kept.follow(KEY, made(LONGEST + 1, said(LONGEST + 1)))
    assert (None, 0) == (kept.find(KEY, LONGEST + 1), kept.size)


class Recording:
    """A model that notes what it is shown. To "call" it answers with a call of the tool `look`."""

    def __init__(self) -> None:
        self.shown: list[list[v1.Message]] = []

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Delta, None]:
        self.shown.append(list(request.messages))
        last = request.messages[-1]
        if last.role == USER and last.parts[0].text == "call":
            yield Call(0, "look", "{}")
        else:
            yield Text("Done.")
        yield Finish("stop", v1.Usage())

    async def close(self) -> None:
        pass


async def _long(rooms: House, messages: int = FEW + 1) -> SessionKey:
    (key,) = await rooms.prepare()
    added = [v1.Event(message_added=said(0, f"n{index}")) for index in range(messages)]
    for index, event in enumerate(added):
        event.message_added.name = f"early-{index}"
        event.message_added.ClearField("sequence")
    await rooms.sessions.commit(Commit(key=key, events=added))
    return key


async def _all(store: Store, key: SessionKey) -> list[v1.Message]:
    return (await store.list_messages(key, Query(1000))).rows


async def test_each_turn_is_shown_what_the_store_has_and_reads_a_long_history_once(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pages, read = Recording(), list[Query](), store.list_messages

    async def counted(key: SessionKey, query: Query, *args: Any, **kwargs: Any) -> Page[v1.Message]:
        pages.append(query)
        return await read(key, query, *args, **kwargs)

    monkeypatch.setattr(store, "list_messages", counted)
    async with asyncio.timeout(60), house(store, clock, model) as rooms:
        key = await _long(rooms)

        async def turn(run: str, text: str = "hi") -> int:
            """Takes a turn, and returns how many pages of the history were read for it."""
            pages.clear()
            await rooms.start(key, text, run, client_tools=[client_tool("look")])
            ended = await rooms.rests(key, run)
            if ended.state == v1.Run.STATE_WAITING:
                (call,) = [part.tool_call for part in (await _all(store, key))[-1].parts if part.HasField("tool_call")]
                result = v1.ToolResult(call_id=call.call_id, result=[v1.Part(text="seen")])
                await rooms.runs.commands.tool_result(key, run, result, Caused())
                await rooms.ended(key, run)
            count = len(pages)
            assert model.shown[-1] == (await _all(store, key))[:-1]
            return count

        assert [1, 0] == [await turn("one"), await turn("two")]
        await rooms.sessions.commit(Commit(key=key, events=[v1.Event(message_added=said(0, "between"))]))
        assert 0 == await turn("three")
        await turn("four", "call")
        assert 0 == await turn("five")
        elsewhere = v1.Message(name="elsewhere", role=USER, parts=[v1.Part(text="e")])
        await store.commit(Commit(key=key, events=[v1.Event(message_added=elsewhere)]))
        assert 1 == await turn("six")
        head = (await rooms.log(key))[-1].sequence
        back = v1.StartRun(session="sessions/s", run_id="seven", rewind_to_sequence=head - 8)
        back.messages.add().parts.add(text="again")
        await rooms.runs.admission.start(TENANT, back)
        await rooms.ended(key, "seven")
        assert model.shown[-1] == (await _all(store, key))[:-1]
        await turn("eight")


async def test_a_start_reads_no_messages_that_are_kept_and_is_right_when_they_are_dropped_meanwhile(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked, make, read_start = Recording(), list[int](), store.commit, store.read_start
    elsewhere = list[v1.Message]()

    async def noted(commit: Commit) -> Committed:
        if commit.claim:
            asked.append(commit.newest)
        return await make(commit)

    async def overtaken(tenant: str, session: str, agent: str) -> tuple[v1.Session | None, v1.Agent | None]:
        """Another process commits between a start's look at the session and its commit."""
        found = await read_start(tenant, session, agent)
        if elsewhere:
            await make(Commit(key=key, events=[v1.Event(message_added=elsewhere.pop())]))
        return found

    monkeypatch.setattr(store, "commit", noted)
    monkeypatch.setattr(store, "read_start", overtaken)
    async with asyncio.timeout(60), house(store, clock, model) as rooms:
        key = await _long(rooms, 2 * FEW)

        async def turn(run: str) -> int:
            """Takes a turn, and returns how many messages the commit of its start was to read."""
            await rooms.start(key, "hi", run)
            await rooms.ended(key, run)
            assert model.shown[-1] == (await _all(store, key))[:-1]
            return asked[-1]

        assert [FEW, 0, 0] == [await turn("one"), await turn("two"), await turn("three")]
        elsewhere.append(v1.Message(name="elsewhere", role=USER, parts=[v1.Part(text="e")]))
        assert [0, 0, 0] == [await turn("four"), await turn("five"), await turn("six")]
        await store.create_agent(TENANT, "window", v1.Agent(llm=v1.LlmAgent(context=v1.Context(max_messages=1))))
        await rooms.start(key, "hi", "window", agent="agents/window")
        await rooms.ended(key, "window")
        assert (1, ["hi"]) == (asked[-1], [message.parts[0].text for message in model.shown[-1]])


async def test_nothing_is_kept_of_a_session_that_is_gone(store: Store, clock: ManualClock) -> None:
    async with asyncio.timeout(60), house(store, clock, Recording()) as rooms:
        key = await _long(rooms)
        for run in ("one", "two"):
            await rooms.start(key, "hi", run)
            await rooms.ended(key, run)
        assert rooms.sessions.transcripts.size > 0
        await rooms.sessions.erase_user(TENANT, "users/ada", Once(TENANT, "", "EraseUser", "r", b"", Answer("erased")))
        assert 0 == rooms.sessions.transcripts.size
