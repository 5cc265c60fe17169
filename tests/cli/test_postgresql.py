"""What an operator of a PostgreSQL store types: passwords, migrations, a first key, a copy from a file."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from notecase_server.store.postgres.schema import VERSION

from tests.cli.command import notecase
from tests.promises import ROOT
from tests.store.filled import fill
from tests.support import postgres
from tests.support.server import Spawned

PASSWORD = "hunter2"


@pytest.fixture
async def store() -> str:
    return await postgres.shared().new_database()


@pytest.fixture
async def guarded(store: str) -> AsyncIterator[str]:
    """The URL of a database whose user needs PASSWORD."""
    admin = await asyncpg.connect(store)
    name = "keeper_" + store.partition("?")[0].rpartition("/")[2]
    await admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'")
    await admin.execute(f"GRANT ALL ON SCHEMA public TO {name}")
    rules = postgres.shared().directory / "data" / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text(f"local all {name} scram-sha-256\n{before}")
    await admin.execute("SELECT pg_reload_conf()")
    yield store.replace("postgres@", f"{name}@")
    rules.write_text(before)
    await admin.execute("SELECT pg_reload_conf()")
    await admin.close()


async def test_a_password_comes_from_a_file_a_variable_or_the_url_and_is_in_no_log(
    guarded: str, tmp_path: Path
) -> None:
    """A wrong one, and none, is a sentence that does not repeat it."""
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    within = guarded.replace("@", f":{PASSWORD}@", 1)
    told = []
    for url, options, env in (
        (guarded, ("--store-password-file", str(file)), {}),
        (guarded, (), {"PGPASSWORD": PASSWORD}),
        (within, (), {}),
    ):
        server = await Spawned.start(url, tmp_path / "log", *options, env=env)
        assert 0 == await server.stop()
    for url, env in (
        (guarded, {"PGPASSWORD": "wrong-one"}),
        (within.replace(PASSWORD, "wrong-one"), {}),
        (guarded, {}),
    ):
        done = await notecase("serve", "--listen", "127.0.0.1:0", "--store", url, env=env)
        assert 1 == done.code
        told.append(done.err)
    file.unlink()
    done = await notecase("migrate", "--store", guarded, "--store-password-file", str(file))
    assert (1, f"Error: {file}, the file with the store's password, cannot be read.\n") == (done.code, done.err)
    assert ["Error: postgresql:///test_"] * 3 == [each.splitlines()[-1][:26] for each in told]
    assert all("does not accept this user or password" in each for each in told)
    everything = "".join([*told, done.err, (tmp_path / "log").read_text()])
    assert "store_opened" in everything
    assert PASSWORD not in everything
    assert "wrong-one" not in everything


async def test_a_server_that_may_not_migrate_names_the_command_that_does(store: str, tmp_path: Path) -> None:
    words = ("--no-migrate", "--no-prepared", "--store-connections", "2")
    refused = await notecase("serve", "--listen", "127.0.0.1:0", "--store", store, *words)
    assert 1 == refused.code
    where = "in public, the first schema of its search_path that this user may use"
    assert f"has no tables of notecase {where}. Run notecase migrate --store URL" in refused.err
    for told in ("created the tables", "up to date"):
        done = await notecase("migrate", "--store", store)
        assert (0, f"{told}, schema {VERSION}\n") == (done.code, done.out)
    server = await Spawned.start(store, tmp_path / "log", *words)
    owned = await notecase("migrate", "--store", store)
    assert 1 == owned.code
    assert "The store is in use: " in owned.err
    assert 0 == await server.stop()
    assert "prepared=False" in (tmp_path / "log").read_text()
    sqlite = await notecase("migrate", "--store", "sqlite:notecase.db")
    assert (1, "") == (sqlite.code, sqlite.out)


async def test_a_parameter_that_is_misspelt_is_named(store: str) -> None:
    done = await notecase("migrate", "--store", f"{store}&sslmod=require")
    assert 1 == done.code
    assert "there is no parameter sslmod. Check the spelling" in done.err


async def test_files_that_tls_needs_are_named(tmp_path: Path) -> None:
    """A missing one used to look like a server that is away."""
    url = "postgresql://ada:hunter2@127.0.0.1:1/cases?sslmode=verify-full"
    for more, told in (
        ("", "its sslmode needs the CA certificates of the server. Name their file in sslrootcert."),
        (f"&sslrootcert={tmp_path / 'root.pem'}", "the file of sslrootcert cannot be read."),
    ):
        done = await notecase("migrate", "--store", url + more)
        assert (1, f"Error: postgresql://127.0.0.1:1/cases: {told}\n") == (done.code, done.err)


async def test_a_password_file_need_not_be_there(store: str, tmp_path: Path) -> None:
    """As with libpq, which then has no password."""
    done = await notecase("migrate", "--store", f"{store}&passfile={tmp_path / 'pgpass'}")
    assert (0, f"created the tables, schema {VERSION}\n") == (done.code, done.out)


async def test_a_schema_that_the_user_may_not_use_is_ignored(guarded: str) -> None:
    admin = await asyncpg.connect(guarded.replace("keeper_" + guarded.partition("?")[0].rpartition("/")[2], "postgres"))
    await admin.execute("CREATE SCHEMA cases")
    await admin.close()
    url = f"{guarded}&search_path=cases"
    done = await notecase("migrate", "--store", url, env={"PGPASSWORD": PASSWORD})
    assert 1 == done.code
    assert "or its user may use none of them. Create one, grant USAGE on it" in done.err


async def test_a_file_is_copied_into_a_database_and_served(store: str, tmp_path: Path) -> None:
    """Its first key is printed alone."""
    await fill(tmp_path / "store.db")
    done = await notecase("copy", "--from", f"sqlite:{tmp_path / 'store.db'}", "--to", store)
    assert 0 == done.code
    assert 26 == len(done.out.splitlines())
    key = await notecase("keys", "bootstrap", "--store", store, "--tenant", "acme")
    assert key.out.startswith("nck_")
    assert 1 == len(key.out.splitlines())
    server = await Spawned.start(store, tmp_path / "log")
    listed = await notecase("sessions", "list", "--server", server.address, env={"NOTECASE_TOKEN": key.out.strip()})
    assert "case" in listed.out
    assert 0 == await server.stop()


async def test_the_two_roles_of_the_page_migrate_and_serve(store: str, tmp_path: Path) -> None:
    """After its own `createuser` and `createdb`; the role that serves makes no tables."""
    name = store.partition("?")[0].rpartition("/")[2]
    (block,) = re.findall(r"```sql\n(CREATE ROLE.*?)```", (ROOT / "docs" / "postgresql.md").read_text(), re.DOTALL)
    admin = await asyncpg.connect(store)
    await admin.execute(f"CREATE ROLE {name} LOGIN")
    await admin.execute(f"ALTER DATABASE {name} OWNER TO {name}")
    await admin.execute(re.sub(r"\bnotecase(?=\b|_owner\b)", name, block))
    await admin.close()
    url, owner = (store.replace("postgres@", f"{role}@") for role in (name, f"{name}_owner"))
    refused = await notecase("migrate", "--store", url)
    assert 1 == refused.code
    assert 0 == (await notecase("migrate", "--store", owner)).code
    server = await Spawned.start(url, tmp_path / "log", "--no-migrate")
    assert 0 == (await notecase("sessions", "list", "--server", server.address)).code
    assert 0 == await server.stop()


async def test_a_backup_of_a_database_names_what_copies_one() -> None:
    done = await notecase("backup", "--store", f"postgresql://keeper:{PASSWORD}@db.internal/notecase", "copy.db")
    told = "Only SQLite files can be backed up. Copy a PostgreSQL store with notecase copy or pg_dump."
    assert (1, f"Error: {told}\n") == (done.code, done.err)
