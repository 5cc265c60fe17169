"""A store in a file with rows in every table: what older servers left, and what came since."""

import gzip
import hashlib
from pathlib import Path

from notecase import v1
from notecase_server.store.contract import AuditRow, CommandId, Commit, KeyRow, Scope
from notecase_server.store.sqlite.store import SqliteStore

from tests.store.build import (
    KEY,
    USER_STATE,
    ManualClock,
    add,
    asked,
    called,
    changed,
    create,
    once,
    put,
    queued,
    said,
    session_key,
    start,
)

FIXTURES = Path(__file__).parent.parent / "fixtures"
GONE = session_key("acme", "gone")


async def fill(path: Path) -> Path:
    """Makes the store, and closes it. Its session KEY has a run that waits for an approval, its user and tenant have
    state, and GONE and the agent "gone" are deleted with their rows still there. Keys and values hold U+0000."""
    path.write_bytes(gzip.decompress((FIXTURES / "schema-3.db.gz").read_bytes()))
    store = await SqliteStore.open(path, ManualClock())
    data = b"a photograph"
    await store.put_blob("acme", "", hashlib.sha256(data).hexdigest(), data)
    await store.open_upload("acme", "under-way", 4_000_000_000_000_000)
    await store.add_chunk("acme", "under-way", 0, b"the first half")
    labels = {"b": "zwei", "a": "\0ß\uffff𐍈"}
    session = v1.Session(user="users/ada", labels=labels, display_name="nul \0 within", agent="agents/sherlock")
    await create(store, KEY, **{field.name: value for field, value in session.ListFields()})
    await add(store, said("m1", "nul \0 within"), changed(put("key \0", "value \0")), key=KEY)
    command = CommandId("command", b"digest")
    await start(
        store, "r1", called("m2", "r1", "c1"), asked("i1", "c1", "r1"), queued("q1", "r1"), key=KEY, command=command
    )
    await store.update_state(USER_STATE, [put("ß \0", "𐍈")])
    await store.update_state(Scope("acme", "app", ""), [put("policy", "none")])
    await store.commit(Commit(GONE, once=once("made"), create=v1.Session(user="users/ada")))
    await add(store, said("m1"), changed(put("k", 1)), key=GONE)
    await store.delete_session(GONE)
    await store.commit(Commit(session_key("acme", "other"), once=once("kept"), create=v1.Session()))
    await store.create_agent("acme", "gone", v1.Agent(display_name="nul \0 within"))
    await store.delete_agent("acme", "gone")
    await store.create_tenant("acme", "The Acme company")
    await store.add_key(KeyRow("acme", "k1", v1.Key(name="keys/k1"), b"digest", b""))
    await store.know_principal("acme", v1.Principal(name="principals/p1", subject="keys/k1", user="users/ada"))
    await store.add_audit([AuditRow("acme", v1.AuditEntry(method="M", outcome="OK")), AuditRow("", v1.AuditEntry())])
    await store.close()
    return path
