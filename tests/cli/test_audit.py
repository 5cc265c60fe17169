"""`notecase audit`: who did what, for people."""

from pathlib import Path

from tests.cli.command import notecase
from tests.support.server import Spawned


async def test_an_admin_lists_who_did_what(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    first = (await notecase("keys", "bootstrap", "--store", store)).out.strip()
    server = await Spawned.start(store, tmp_path / "log")
    env = {"NOTECASE_ADDRESS": server.address, "NOTECASE_TOKEN": first}
    made = await notecase("keys", "create", "--role", "user", env=env)
    key_id = made.out.split("_")[1]
    assert 0 == (await notecase("keys", "revoke", key_id, env=env)).code
    listed = await notecase("audit", "list", env=env)
    assert 0 == listed.code
    head, *rows = (line.split() for line in listed.out.splitlines())
    assert ["TIME", "SUBJECT", "CALLS", "OUTCOME", "METHOD", "RESOURCE"] == head
    subject = f"keys/{first.split('_')[1]}"
    assert [
        [subject, "1", "OK", "KeyService/RevokeKey", f"keys/{key_id}"],
        [subject, "1", "OK", "KeyService/CreateKey", f"keys/{key_id}"],
        ["-", "1", "OK", "notecase", "keys", "bootstrap", subject],
    ] == [row[2:] for row in rows]
    few = await notecase("audit", "list", "--limit", "1", env=env)
    assert (2, "There are more; --limit lists more of them.\n") == (len(few.out.splitlines()), few.err)
    none = await notecase("audit", "list", "--filter", "outcome = DENY", env=env)
    assert 1 == len(none.out.splitlines())
    await server.stop()


async def test_an_operator_reads_who_changed_a_tenants_keys(tmp_path: Path) -> None:
    """By the subject, as its admins do; a tenant that is misspelt is not empty."""
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    first = (await notecase("keys", "bootstrap", "--operator", "--store", store)).out.strip()
    server = await Spawned.start(store, tmp_path / "log")
    env = {"NOTECASE_ADDRESS": server.address, "NOTECASE_TOKEN": first}
    admin = (await notecase("keys", "create", "--role", "admin", "--tenant", "acme", env=env)).out.strip()
    assert 0 == (await notecase("keys", "create", "--role", "user", env={**env, "NOTECASE_TOKEN": admin})).code
    listed = await notecase("audit", "list", "--tenant", "acme", env=env)
    assert [f"keys/{key.split('_')[1]}" for key in (admin, first)] == [
        line.split()[2] for line in listed.out.splitlines()[1:]
    ]
    for words in ("audit list --tenant", "keys list --tenant", "tenants show"):
        done = await notecase(*words.split(), "acmee", env=env)
        assert (1, "Error: There is no tenant 'tenants/acmee'.\n") == (done.code, done.err)
    await server.stop()
