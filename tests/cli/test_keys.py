"""`notecase keys`: from a store without a key to one that takes calls with keys only."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cli.command import Done, notecase
from tests.support.server import Spawned

KEY = re.compile(r"nck_[0-9a-f-]{36}_[\w-]{59}\n")
SHORT = "x" * 31
CHOSEN = "x" * 32


class Shop:
    """A server over a store with a first key, and commands that call it."""

    def __init__(self, server: Spawned, first: str) -> None:
        self.server = server
        self.first = first

    async def __call__(self, *words: str, key: str = "") -> Done:
        env = {"NOTECASE_ADDRESS": self.server.address, "NOTECASE_TOKEN": key or self.first}
        return await notecase(*words, env=env)


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    made = await notecase("keys", "bootstrap", "--store", store)
    assert 0 == made.code
    assert KEY.fullmatch(made.out)
    expected = (
        rf"created a new store at {re.escape(str(tmp_path / 'notecase.db'))}\nkeys/[0-9a-f-]{{36}}, shown only once:\n"
    )
    assert re.fullmatch(expected, made.err)
    server = await Spawned.start(store, tmp_path / "log")
    yield Shop(server, made.out.strip())
    await server.stop()


async def test_a_key_from_nothing_to_its_end(shop: Shop, tmp_path: Path) -> None:
    """As docs/operate.md tells it."""
    refused = await notecase("sessions", "list", env={"NOTECASE_ADDRESS": shop.server.address})
    assert (1, "") == (refused.code, refused.out)
    assert "This call has no credential" in refused.err
    made = await shop("keys", "create", "--role", "developer", "--name", "ci", "--expires", "90d")
    assert (0, True) == (made.code, bool(KEY.fullmatch(made.out)))
    listed = (await shop("keys", "list")).out.splitlines()
    assert ["KEY", "ROLE", "USER", "CREATED", "EXPIRES", "NAME"] == listed[0].split()
    assert [["developer", "ci"], ["admin", "bootstrap"]] == [[line.split()[1], line.split()[-1]] for line in listed[1:]]
    key_id, key = listed[1].split()[0], made.out.strip()
    assert 0 == (await shop("sessions", "list", key=key)).code
    assert "needs the role admin" in (await shop("keys", "list", key=key)).err
    rotated = await shop("keys", "rotate", key_id)
    assert KEY.fullmatch(rotated.out)
    again = await shop("keys", "rotate", key_id, "--overlap", "2h")  # would end what `key` has left
    assert (2, "") == (again.code, again.out)
    assert "The secret from before the last rotation is valid until " in again.err
    assert "add --yes" in again.err
    for either in (key, rotated.out.strip()):
        assert 0 == (await shop("sessions", "list", key=either)).code
    third = (await shop("keys", "rotate", key_id, "--yes")).out.strip()
    assert "is invalid" in (await shop("sessions", "list", key=key)).err
    fourth = (await shop("keys", "rotate", key_id, "--overlap", "0s")).out.strip()  # whatever was valid before ends
    assert [1, 1, 0] == [
        (await shop("sessions", "list", key=either)).code for either in (rotated.out.strip(), third, fourth)
    ]
    assert (0, "") == (await shop("keys", "revoke", key_id))[:2]
    for either in (key, fourth):
        assert "is invalid" in (await shop("sessions", "list", key=either)).err
    log = (tmp_path / "log").read_text()
    assert not [secret for secret in (key, shop.first, rotated.out.strip()) if secret.split("_", 2)[2] in log]


async def test_a_store_that_has_had_a_key_is_never_open_again(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    first = (await notecase("keys", "bootstrap", "--store", store)).out.strip()
    server = await Spawned.start(store, tmp_path / "log")
    env = {"NOTECASE_ADDRESS": server.address, "NOTECASE_TOKEN": first}
    assert 0 == (await notecase("keys", "revoke", first.split("_")[1], env=env)).code
    await server.stop()
    server = await Spawned.start(store, tmp_path / "log")
    assert "has no credential" in (await notecase("sessions", "list", env={"NOTECASE_ADDRESS": server.address})).err
    await server.stop()
    second = await notecase("keys", "bootstrap", "--store", store)
    server = await Spawned.start(store, tmp_path / "log")
    env = {"NOTECASE_ADDRESS": server.address, "NOTECASE_TOKEN": second.out.strip()}
    assert 0 == (await notecase("sessions", "list", env=env)).code
    await server.stop()
    done = await notecase("serve", "--listen", "127.0.0.1:0", "--store", store, "--insecure")
    assert (1, "") == (done.code, done.out)
    assert "--insecure: This store has had keys" in done.err


async def test_a_key_is_not_made_in_a_store_that_is_served(shop: Shop, tmp_path: Path) -> None:
    done = await notecase("keys", "bootstrap", "--store", f"sqlite:{tmp_path / 'notecase.db'}")
    assert (1, "") == (done.code, done.out)
    assert "is in use" in done.err


async def test_an_operators_first_key_makes_keys_of_a_tenant(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    first = (await notecase("keys", "bootstrap", "--store", store, "--operator")).out.strip()
    server = await Spawned.start(store, tmp_path / "log")
    env = {"NOTECASE_ADDRESS": server.address, "NOTECASE_TOKEN": first}
    made = await notecase("keys", "create", "--tenant", "acme", "--role", "admin", env=env)
    assert KEY.fullmatch(made.out)
    assert "created the tenant acme, which did not exist\n" in made.err
    again = await notecase("keys", "create", "--tenant", "acme", "--role", "admin", env=env)
    assert (0, False) == (again.code, "created the tenant" in again.err)
    listed = await notecase("keys", "list", "--tenant", "acme", env=env)
    assert 3 == len(listed.out.splitlines())
    assert 0 == (await notecase("sessions", "list", env={**env, "NOTECASE_TOKEN": made.out.strip()})).code
    assert "an operator has no tenant" in (await notecase("sessions", "list", env=env)).err
    await server.stop()


async def test_a_key_that_is_bound_to_a_user_sees_that_users_sessions_only(shop: Shop) -> None:
    made = await shop("keys", "create", "--role", "user", "--user", "ada", "--name", "phone")
    assert (0, True) == (made.code, bool(KEY.fullmatch(made.out)))
    assert ["user", "ada"] == (await shop("keys", "list")).out.splitlines()[1].split()[1:3]
    put = await shop("state", "put", "users/ada", "note", "mine", key=made.out.strip())
    assert 0 == put.code
    other = await shop("state", "get", "users/eve", key=made.out.strip())
    assert (1, "") == (other.code, other.out)
    assert "There is no user 'users/eve'" in other.err
    refused = await shop("keys", "create", "--role", "developer", "--user", "ada")
    assert "key.role: must be ROLE_VIEWER or ROLE_USER when the key has a user" in refused.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--tenant", ""), "--tenant: A tenant must be 1 to 63 lower-case letters"),
        (("--tenant", "The Acme company"), "--tenant: A tenant must be 1 to 63 lower-case letters"),
        (("--operator", "--tenant", "acme"), "--operator cannot be combined with --tenant"),
    ],
    ids=["an unset variable", "no id", "two kinds of key"],
)
async def test_a_first_key_is_of_the_tenant_that_is_named(
    tmp_path: Path, words: tuple[str, ...], expected: str
) -> None:
    """With an empty name it was an operator's."""
    done = await notecase("keys", "bootstrap", "--store", f"sqlite:{tmp_path / 'notecase.db'}", *words)
    assert (2, "", True) == (done.code, done.out, expected in done.err)
    assert not (tmp_path / "notecase.db").exists()


async def test_a_key_that_the_operator_chose_opens_a_store_in_memory(tmp_path: Path) -> None:
    server = await Spawned.start("memory:", tmp_path / "log", env={"NOTECASE_ADMIN_KEY": CHOSEN})
    env = {"NOTECASE_ADDRESS": server.address, "NOTECASE_TOKEN": CHOSEN}
    assert 0 == (await notecase("keys", "list", env=env)).code
    assert "has no credential" in (await notecase("keys", "list", env={**env, "NOTECASE_TOKEN": SHORT})).err
    await server.stop()
    assert CHOSEN not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("chosen", [SHORT, f"{CHOSEN} and more", f"{CHOSEN}\t", "xxxé" * 10, "x" * 257])
async def test_a_key_that_is_too_easy_is_refused(chosen: str) -> None:
    done = await notecase("serve", "--listen", "127.0.0.1:0", "--store", "memory:", env={"NOTECASE_ADMIN_KEY": chosen})
    assert (1, "") == (done.code, done.out)
    assert (
        "NOTECASE_ADMIN_KEY: This is not a valid key: use 32 to 256 printable ASCII characters without spaces."
        in done.err
    )
    assert "xxx" not in done.err


@pytest.mark.parametrize("words", [("--auth", "keys"), ()], ids=["--auth keys", "a chosen key"])
async def test_a_server_with_credentials_is_not_insecure(words: tuple[str, ...]) -> None:
    env = {} if words else {"NOTECASE_ADMIN_KEY": CHOSEN}
    done = await notecase("serve", "--listen", "127.0.0.1:0", "--store", "memory:", "--insecure", *words, env=env)
    assert (1, "") == (done.code, done.out)
    assert "--insecure: This cannot be combined" in done.err


async def test_an_insecure_server_says_so_at_each_start(tmp_path: Path) -> None:
    server = await Spawned.start("memory:", tmp_path / "log", "--insecure")
    await server.stop()
    assert "server_insecure" in (tmp_path / "log").read_text()


async def test_a_store_in_memory_has_no_first_key() -> None:
    done = await notecase("keys", "bootstrap", "--store", "memory:")
    assert (1, "") == (done.code, done.out)
    assert "set NOTECASE_ADMIN_KEY" in done.err


@pytest.mark.parametrize("span", ["90", "d", "1w", "-1d", "1.5h"])
async def test_an_invalid_time_span_is_refused(span: str) -> None:
    done = await notecase("keys", "create", "--role", "user", f"--expires={span}")
    assert 2 == done.code
    assert "is not a time span" in done.err
