"""`notecase copy` and `notecase store`: whole stores, from a terminal."""

import re
from pathlib import Path

from tests.cli.command import COMMAND, notecase, spawn
from tests.store.filled import fill
from tests.support.server import Spawned


async def test_a_store_is_copied_and_both_can_be_served(tmp_path: Path) -> None:
    """Only the digest of each table is printed; obstacles are reported, and a store that a server has open is not
    copied."""
    await fill(tmp_path / "store.db")
    source, target = f"sqlite:{tmp_path / 'store.db'}", f"sqlite:{tmp_path / 'copy.db'}"
    done = await notecase("copy", "--from", source, "--to", target)
    assert 0 == done.code
    digests = dict(re.findall(r"^([0-9a-f]{64})  (\w+)$", done.out, re.MULTILINE))
    assert len(done.out.splitlines()) == len(digests) == 26
    again = await notecase("copy", "--from", target, "--to", f"sqlite:{tmp_path / 'again.db'}")
    assert (0, done.out) == (again.code, again.out)
    taken = await notecase("copy", "--from", source, "--to", target)
    assert (1, "") == (taken.code, taken.out)
    assert f"Error: {tmp_path / 'copy.db'} is not empty: it has tenants. Choose another path.\n" == taken.err
    for store in (source, target):
        server = await Spawned.start(store, tmp_path / "log")
        served = await notecase("copy", "--from", store, "--to", f"sqlite:{tmp_path / 'more.db'}")
        assert 1 == served.code
        assert "is in use" in served.err
        assert 0 == await server.stop()


async def test_a_copy_shows_how_far_it_is(tmp_path: Path) -> None:
    """Once it takes longer than a moment."""
    await fill(tmp_path / "store.db")
    script = "from notecase_server.cli import copy, main; copy.PROGRESS_SECONDS = 0.0; main()"
    process = await spawn(
        *(COMMAND[0], "-c", script, "copy"),
        *("--from", f"sqlite:{tmp_path / 'store.db'}", "--to", f"sqlite:{tmp_path / 'copy.db'}"),
    )
    _, told = await process.communicate()
    assert 0 == process.returncode
    assert re.search(r"^chunks: \d+ rows copied$", told.decode(), re.MULTILINE)
    assert re.search(r"^audit: compared$", told.decode(), re.MULTILINE)


async def test_the_store_of_a_configuration_file_is_taken_unless_an_option_names_another(tmp_path: Path) -> None:
    """Whatever else is in the file: its secrets are those of the server."""
    file, other = tmp_path / "notecase.toml", f"sqlite:{tmp_path / 'other.db'}"
    secret = '[[provider]]\nname = "main"\nkey_env = "MISSING"\n'
    file.write_text(f'[store]\nurl = "sqlite:{tmp_path / "filed.db"}"\n{secret}')
    env = {"NOTECASE_CONFIG": str(file)}
    first = await notecase("keys", "bootstrap", "--config", str(file))
    assert f"created a new store at {tmp_path / 'filed.db'}\n" in first.err
    again = await notecase("keys", "bootstrap", env=env)
    assert (0, False) == (again.code, "created a new store" in again.err)
    assert (
        f"created a new store at {tmp_path / 'other.db'}\n"
        in (await notecase("keys", "bootstrap", "--store", other, env=env)).err
    )
    assert 0 == (await notecase("backup", str(tmp_path / "copy.db"), env=env)).code
    assert (tmp_path / "copy.db").exists()
    assert "sessions with a new uid: 0\n" == (await notecase("store", "renew", env=env)).out
    file.write_text('[store]\nurl = "postgresql://keeper@127.0.0.1:1/notecase"\n')
    assert "127.0.0.1:1/notecase cannot be reached" in (await notecase("migrate", env=env)).err
    file.write_text("[store]\nurl = 5\n")
    wrong = await notecase("store", "renew", env=env)
    assert (1, f"Error: {file} cannot be used:\nstore.url: This must be a string.\n") == (wrong.code, wrong.err)


async def test_a_store_is_renewed_while_it_is_not_served(tmp_path: Path) -> None:
    await fill(tmp_path / "store.db")
    store = f"sqlite:{tmp_path / 'store.db'}"
    server = await Spawned.start(store, tmp_path / "log")
    served = await notecase("store", "renew", "--store", store)
    assert (1, "") == (served.code, served.out)
    assert "is in use" in served.err
    assert 0 == await server.stop()
    done = await notecase("store", "renew", "--store", store)
    assert 0 == done.code
    assert re.fullmatch(r"sessions with a new uid: \d+\n", done.out)


async def test_a_backup_is_not_renewed_with_the_log_of_the_store_whose_place_it_took(tmp_path: Path) -> None:
    """SQLite would apply the log that a killed server left, and the restored store would have what came later."""
    file, copy = tmp_path / "notecase.db", tmp_path / "copy.db"
    server = await Spawned.start(f"sqlite:{file}", tmp_path / "log")
    assert 0 == (await notecase("backup", str(copy), "--store", f"sqlite:{file}")).code
    env = {"NOTECASE_ADDRESS": server.address}
    assert 0 == (await notecase("sessions", "create", env=env)).code
    await server.kill()
    file.write_bytes(copy.read_bytes())
    refused = await notecase("store", "renew", "--store", f"sqlite:{file}")
    assert (1, True) == (refused.code, "If a backup was put there since, delete the -wal file" in refused.err)
    Path(f"{file}-wal").unlink()
    done = await notecase("store", "renew", "--store", f"sqlite:{file}")
    assert (0, "sessions with a new uid: 0\n") == (done.code, done.out)
