"""`notecase tenants`: what an operator does with a tenant, from its first key to its end."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cli.command import Done, notecase, terminal
from tests.support.server import Spawned


class Operator:
    """A server with keys, and an operator's commands."""

    def __init__(self, server: Spawned, key: str) -> None:
        self.env = {"NOTECASE_ADDRESS": server.address, "NOTECASE_TOKEN": key}

    async def __call__(self, *words: str, key: str = "") -> Done:
        return await notecase(*words, env={**self.env, **({"NOTECASE_TOKEN": key} if key else {})})


@pytest.fixture
async def operator(tmp_path: Path) -> AsyncIterator[Operator]:
    store = f"sqlite:{tmp_path / 'notecase.db'}"
    made = await notecase("keys", "bootstrap", "--store", store, "--operator")
    server = await Spawned.start(store, tmp_path / "log")
    yield Operator(server, made.out.strip())
    await server.stop()


async def listed(operator: Operator) -> list[list[str]]:
    done = await operator("tenants", "list")
    assert (0, "") == (done.code, done.err)
    head, *rows = [line.split() for line in done.out.splitlines()]
    assert ["TENANT", "STATE", "CREATED", "NAME"] == head
    return [[row[0], row[1], *row[4:]] for row in rows]


async def test_a_tenant_from_its_first_key_to_its_end(operator: Operator) -> None:
    """As docs/operate.md tells it."""
    made = await operator("tenants", "create", "acme", "--name", "The Acme company")
    assert (0, "tenants/acme\n") == (made.code, made.out)
    again = await operator("tenants", "create", "acme")
    assert (1, "") == (again.code, again.out)
    assert "'tenants/acme'" in again.err
    key = (await operator("keys", "create", "--tenant", "acme", "--role", "admin")).out.strip()
    await operator("keys", "create", "--tenant", "other", "--role", "admin")
    assert [["acme", "active", "The", "Acme", "company"], ["other", "active"]] == await listed(operator)
    assert (0, "", "") == await operator("tenants", "suspend", "acme")
    assert "does not allow calls of this tenant" in (await operator("sessions", key=key)).err
    shown = (await operator("tenants", "show", "acme")).out.splitlines()
    assert ["tenants/acme The Acme company", "state    suspended"] == shown[:2]
    assert shown[2].startswith("created  ")
    assert (0, "", "") == await operator("tenants", "resume", "tenants/acme")
    assert 0 == (await operator("sessions", key=key)).code
    assert (0, "", "") == await operator("tenants", "delete", "acme", "--yes")
    assert "is not valid" in (await operator("sessions", key=key)).err
    assert [["other", "active"]] == await listed(operator)
    gone = await operator("tenants", "show", "acme")
    assert (1, "") == (gone.code, gone.out)
    assert "There is no tenant 'tenants/acme'" in gone.err


async def test_a_tenant_is_not_deleted_where_nobody_can_be_asked(operator: Operator) -> None:
    await operator("tenants", "create", "acme")
    done = await operator("tenants", "delete", "acme")
    assert (2, "") == (done.code, done.out)
    assert "say --yes" in done.err
    assert [["acme", "active"]] == await listed(operator)


@pytest.mark.parametrize(("answer", "left"), [("n", [["acme", "active"]]), ("y", [])])
async def test_a_tenant_is_deleted_when_its_operator_says_so(
    operator: Operator, answer: str, left: list[list[str]]
) -> None:
    await operator("tenants", "create", "acme")
    async with terminal("tenants", "delete", "acme", env=operator.env) as shown:
        await shown.until("Remove tenants/acme with all that it has? [y/N]:")
        await shown.type(f"{answer}\n")
        assert (0 if answer == "y" else 1) == await shown.ended()
    assert left == await listed(operator)


async def test_tenants_are_for_operators(operator: Operator) -> None:
    key = (await operator("keys", "create", "--tenant", "acme", "--role", "admin")).out.strip()
    for words in (("list",), ("show", "acme"), ("suspend", "acme"), ("delete", "acme", "--yes")):
        refused = await operator("tenants", *words, key=key)
        assert (1, "") == (refused.code, refused.out)
        assert "needs the role operator" in refused.err
