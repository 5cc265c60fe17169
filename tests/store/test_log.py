"""Every store: what a commit promises about the log and all that belongs to it."""

import asyncio

import pytest
from google.protobuf.message import Message
from notecase import v1
from notecase_server.store.contract import Answer, CommandId, Commit, Committed, Duplicate, Query, Replayed, Store

from tests.store.build import (
    APP_STATE,
    EVERYTHING,
    KEY,
    NOTHING,
    RECORD,
    STATE,
    USER_STATE,
    ManualClock,
    add,
    changed,
    contents,
    create,
    edit,
    ended,
    increment,
    once,
    put,
    reborn,
    refused,
    said,
    session_key,
    start,
    started,
)


async def test_sequences_are_dense_from_one(store: Store) -> None:
    await create(store)
    first = await add(store, said("m1"), said("m2"))
    second = await add(store, said("m3"))
    assert [event.sequence for event in first.events] == [1, 2]
    assert [event.sequence for event in second.events] == [3]
    assert second.session.last_sequence == 3
    assert [event.sequence for event in await store.read_events(KEY, 0)] == [1, 2, 3]


async def test_what_is_read_is_what_was_committed(store: Store) -> None:
    await create(store)
    committed = await add(store, said("m1"), changed(put("draft", "x")))
    assert await store.read_events(KEY, 0) == committed.events
    assert await store.get_session(KEY) == committed.session
    assert await store.get_message(KEY, "m1") == committed.messages["m1"]
    assert await store.get_state(STATE, ["draft"]) == committed.state[STATE]


async def test_the_log_is_read_after_a_sequence_and_up_to_a_limit(store: Store) -> None:
    await create(store)
    await add(store, *(said(f"m{number}") for number in range(5)))
    assert [event.sequence for event in await store.read_events(KEY, 2)] == [3, 4, 5]
    assert [event.sequence for event in await store.read_events(KEY, 1, limit=2)] == [2, 3]
    assert await store.read_events(KEY, 5) == []
    assert await store.read_events(KEY, 99) == []
    assert await store.read_events(session_key("acme", "none"), 0) == []


async def test_a_part_of_the_log_ends_at_a_mebibyte(store: Store) -> None:
    await create(store)
    await add(store, *(said(f"m{number}", "x" * 300_000) for number in range(6)))
    assert [event.sequence for event in await store.read_events(KEY, 0)] == [1, 2, 3, 4]
    assert [event.sequence for event in await store.read_events(KEY, 4)] == [5, 6]


async def test_events_are_dated_by_the_clock(store: Store, clock: ManualClock) -> None:
    created = await create(store)
    clock.now += 1
    committed = await add(store, said("m1"))
    assert created.session.create_time.ToMicroseconds() == clock.now - 1
    assert committed.events[0].create_time.ToMicroseconds() == clock.now
    assert committed.messages["m1"].create_time.ToMicroseconds() == clock.now
    assert committed.session.update_time.ToMicroseconds() == clock.now


async def test_concurrent_commits_are_numbered_without_gap_or_repeat(store: Store) -> None:
    await create(store)
    done = await asyncio.gather(*(add(store, said(f"a{n}"), said(f"b{n}")) for n in range(40)))
    assert sorted(event.sequence for committed in done for event in committed.events) == list(range(1, 81))
    for committed in done:
        assert committed.events[1].sequence == committed.events[0].sequence + 1


async def test_a_new_session_has_the_callers_fields_and_the_stores_own(store: Store) -> None:
    made = v1.Session(
        user="users/ada", agent="agents/a", display_name="Case", labels={"k": "v"}, last_sequence=9, etag="forged"
    )
    session = (await store.commit(Commit(key=KEY, create=made))).session
    assert (session.name, session.user, session.agent, session.display_name) == (
        "case",
        "users/ada",
        "agents/a",
        "Case",
    )
    assert dict(session.labels) == {"k": "v"}
    assert (session.last_sequence, session.activity) == (0, v1.Session.ACTIVITY_IDLE)
    assert session.etag not in {"", "forged"}


async def test_a_session_is_created_once(store: Store) -> None:
    await create(store)
    before = await contents(store)
    with refused("ALREADY_EXISTS"):
        await store.commit(Commit(key=KEY, create=v1.Session(), events=[said("m1")]))
    assert await contents(store) == before


async def test_without_a_session_nothing_is_committed(store: Store) -> None:
    with refused("SESSION_NOT_FOUND"):
        await add(store, said("m1"))
    assert await store.get_session(KEY) is None
    assert await store.read_events(KEY, 0) == []


async def test_a_commit_whose_last_event_is_refused_leaves_nothing(store: Store) -> None:
    await create(store)
    await start(store, "r0", said("m0", run="r0"))
    await add(store, changed(put("text", "x")))
    before = await contents(store)
    with refused("STATE_TYPE_MISMATCH"):
        await add(
            store,
            ended("r0"),
            said("m1"),
            changed(put("draft", "x")),
            changed(put("name", "Ada"), state="user"),
            changed(put("policy", "p"), state="app"),
            started("r1"),
            changed(increment("text", 1)),
            claim=True,
            start=RECORD,
            once=once("request"),
            command=CommandId("command", b"d"),
        )
    assert await contents(store) == before
    await store.recall(once("request"))
    await store.recall_command(KEY, CommandId("command", b"d"))


async def test_a_refused_commit_with_create_leaves_no_session(store: Store) -> None:
    with refused("RUN_NOT_FOUND"):
        await store.commit(Commit(key=KEY, create=v1.Session(), events=[said("m1"), ended("nobody")]))
    assert await store.get_session(KEY) is None


async def test_an_answer_that_cannot_be_made_undoes_the_commit(store: Store) -> None:
    """A mistake of the engine's: it asks for the answer about a run that the commit does not touch."""
    await create(store)
    before = await contents(store)
    broken = once("request", Answer("run", "r1"))
    with pytest.raises(KeyError):
        await add(store, said("m1"), once=broken)
    assert await contents(store) == before
    await store.recall(once("request"))


async def test_one_commit_changes_the_states_of_session_user_and_app(store: Store) -> None:
    await create(store)
    committed = await add(
        store,
        changed(put("draft", "x")),
        changed(put("name", "Ada"), state="user"),
        changed(put("policy", "p"), state="app"),
    )
    assert set(committed.state) == {STATE, USER_STATE, APP_STATE}
    assert (await store.get_state(USER_STATE, ["name"])).entries["name"].value.string_value == "Ada"
    assert (await store.get_state(APP_STATE, ["policy"])).entries["policy"].value.string_value == "p"
    assert [event.state_changed.version for event in committed.events] == [1, 1, 1]


async def test_a_session_without_user_has_no_user_state(store: Store) -> None:
    await create(store, user="")
    with refused("INVALID_FIELD"):
        await add(store, changed(put("name", "Ada"), state="user"))
    assert await store.read_events(KEY, 0) == []


async def test_logged_operations_have_lost_their_conditions(store: Store) -> None:
    await create(store)
    committed = await add(store, changed(put("draft", "x", if_version=0)))
    change = committed.events[0].state_changed
    assert not change.ops[0].HasField("if_version")
    assert change.version == 1


async def test_expected_head(store: Store) -> None:
    """if_last_sequence admits the head only, and the refusal tells it."""
    await create(store)
    await add(store, said("m1"), if_last_sequence=0)
    with refused("SEQUENCE_MISMATCH") as caught:
        await add(store, said("m2"), if_last_sequence=0)
    assert caught.value.metadata == {"last_sequence": "1"}
    assert (await add(store, said("m2"), if_last_sequence=1)).session.last_sequence == 2


async def test_of_two_commits_on_one_head_one_wins(store: Store) -> None:
    await create(store)
    done = await asyncio.gather(
        *(add(store, said(f"m{n}"), if_last_sequence=0) for n in range(2)), return_exceptions=True
    )
    assert sorted(isinstance(each, Committed) for each in done) == [False, True]
    assert len(await store.read_events(KEY, 0)) == 1


async def test_a_claim_makes_older_epochs_stale(store: Store) -> None:
    epoch = (await create(store)).epoch
    await add(store, said("m1"), if_epoch=epoch)
    assert await store.claim(KEY, epoch) == epoch + 1
    with refused("OWNER_LOST"):
        await add(store, said("m2"), if_epoch=epoch)
    assert (await add(store, said("m2"), if_epoch=epoch + 1)).epoch == epoch + 1
    assert len(await store.read_events(KEY, 0)) == 2


async def test_of_two_claims_on_one_epoch_one_wins(store: Store) -> None:
    epoch = (await create(store)).epoch
    done = await asyncio.gather(store.claim(KEY, epoch), store.claim(KEY, epoch), return_exceptions=True)
    assert [each for each in done if isinstance(each, int)] == [epoch + 1]
    with refused("OWNER_LOST"):
        await store.claim(KEY, epoch)
    with refused("SESSION_NOT_FOUND"):
        await store.claim(session_key("acme", "none"), epoch)


async def test_a_commit_can_claim_in_the_same_step(store: Store) -> None:
    epoch = (await create(store)).epoch
    assert (await add(store, said("m1"), claim=True)).epoch == epoch + 1
    with refused("OWNER_LOST"):
        await add(store, said("m2"), if_epoch=epoch, claim=True)
    assert (await add(store, if_epoch=epoch + 1)).epoch == epoch + 1


async def test_what_ran_in_a_deleted_session_is_stale_in_the_next_of_its_name(store: Store) -> None:
    await create(store)
    stale = (await start(store, "r1")).epoch
    await store.delete_session(KEY)
    await create(store, reborn(KEY))
    assert (await start(store, "r1", key=reborn(KEY))).epoch == stale
    before = await contents(store, reborn(KEY))
    with refused("SESSION_NOT_FOUND"):
        await add(store, ended("r1"), if_epoch=stale)
    assert await contents(store, reborn(KEY)) == before


async def test_a_repeated_request_gets_the_first_answer(store: Store) -> None:
    await create(store)
    committed = await add(store, said("m1"), once=once("request"))
    before = await contents(store)
    with pytest.raises(Replayed) as caught:
        await add(store, said("m2"), once=once("request"))
    committed.session.name = "sessions/case"
    assert v1.Session.FromString(caught.value.response) == committed.session
    assert await contents(store) == before


async def test_a_request_id_with_another_body_is_refused(store: Store) -> None:
    await create(store)
    await add(store, said("m1"), once=once("request"))
    with refused("REQUEST_ID_REUSED") as caught:
        await add(store, said("m2"), once=once("request", digest=b"other"))
    assert caught.value.metadata == {"request_id": "request"}


async def test_request_ids_belong_to_their_rpc(store: Store) -> None:
    await create(store)
    await add(store, said("m1"), once=once("request", rpc="A"))
    assert (await add(store, said("m2"), once=once("request", rpc="B"))).session.last_sequence == 2


async def test_a_failed_request_is_not_remembered(store: Store) -> None:
    await create(store)
    with refused("SEQUENCE_MISMATCH"):
        await add(store, said("m1"), if_last_sequence=7, once=once("request"))
    assert (await add(store, said("m1"), once=once("request"))).session.last_sequence == 1


async def test_a_request_outlives_what_it_made_without_its_answer(store: Store) -> None:
    """A repeat that comes late does not make a deleted session again, and what it was answered is gone."""
    made = Commit(key=KEY, create=v1.Session(), once=once("create"))
    await store.commit(made)
    await store.delete_session(KEY, once=once("delete", NOTHING))
    with refused("SESSION_NOT_FOUND"):
        await store.commit(made)
    with refused("SESSION_NOT_FOUND"):
        await store.recall(once("create"))
    with refused("REQUEST_ID_REUSED"):
        await store.recall(once("create", digest=b"another"))
    with pytest.raises(Replayed):
        await store.delete_session(KEY, once=once("delete", NOTHING))
    assert await store.get_session(KEY) is None


async def test_a_request_comes_before_every_other_condition(store: Store) -> None:
    commit = Commit(key=KEY, create=v1.Session(), once=once("r"), command=CommandId("c", b"d"), if_last_sequence=0)
    await store.commit(commit)
    with pytest.raises(Replayed):
        await store.commit(commit)


async def test_of_two_requests_with_one_id_one_is_carried_out(store: Store) -> None:
    await create(store)
    done = await asyncio.gather(
        *(add(store, said(f"m{n}"), once=once("request")) for n in range(2)), return_exceptions=True
    )
    assert [type(each) for each in done] == [Committed, Replayed]
    assert len(await store.read_events(KEY, 0)) == 1


async def test_old_requests_are_forgotten(store: Store, clock: ManualClock) -> None:
    await create(store)
    await add(store, said("m1"), once=once("old"))
    clock.now += 100
    await add(store, said("m2"), once=once("new"))
    assert await store.forget_requests(clock.now) == 1
    await store.recall(once("old"))
    with pytest.raises(Replayed):
        await store.recall(once("new"))
    assert await store.forget_requests(clock.now) == 0


async def test_more_requests_than_one_transaction_drops_are_forgotten(store: Store, clock: ManualClock) -> None:
    await create(store)
    await asyncio.gather(*(add(store, once=once(f"r{n}")) for n in range(2100)))
    assert await store.forget_requests(clock.now + 1) == 2100


async def test_a_repeated_command_is_applied_once(store: Store) -> None:
    await create(store)
    await start(store, "r1", said("m1", run="r1"), command=CommandId("start", b"d"))
    with pytest.raises(Duplicate) as caught:
        await add(store, said("m2"), command=CommandId("start", b"d"))
    assert (caught.value.sequence, caught.value.run) == (2, "r1")
    with refused("REQUEST_ID_REUSED") as reused:
        await add(store, said("m2"), command=CommandId("start", b"other"))
    assert reused.value.metadata == {"command_id": "start"}
    assert len(await store.read_events(KEY, 0)) == 2


async def test_commands_belong_to_their_session_and_go_with_it(store: Store) -> None:
    other = session_key("acme", "other")
    command = CommandId("command", b"d")
    await create(store)
    await create(store, other)
    await add(store, said("m1"), command=command)
    await add(store, said("m1"), command=command, key=other)
    await store.delete_session(KEY)
    await create(store, reborn(KEY))
    assert (await add(store, said("m1"), command=command, key=reborn(KEY))).session.last_sequence == 1


async def test_recall_tells_a_repeat_and_else_nothing(store: Store) -> None:
    await create(store)
    request, command = once("request"), CommandId("command", b"d")
    await store.recall(None)
    await store.recall(request)
    await store.recall_command(KEY, None)
    await store.recall_command(KEY, command)
    await add(store, said("m1"), once=request, command=command)
    with pytest.raises(Replayed):
        await store.recall(request)
    with pytest.raises(Duplicate):
        await store.recall_command(KEY, command)
    with refused("REQUEST_ID_REUSED"):
        await store.recall(request._replace(digest=b"other"))
    with refused("REQUEST_ID_REUSED"):
        await store.recall_command(KEY, CommandId("command", b"other"))


async def test_metadata_is_edited_under_an_etag(store: Store, clock: ManualClock) -> None:
    created = (await create(store)).session
    clock.now += 5
    change = edit(display_name="Case", agent="agents/b", labels={"k": "v"})
    change.session.user, change.session.last_sequence = "users/eve", 9
    edited = await store.edit_session(KEY, change, if_etag=created.etag)
    assert (edited.display_name, edited.agent, dict(edited.labels)) == ("Case", "agents/b", {"k": "v"})
    assert (edited.user, edited.last_sequence) == ("users/ada", 0)
    assert edited.update_time.ToMicroseconds() == clock.now
    assert edited == await store.get_session(KEY)
    with refused("ETAG_MISMATCH") as caught:
        await store.edit_session(KEY, change, if_etag=created.etag)
    assert caught.value.metadata == {"etag": edited.etag}
    await add(store, said("m1"))
    await store.edit_session(KEY, edit(labels={}), if_etag=edited.etag)
    cleared = await store.get_session(KEY)
    assert cleared is not None
    assert (dict(cleared.labels), cleared.display_name, cleared.last_sequence) == ({}, "Case", 1)


async def test_an_edit_that_is_refused_changes_nothing(store: Store) -> None:
    created = (await create(store)).session
    with refused("ETAG_MISMATCH"):
        await store.edit_session(KEY, edit(display_name="half"), if_etag="stale", once=once("edit"))
    assert await store.get_session(KEY) == created
    await store.recall(once("edit"))
    with refused("SESSION_NOT_FOUND"):
        await store.edit_session(session_key("acme", "none"), edit(display_name="half"))


async def test_a_repeated_edit_is_not_made_again(store: Store) -> None:
    await create(store)
    first = await store.edit_session(KEY, edit(display_name="first"), once=once("edit"))
    await store.edit_session(KEY, edit(display_name="second"))
    with pytest.raises(Replayed) as caught:
        await store.edit_session(KEY, edit(display_name="first"), once=once("edit"))
    first.name = "sessions/case"
    assert v1.Session.FromString(caught.value.response) == first
    now = await store.get_session(KEY)
    assert now is not None
    assert now.display_name == "second"


async def test_a_deleted_session_leaves_nothing_but_what_others_share(store: Store) -> None:
    await create(store)
    await start(store, "r1", said("m1", run="r1"), changed(put("draft", "x")))
    await add(store, changed(put("name", "Ada"), state="user"))
    session = await store.get_session(KEY)
    assert session is not None
    with refused("ETAG_MISMATCH"):
        await store.delete_session(KEY, if_etag="stale")
    await store.delete_session(KEY, if_etag=session.etag)

    assert await store.get_session(KEY) is None
    assert await store.get_message(KEY, "m1") is None
    assert await store.get_run(KEY, "r1") is None
    assert await store.active_runs() == []
    assert await store.read_events(KEY, 0) == []
    assert (await store.list_messages(KEY, EVERYTHING)).rows == []
    assert (await store.list_runs("acme", None, EVERYTHING)).rows == []
    assert await store.get_state(STATE, ["draft"]) == v1.State()
    assert (await store.get_state(USER_STATE, ["name"])).version == 1
    with refused("SESSION_NOT_FOUND"):
        await store.delete_session(KEY)
    with refused("SESSION_NOT_FOUND"):
        await add(store, said("m2"))


async def test_a_session_with_the_name_of_a_deleted_one_starts_empty(store: Store, clock: ManualClock) -> None:
    first = (await create(store)).session
    await start(store, "r1", said("m1", run="r1"), changed(put("draft", "x")))
    await store.delete_session(KEY)
    clock.now += 1
    key = reborn(KEY)
    second = await create(store, key)
    assert second.session.last_sequence == 0
    assert second.session.etag != first.etag
    again = await start(store, "r1", said("m1", run="r1"), changed(put("draft", "y")), key=key)
    assert again.session.last_sequence == 3
    assert again.state[key.state].version == 1


async def test_deletion_and_commits_at_once_come_in_some_order(store: Store) -> None:
    await create(store)
    done = await asyncio.gather(
        *(add(store, said(f"a{n}")) for n in range(5)),
        store.delete_session(KEY),
        *(add(store, said(f"b{n}")) for n in range(5)),
        return_exceptions=True,
    )
    committed = [each for each in done if isinstance(each, Committed)]
    assert [each.session.last_sequence for each in committed] == list(range(1, len(committed) + 1))
    assert await store.get_session(KEY) is None
    assert await store.read_events(KEY, 0) == []


async def test_changes_of_a_callers_message_do_not_change_the_stored_one(store: Store) -> None:
    given = said("m1")
    labels = v1.Session(labels={"k": "v"})
    await store.commit(Commit(key=KEY, create=labels))
    committed = await add(store, given, changed(put("draft", "x")))
    assert (given.sequence, given.message_added.sequence) == (0, 0)
    before = await contents(store)
    expected = {name: str(rows) for name, rows in before.items()}

    given.message_added.parts[0].text = labels.labels["k"] = "changed"
    handed_out: list[Message] = [committed.session, *committed.events]
    handed_out += [*committed.messages.values(), *committed.state.values()]
    for rows in before.values():
        handed_out += rows if isinstance(rows, list) else [rows]
    for row in handed_out:
        row.Clear()
    assert {name: str(rows) for name, rows in (await contents(store)).items()} == expected


async def test_a_closed_store_refuses_everything_and_closes_again(store: Store) -> None:
    await create(store)
    await store.close()
    with refused("STORE_UNAVAILABLE"):
        await store.get_session(KEY)
    with refused("STORE_UNAVAILABLE"):
        await add(store, said("m1"))
    await store.close()


async def test_a_store_has_a_secret_of_32_bytes(store: Store) -> None:
    assert len(store.secret) == 32


async def test_a_commit_returns_the_newest_messages_as_it_leaves_them(store: Store) -> None:
    await create(store)
    await add(store, *(said(f"m{number}") for number in range(4)))
    committed = await add(store, said("m4"), newest=2)
    assert committed.newest == await store.list_messages(KEY, Query(2), newest_first=True)
    assert (await add(store, said("m5"))).newest is None
