"""A store that an older schema was left in opens: everything is there, and until all of it is converted nothing is
changed."""

import base64
import gzip
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from notecase import v1
from notecase_server import names
from notecase_server.store import bindings
from notecase_server.store.contract import Answer, Once, Query, Replayed, Scope, SessionKey, StoreOpenError
from notecase_server.store.sqlite import file as sqlite_file
from notecase_server.store.sqlite.schema import VERSION
from notecase_server.store.sqlite.store import SqliteStore
from structlog.testing import capture_logs

from tests.store.build import ManualClock, add, ended, refused, said
from tests.store.test_sqlite import full_disk

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "fixtures"
ALL = Query(1000)
TABLES = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"


def left_by(schema: int | str, file: Path) -> Path:
    """The store as a server of that schema left it."""
    file.write_bytes(gzip.decompress((FIXTURES / f"schema-{schema}.db.gz").read_bytes()))
    return file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return left_by(1, tmp_path / "store.db")


@pytest.fixture(params=[1, 2, 3, 4, 5, 6])
def older(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same rows, in each older schema."""
    return left_by(request.param, tmp_path / "store.db")


@pytest.fixture(params=[2, 3, 4, 5, 6])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small store that a server of a later schema than the first closed."""
    return left_by(f"{request.param}-small", tmp_path / f"{request.param}.db")


@pytest.fixture
def large(path: Path) -> Path:
    """One that does not fit into SQLite's memory, so that much of its conversion is written before it is committed."""
    event = said("m", "x" * 4000)
    with sqlite3.connect(path) as connection:
        connection.execute(
            """WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 3000)
                INSERT INTO events SELECT 'default', 'agentless', n, 0, ? FROM numbers""",
            (event.SerializeToString(),),
        )
    connection.close()
    return path


@contextmanager
def migrating(path: Path, rows: int) -> Iterator[subprocess.Popen[str]]:
    """A process that converts the store; see migrate.py. Killed at the end, whatever it does."""
    command = [sys.executable, str(HERE / "migrate.py"), str(path), str(rows)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as running:
        try:
            yield running
        finally:
            running.kill()


def go_on(running: subprocess.Popen[str]) -> str:
    """Lets it go to its next line; empty when there is none."""
    assert running.stdin is not None
    assert running.stdout is not None
    running.stdin.write("\n")
    running.stdin.flush()
    return running.stdout.readline().rstrip("\n")


def first_line(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().rstrip("\n")


def dumped(path: Path) -> str:
    """A digest of all that is in the file, its schema too."""
    digest = hashlib.sha256()
    with sqlite3.connect(path) as connection:
        for statement in connection.iterdump():
            digest.update(statement.encode())
        digest.update(str(connection.execute("PRAGMA user_version").fetchone()).encode())
    connection.close()
    return digest.hexdigest()


def facts(path: Path, statement: str) -> list[Any]:
    with sqlite3.connect(path) as connection:
        found = connection.execute(statement).fetchall()
    connection.close()
    return found


def schema(path: Path) -> dict[str, str]:
    rows = facts(path, "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {name: " ".join(sql.split()).replace("( ", "(").replace('"', "") for name, sql in rows}


async def refusal(path: Path) -> str:
    with pytest.raises(StoreOpenError) as caught:
        await SqliteStore.open(path, ManualClock())
    return str(caught.value)


def told(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


async def told_session(store: SqliteStore, key: SessionKey, row: v1.Session) -> dict[str, Any]:
    events: list[v1.Event] = []
    while page := await store.read_events(key, len(events)):
        events += page
    messages = (await store.list_messages(key, ALL, superseded=True)).rows
    runs = []
    for listed in (await store.list_runs(key.tenant, key, ALL)).rows:
        found = await store.get_run(key, listed.name.rpartition("/")[2])
        assert found is not None
        runs.append(told(names.render_run(key.session, found[0])))
    user = row.user
    return {
        "session": told(names.render_session(row)),
        "events": [told(names.render_event(key.session, user, event)) for event in events],
        "messages": [told(names.render_message(key.session, message)) for message in messages],
        "runs": runs,
        "state": await told_state(store, key.state, f"sessions/{key.session}/state"),
    }


async def told_state(store: SqliteStore, scope: Scope, name: str) -> dict[str, Any]:
    state, _ = await store.list_state(scope, ALL)
    state.name = name
    return told(state)


def without(found: Any, *dropped: str) -> Any:
    """All of it but the fields named, however deep."""
    if isinstance(found, dict):
        return {key: without(value, *dropped) for key, value in found.items() if key not in dropped}
    return [without(each, *dropped) for each in found] if isinstance(found, list) else found


def known() -> dict[str, Any]:
    """What the server that left the store would have answered, under the names of now."""
    text = gzip.decompress((FIXTURES / "schema-1.json.gz").read_bytes()).decode()
    found: dict[str, Any] = without(json.loads(text.replace('"running_time"', '"running_duration"')), "remembered")
    return found


@pytest.mark.parametrize("tenant", ["default", "other"])
async def test_every_session_is_what_it_was(older: Path, tenant: str) -> None:
    """But for its uid and what the open calls of its runs are bound to, and without what was remembered of answers."""
    was = known()[tenant]
    store = await SqliteStore.open(older, ManualClock())
    rows = (await store.list_sessions(tenant, ALL)).rows
    uids = {row.name: row.uid for row in rows}
    is_now = {}
    for row in rows:
        key = SessionKey(tenant, row.name, row.uid)
        assert (await store.find_session(tenant, row.name)) == row
        is_now[names.session(key.session)] = without(await told_session(store, key, row), "uid", "binding")
    assert is_now.keys() == was["sessions"].keys()
    for name, session in is_now.items():
        assert session == was["sessions"][name], name
    active = [
        (run.key.session, run.run.name, run.agent, run.epoch, run.deaths, run.released)
        for run in await store.active_runs()
        if run.key.tenant == tenant
    ]
    await store.close()
    assert [(UUID(uid).version, str(UUID(uid))) for uid in uids.values()] == [(4, uid) for uid in uids.values()]
    assert len(set(uids.values())) == len(rows)
    assert sorted((s, r, a.name, a.revision, e, d, f) for s, r, a, e, d, f in active) == sorted(
        (*row, 0, False) for row in was["active_runs"]
    )


@pytest.mark.parametrize("tenant", ["default", "other"])
async def test_what_lies_outside_of_sessions_is_what_it_was(older: Path, tenant: str) -> None:
    was = known()[tenant]
    store = await SqliteStore.open(older, ManualClock())
    for name, revisions in was["agents"].items():
        found = await store.list_agent_revisions(tenant, name.removeprefix("agents/"), ALL)
        assert [told(revision) for revision in found.rows] == revisions
    for name, state in was["states"].items():
        scope = names.parse_state(tenant, name)
        assert scope is not None
        assert await told_state(store, scope, name) == state
    for sha256, content in was["blobs"].items():
        assert (await store.read_blob(tenant, sha256, 0)).decode("latin-1") == content
        assert await store.get_blob(tenant, sha256) is not None
    for upload_id, upload in was["uploads"].items():
        kept = await store.get_upload(tenant, upload_id)
        assert kept is not None
        assert told(kept) == upload
    await store.close()
    assert store.secret == bytes(32)
    uploaders = facts(older, f"SELECT sha256, subject FROM uploaders WHERE tenant = '{tenant}'")
    assert sorted(uploaders) == sorted((sha256, "") for sha256 in was["blobs"])


async def test_requests_and_commands_that_were_carried_out_are_known(path: Path) -> None:
    """Each is answered in the words of the first time; those about what was deleted have no answer."""
    digests = {
        (tenant, rpc, request_id): digest
        for tenant, rpc, request_id, digest in facts(path, "SELECT tenant, rpc, request_id, digest FROM requests")
    }
    commands = facts(path, "SELECT tenant, session, command_id, sequence, run FROM commands")
    store = await SqliteStore.open(path, ManualClock())
    for tenant, was in known().items():
        for rpc, request_id, _, response in was["requests"]:
            once = Once(tenant, "", rpc, request_id, digests.pop((tenant, rpc, request_id)), Answer("nothing"))
            if response is None and rpc != "/notecase.v1.StateService/UpdateState":
                with refused("SESSION_NOT_FOUND"):
                    await store.recall(once)
            else:
                with pytest.raises(Replayed) as replayed:
                    await store.recall(once)
                assert replayed.value.response == base64.b64decode(response or "")
    assert digests == {}
    await store.close()
    now = "SELECT c.tenant, session, command_id, sequence, run FROM commands c JOIN session_names n USING (tenant, uid)"
    assert sorted(facts(path, now)) == sorted(commands)


async def test_an_answer_goes_with_the_session_or_user_it_is_about(path: Path) -> None:
    store = await SqliteStore.open(path, ManualClock())
    row = await store.find_session("default", "talk")
    assert row is not None
    await store.delete_session(SessionKey("default", "talk", row.uid))
    await store.sweep_sessions()
    await store.close()
    left = facts(path, "SELECT tenant, about FROM requests WHERE response IS NOT NULL AND about LIKE '%/talk'")
    assert left == [("other", "sessions/talk")] * 2
    assert facts(path, "SELECT owner FROM requests WHERE about LIKE 'users/%' ORDER BY 1") == [
        ("users/ada",),
        ("users/erased",),
    ]


async def test_every_open_call_is_bound_wherever_it_is_kept(path: Path) -> None:
    """To the declaration that it meant: that with the longer prefix, where several fit."""
    meant = {
        "weigh": (7, ""),
        "measure": (10, ""),
        "ask_user": (6, "ask_user"),
        "slow_retry": (3, "linger"),
        "slow_fail": (4, "linger"),
        "slow_ask": (5, "linger"),
        "desk_pay_wait": (9, "desk/wait"),
        "wait": (0, "desk/wait"),
    }
    store = await SqliteStore.open(path, ManualClock())
    seen = set()
    for active in await store.active_runs():
        calls = [*active.run.pending_calls, *(request.call for request in active.run.pending_inputs)]
        for message in (await store.list_messages(active.key, ALL)).rows:
            if message.run == active.run.name:
                calls += [part.tool_call for part in message.parts if 1 <= part.tool_call.outcome <= 2]
        for call in calls:
            seen.add(call.tool)
            mcp = call.binding.mcp
            implementation = f"{mcp.server}/{mcp.tool}" if mcp.server else call.binding.function
            assert (call.binding.declaration, implementation) == meant[call.tool]
            assert len(call.binding.digest) == 32
    await store.close()
    assert seen == meant.keys()


def declaring(*tools: v1.Tool) -> v1.Agent:
    return v1.Agent(llm=v1.LlmAgent(tools=tools))


def mcp(name: str, server: str, *tools: str) -> v1.Tool:
    return v1.Tool(name=name, mcp=v1.McpTool(server=server, tools=tools))


@pytest.mark.parametrize(
    ("name", "index", "server", "tool"),
    [
        ("pay", 1, "", ""),
        ("pay_all", 0, "bank", "all"),
        ("pay_all_now", 3, "vault", "now"),
        ("other", 4, "rest", "other"),
        ("shop_a_b", 5, "shop", "a.b"),
        ("shop_c", 4, "rest", "shop_c"),
        ("pay_", 4, "rest", "pay_"),
    ],
)
def test_a_name_means_its_own_tool_then_the_longest_prefix(name: str, index: int, server: str, tool: str) -> None:
    function = v1.Tool(name="pay", server=v1.ServerTool(function="act"))
    agent = declaring(
        mcp("pay", "bank"),
        function,
        mcp("pa", "none"),
        mcp("pay_all", "vault"),
        mcp("", "rest"),
        mcp("shop", "shop", "a.b"),
    )
    binding = bindings.by_name(agent, v1.Run(), name)
    assert binding is not None
    assert (binding.declaration, binding.mcp.server, binding.mcp.tool) == (index, server, tool)


def test_a_name_that_no_tool_has_means_nothing() -> None:
    agent = declaring(v1.Tool(name="pay", server=v1.ServerTool(function="act")), mcp("desk", "desk", "echo"))
    assert [bindings.by_name(agent, v1.Run(), name) for name in ("pa", "desk", "desk_", "desk_wait", "")] == [None] * 5


async def test_a_converted_file_has_the_schema_of_a_new_one(older: Path, tmp_path: Path) -> None:
    for file in (older, tmp_path / "new.db"):
        await (await SqliteStore.open(file, ManualClock())).close()
    assert schema(older) == schema(tmp_path / "new.db")
    assert facts(older, "PRAGMA integrity_check") == [("ok",)]
    assert facts(older, "PRAGMA user_version") == [(VERSION,)]
    assert facts(older, "PRAGMA application_id") == [(sqlite_file.APPLICATION_ID,)]
    converted = dumped(older)
    await (await SqliteStore.open(older, ManualClock())).close()
    assert dumped(older) == converted


async def test_events_keep_their_bytes(path: Path) -> None:
    before = facts(path, "SELECT tenant, session, sequence, tells_past, body FROM events")
    await (await SqliteStore.open(path, ManualClock())).close()
    after = facts(
        path, "SELECT tenant, session, sequence, tells_past, body FROM events JOIN session_names USING (tenant, uid)"
    )
    assert sorted(after) == sorted(before)


@pytest.mark.parametrize("lines", [1, 2, 3, 4])
async def test_a_migration_that_is_killed_leaves_the_file_as_it_was(large: Path, lines: int) -> None:
    """The next one does all of it."""
    before, events = dumped(large), facts(large, "SELECT count(*) FROM events")
    with migrating(large, 1000) as running:
        seen = [first_line(running), *(go_on(running) for _ in range(lines - 1))]
        assert seen == [f"1 {done * 1000} 3594 store_migrating" for done in range(lines)]
        assert "in use" in await refusal(large)
    if lines > 2:
        assert Path(f"{large}-wal").stat().st_size > 1 << 20
    assert dumped(large) == before
    await (await SqliteStore.open(large, ManualClock())).close()
    assert facts(large, "SELECT count(*) FROM events") == events
    assert facts(large, "PRAGMA integrity_check") == [("ok",)]


async def test_the_log_says_that_a_conversion_begins(older: Path) -> None:
    """Before its work, which takes minutes for a large file."""
    version = facts(older, "PRAGMA user_version")[0][0]
    with capture_logs() as lines:
        await (await SqliteStore.open(older, ManualClock())).close()
    told = [(line["event"], line["schema"]) for line in lines if line["event"].startswith("store_migrat")]
    assert [("store_migrating", version), ("store_migrated", VERSION)] == told


async def test_a_migration_is_durable_when_it_is_logged(path: Path) -> None:
    with migrating(path, 1000) as running:
        assert first_line(running) == "1 0 594 store_migrating"
        assert go_on(running) == f"{VERSION} store_migrated"
    assert facts(path, "PRAGMA user_version") == [(VERSION,)]
    assert facts(path, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("size", [1 << 12, 1 << 20, 12 << 20])
async def test_a_migration_that_finds_the_disk_full_leaves_the_file_as_it_was(large: Path, size: int) -> None:
    before = dumped(large)
    with full_disk(size):
        assert f"{large} cannot be used as a store" in await refusal(large)
    assert dumped(large) == before
    await (await SqliteStore.open(large, ManualClock())).close()
    assert facts(large, "PRAGMA user_version") == [(VERSION,)]


@pytest.mark.parametrize("size", [1 << 12, 1 << 13])
async def test_a_conversion_of_the_schema_before_that_finds_the_disk_full_leaves_the_file_as_it_was(
    tmp_path: Path, size: int
) -> None:
    path = left_by(VERSION - 1, tmp_path / "store.db")
    before = dumped(path)
    with full_disk(size):
        assert f"{path} cannot be used as a store" in await refusal(path)
    assert dumped(path) == before
    await (await SqliteStore.open(path, ManualClock())).close()
    assert facts(path, "PRAGMA user_version") == [(VERSION,)]


async def test_runs_of_an_agent_that_was_deleted_in_the_sixth_schema_have_it_until_they_end(tmp_path: Path) -> None:
    path = left_by("6-retired", tmp_path / "store.db")
    store = await SqliteStore.open(path, ManualClock())
    found = {active.run.name: active.agent.display_name for active in await store.active_runs()}
    assert {"r1": "first", "q1": "first", "q2": "second", "q3": "third"} == found
    retired = "SELECT revision, uses FROM retired_revisions ORDER BY revision"
    assert [(1, 2), (2, 1)] == facts(path, retired)
    await add(store, ended("r1"))
    assert [(1, 1), (2, 1)] == facts(path, retired)
    await add(store, ended("q1", v1.Run.STATE_CANCELLED))
    assert [(2, 1)] == facts(path, retired)
    await add(store, ended("q2", v1.Run.STATE_CANCELLED))
    await add(store, ended("q3", v1.Run.STATE_CANCELLED))
    await store.close()
    assert ([], [(3,)]) == (facts(path, retired), facts(path, "SELECT revision FROM revisions"))


async def test_what_finds_rows_within_a_session_is_made_for_all_of_them(older: Path) -> None:
    await (await SqliteStore.open(older, ManualClock())).close()
    in_order = "SELECT tenant, uid, 0, sequence, '', sequence FROM events WHERE message IS NOT NULL"
    by_id = "SELECT tenant, uid, 1, message, '', sequence FROM events WHERE message IS NOT NULL"
    of_runs = "SELECT tenant, uid, 2, create_time, run, NULL FROM runs"
    expected = facts(older, f"{in_order} UNION ALL {by_id} UNION ALL {of_runs} ORDER BY 1, 2, 3, 4, 5")
    assert expected == facts(older, "SELECT * FROM lookups ORDER BY 1, 2, 3, 4, 5")
    assert {0, 1, 2} == {kind for _, _, kind, *_ in expected}


async def test_a_damaged_row_is_reported_and_nothing_is_changed(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE runs SET body = x'FFFF' WHERE session = 'queue' AND run = 'r4'")
    connection.close()
    before = dumped(path)
    assert await refusal(path) == f"{path} has a damaged row. Restore a backup."
    assert dumped(path) == before


async def test_a_store_of_a_later_schema_keeps_every_row(small: Path, tmp_path: Path) -> None:
    """And what is deleted of it from then on goes as in any other."""
    tables = [name for (name,) in facts(small, TABLES)]
    columns = dict.fromkeys(tables, "*")
    columns["messages"] = "tenant, uid, sequence, message, run, step, update_sequence, body"
    columns["events"] = "tenant, uid, sequence, tells_past, body"
    columns["active_runs"] = f"tenant, uid, run, deaths, released, {'revision' if small.stem == '4' else 'agent'}"
    columns["runs"] = "tenant, uid, run, state, agent, labels, first_sequence, last_sequence, digest, runs.body"
    if small.stem in {"5", "6"}:
        columns["runs"] += ", revision, deaths, released"
    columns["sessions"] = """tenant, uid, session, user, agent, activity, display_name, create_time, update_time,
        expire_time, labels, epoch, commits, body"""
    columns["store"] = "secret"
    with_heads = "sessions JOIN heads USING (tenant, uid)"
    lay_in = {"sessions": with_heads} if small.stem == "6" else {}
    before = {table: facts(small, f"SELECT {columns[table]} FROM {lay_in.get(table, table)}") for table in tables}
    columns["active_runs"] = "tenant, uid, run, deaths, released, run_agents.body"
    columns["messages"] = "tenant, uid, sequence, message, run, step, coalesce(update_sequence, sequence), c.body"
    places = {
        "messages": "events LEFT JOIN changed_messages c USING (tenant, uid, sequence) WHERE message NOT NULL",
        "sessions": with_heads,
        "active_runs": "runs JOIN run_agents USING (tenant, uid, run) WHERE revision = 0",
    }
    assert facts(small, "PRAGMA user_version") == [(int(small.stem),)]
    for file in (small, tmp_path / "new.db"):
        await (await SqliteStore.open(file, ManualClock())).close()
    assert facts(small, "PRAGMA user_version") == [(VERSION,)]
    assert schema(small) == schema(tmp_path / "new.db")
    after = {table: facts(small, f"SELECT {columns[table]} FROM {places.get(table, table)}") for table in tables}
    assert after == before
    store = await SqliteStore.open(small, ManualClock())
    for row in (await store.list_sessions("acme", ALL)).rows:
        await store.delete_session(SessionKey("acme", row.name, row.uid))
    await store.sweep_sessions()
    assert await store.erase_state("acme", "users/ada")
    await store.close()
    kept = {"store", "requests", "contents", "chunks", "blobs", "uploaders", "agents", "revisions"}
    assert {name for (name,) in facts(small, TABLES) if facts(small, f"SELECT * FROM {name}")} == kept
    assert facts(small, "SELECT * FROM requests WHERE response IS NOT NULL") == []


async def test_a_copy_of_an_older_store_has_the_same_schema(path: Path, tmp_path: Path) -> None:
    before = dumped(path)
    sqlite_file.backup(path, tmp_path / "copy.db", force=False)
    assert dumped(path) == dumped(tmp_path / "copy.db") == before
    assert facts(path, "PRAGMA user_version") == [(1,)]
