"""Every store: agents, their revisions, and what remains of a deleted one."""

from typing import Any, cast

import pytest
from notecase import v1
from notecase_server.store import steps
from notecase_server.store.base import TableStore
from notecase_server.store.contract import Answer, Query, Replayed, Store

from tests.store.build import EVERYTHING, NOTHING, ManualClock, create, names, once, refused, session_key
from tests.store.fixtures import looks_inside

MADE = Answer("agent")


def titled(title: str) -> v1.Agent:
    return v1.Agent(display_name=title, llm=v1.LlmAgent(instruction="Deduce."))


async def test_a_new_agent_is_revision_1(store: Store, clock: ManualClock) -> None:
    given = v1.Agent(display_name="S", name="forged", revision=9, etag="forged")
    made = await store.create_agent("acme", "sherlock", given)
    assert (made.name, made.revision, made.display_name) == ("agents/sherlock", 1, "S")
    assert made.create_time.ToMicroseconds() == made.update_time.ToMicroseconds() == clock.now
    assert made.etag not in {"", "forged"}
    assert given.name == "forged"
    assert await store.get_agent("acme", "sherlock") == made
    with refused("ALREADY_EXISTS"):
        await store.create_agent("acme", "sherlock", titled("T"))


async def test_an_edit_makes_the_next_revision_and_keeps_the_others(store: Store, clock: ManualClock) -> None:
    first = await store.create_agent("acme", "sherlock", titled("one"))
    clock.now += 5
    given = v1.Agent(display_name="two", name="forged", revision=99, etag="forged")
    given.create_time.FromMicroseconds(1)
    second = await store.edit_agent("acme", "sherlock", given, if_revision=1)
    assert (second.name, second.revision, second.display_name) == ("agents/sherlock", 2, "two")
    assert second.create_time == first.create_time
    assert second.update_time.ToMicroseconds() == clock.now
    assert second.etag not in {first.etag, "forged"}
    assert await store.get_agent("acme", "sherlock") == second
    assert await store.get_agent("acme", "sherlock", 1) == first
    assert await store.get_agent("acme", "sherlock", 2) == second
    assert await store.get_agent("acme", "sherlock", 3) is None


async def test_an_edit_of_a_revision_that_is_not_the_newest_is_refused_and_remembers_nothing(store: Store) -> None:
    await store.create_agent("acme", "sherlock", titled("one"))
    second = await store.edit_agent("acme", "sherlock", titled("two"), if_revision=1)
    for stale in (0, 1, 3):
        with refused("ETAG_MISMATCH") as caught:
            await store.edit_agent("acme", "sherlock", titled("late"), if_revision=stale, once=once("edit", MADE))
        assert caught.value.metadata == {"etag": second.etag}
    assert await store.get_agent("acme", "sherlock") == second
    third = await store.edit_agent("acme", "sherlock", titled("late"), if_revision=2, once=once("edit", MADE))
    assert third.revision == 3
    with pytest.raises(Replayed):
        await store.edit_agent("acme", "sherlock", titled("late"), if_revision=2, once=once("edit", MADE))


async def test_an_edit_that_changes_nothing_makes_no_revision(store: Store, clock: ManualClock) -> None:
    """It is answered, and remembered, with the newest revision as it is; a stale one is refused all the same."""
    given = v1.Agent(display_name="S", llm=v1.LlmAgent(tools=[v1.Tool(name="a")]), labels={"a": "1", "b": "2"})
    first = await store.create_agent("acme", "sherlock", given)
    clock.now += 5
    same = v1.Agent(display_name="S", llm=given.llm, labels={"b": "2", "a": "1"}, name="x", revision=7, etag="x")
    assert await store.edit_agent("acme", "sherlock", same, if_revision=1, once=once("edit", MADE)) == first
    with pytest.raises(Replayed) as caught:
        await store.edit_agent("acme", "sherlock", same, if_revision=1, once=once("edit", MADE))
    assert v1.Agent.FromString(caught.value.response) == first
    assert (await store.list_agent_revisions("acme", "sherlock", EVERYTHING)).rows == [first]
    with refused("ETAG_MISMATCH"):
        await store.edit_agent("acme", "sherlock", same, if_revision=2)
    for change in (v1.Agent(), v1.Agent(llm=v1.LlmAgent()), v1.Agent(labels={"a": "1"})):
        newest = await store.get_agent("acme", "sherlock")
        assert newest is not None
        changed = await store.edit_agent("acme", "sherlock", change, if_revision=newest.revision)
        assert changed.revision == newest.revision + 1


async def test_a_missing_agent_is_created_by_an_edit_of_no_revision(store: Store) -> None:
    with refused("ETAG_MISMATCH") as caught:
        await store.edit_agent("acme", "new", titled("N"), if_revision=1)
    assert caught.value.metadata == {"etag": ""}
    made = await store.edit_agent("acme", "new", titled("N"), if_revision=0)
    assert (made.revision, made.display_name) == (1, "N")
    assert await store.get_agent("acme", "new") == made
    await store.delete_agent("acme", "new")
    again = await store.edit_agent("acme", "new", titled("N"), if_revision=0)
    assert again.revision == 2


async def test_a_deleted_agent_leaves_its_last_number(store: Store) -> None:
    await store.create_agent("acme", "sherlock", titled("one"))
    second = await store.edit_agent("acme", "sherlock", titled("two"), if_revision=1)
    with refused("ETAG_MISMATCH"):
        await store.delete_agent("acme", "sherlock", if_etag="stale")
    await store.delete_agent("acme", "sherlock", if_etag=second.etag, once=once("delete", NOTHING))
    assert await store.get_agent("acme", "sherlock") is None
    assert await store.get_agent("acme", "sherlock", 1) is None
    assert (await store.list_agents("acme", EVERYTHING)).rows == []
    assert (await store.list_agent_revisions("acme", "sherlock", EVERYTHING)).rows == []
    with refused("AGENT_NOT_FOUND"):
        await store.delete_agent("acme", "sherlock")
    with pytest.raises(Replayed):
        await store.delete_agent("acme", "sherlock", once=once("delete", NOTHING))
    again = await store.create_agent("acme", "sherlock", titled("three"))
    assert again.revision == 3
    assert again.etag != second.etag
    assert names((await store.list_agent_revisions("acme", "sherlock", EVERYTHING)).rows) == ["agents/sherlock"]


@looks_inside
async def test_a_late_sweep_removes_nothing_of_another_tenant_of_that_name(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tenant of the agent is erased during the sweep, and made again: revisions begin at 1 once more."""
    await store.create_agent("acme", "sherlock", titled("one"))
    await store.edit_agent("acme", "sherlock", titled("two"), if_revision=1)
    await store.delete_agent("acme", "sherlock")
    tables = cast(TableStore, store)
    write, once_more = tables._write, iter([True])

    async def late(step: Any, *within: Any, **named: Any) -> Any:
        if getattr(step, "func", None) is steps.delete_revisions and next(once_more, False):
            while not await store.erase_tenant("acme"):
                pass
            await store.create_agent("acme", "sherlock", titled("new"))
        return await write(step, *within, **named)

    monkeypatch.setattr(tables, "_write", late)
    await store.sweep_agents()
    found = await store.get_agent("acme", "sherlock")
    assert found is not None
    assert (found.display_name, found.revision) == ("new", 1)


async def test_a_repeated_creation_gets_the_first_answer(store: Store) -> None:
    made = await store.create_agent("acme", "sherlock", titled("one"), once=once("create", MADE))
    await store.delete_agent("acme", "sherlock")
    with pytest.raises(Replayed) as caught:
        await store.create_agent("acme", "sherlock", titled("one"), once=once("create", MADE))
    assert v1.Agent.FromString(caught.value.response) == made
    with refused("REQUEST_ID_REUSED"):
        await store.create_agent("acme", "sherlock", titled("two"), once=once("create", MADE, digest=b"other"))
    assert await store.get_agent("acme", "sherlock") is None


async def test_agents_are_listed_by_id_at_their_newest_revision(store: Store) -> None:
    for agent_id in ("c", "a", "b.1", "b"):
        await store.create_agent("acme", agent_id, titled("one"))
    await store.edit_agent("acme", "b", titled("two"), if_revision=1)
    first = await store.list_agents("acme", Query(3))
    assert [(agent.name, agent.revision) for agent in first.rows] == [
        ("agents/a", 1),
        ("agents/b", 2),
        ("agents/b.1", 1),
    ]
    assert first.next == ("b.1",)
    rest = await store.list_agents("acme", Query(3, first.next))
    assert (names(rest.rows), rest.next) == (["agents/c"], None)


async def test_revisions_are_listed_newest_first(store: Store) -> None:
    await store.create_agent("acme", "a", titled("one"))
    for revision in range(1, 5):
        await store.edit_agent("acme", "a", titled(f"after {revision}"), if_revision=revision)
    first = await store.list_agent_revisions("acme", "a", Query(2))
    assert ([agent.revision for agent in first.rows], first.next) == ([5, 4], (4,))
    rest = await store.list_agent_revisions("acme", "a", Query(9, first.next))
    assert ([agent.revision for agent in rest.rows], rest.next) == ([3, 2, 1], None)
    assert (await store.list_agent_revisions("acme", "none", Query(9))).rows == []


async def test_pages_of_agents_end_at_a_mebibyte(store: Store) -> None:
    large = titled("x" * 600_000)
    for agent_id in ("a", "b", "c"):
        await store.create_agent("acme", agent_id, large)
    page = await store.list_agents("acme", EVERYTHING)
    assert (names(page.rows), page.next) == (["agents/a", "agents/b"], ("b",))
    for revision in (1, 2):
        await store.edit_agent("acme", "a", titled(str(revision) * 600_000), if_revision=revision)
    revisions = await store.list_agent_revisions("acme", "a", EVERYTHING)
    assert ([agent.revision for agent in revisions.rows], revisions.next) == ([3, 2], (2,))


async def test_a_start_reads_its_session_and_the_agent_that_is_meant(store: Store) -> None:
    """That which it names, at a revision or the newest, or else the session's; what is not there is None."""
    for revision, instruction in enumerate(("one", "two")):
        await store.edit_agent("acme", "clerk", v1.Agent(llm=v1.LlmAgent(instruction=instruction)), revision)
    await store.create_agent("acme", "a", v1.Agent(llm=v1.LlmAgent(instruction="other")))
    await store.create_agent("acme", "gone", v1.Agent())
    await store.delete_agent("acme", "gone")
    for name, agent in (
        ("newest", "agents/clerk"),
        ("pinned", "agents/clerk@1"),
        ("none", ""),
        ("lost", "agents/gone"),
    ):
        await create(store, session_key("acme", name), agent=agent)

    async def read(session: str, agent: str = "", tenant: str = "acme") -> tuple[str, str]:
        row, found = await store.read_start(tenant, session, agent)
        return row.name if row else "", found.llm.instruction if found else "none"

    assert ("newest", "two") == await read("newest")
    assert ("pinned", "one") == await read("pinned")
    assert ("none", "none") == await read("none")
    assert ("lost", "none") == await read("lost")
    assert ("none", "two") == await read("none", "agents/clerk")
    assert ("newest", "one") == await read("newest", "agents/clerk@1")
    assert ("newest", "none") == await read("newest", "agents/clerk@3")
    assert ("newest", "other") == await read("newest", "agents/a")
    assert ("newest", "none") == await read("newest", "agents/gone")
    assert ("", "two") == await read("nobody", "agents/clerk@2")
    assert ("", "none") == await read("newest", tenant="globex")
