"""`notecase tenants`: what an operator does with a tenant, from its first key to its end."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from notecase import Client, v1
from notecase_server.cli.takeout import save

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
    assert "does not allow calls of this tenant" in (await operator("sessions", "list", key=key)).err
    shown = (await operator("tenants", "show", "acme")).out.splitlines()
    assert ["tenants/acme The Acme company", "state    suspended"] == shown[:2]
    assert shown[2].startswith("created  ")
    assert (0, "", "") == await operator("tenants", "resume", "tenants/acme")
    assert 0 == (await operator("sessions", "list", key=key)).code
    assert (0, "", "") == await operator("tenants", "delete", "acme", "--yes")
    assert "is invalid" in (await operator("sessions", "list", key=key)).err
    assert [["other", "active"]] == await listed(operator)
    gone = await operator("tenants", "show", "acme")
    assert (1, "") == (gone.code, gone.out)
    assert "There is no tenant 'tenants/acme'" in gone.err


async def test_a_tenant_is_not_deleted_without_confirmation(operator: Operator) -> None:
    await operator("tenants", "create", "acme")
    done = await operator("tenants", "delete", "acme")
    assert (2, "") == (done.code, done.out)
    assert "add --yes" in done.err
    assert [["acme", "active"]] == await listed(operator)


@pytest.mark.parametrize(("answer", "left"), [("n", [["acme", "active"]]), ("y", [])])
async def test_a_tenant_is_deleted_when_its_operator_says_so(
    operator: Operator, answer: str, left: list[list[str]]
) -> None:
    await operator("tenants", "create", "acme")
    async with terminal("tenants", "delete", "acme", env=operator.env) as shown:
        await shown.until("Delete tenants/acme with all its data? [y/N]:")
        await shown.type(f"{answer}\n")
        assert (0 if answer == "y" else 1) == await shown.ended()
    assert left == await listed(operator)


async def test_tenants_are_for_operators(operator: Operator) -> None:
    key = (await operator("keys", "create", "--tenant", "acme", "--role", "admin")).out.strip()
    for words in (("list",), ("show", "acme"), ("suspend", "acme"), ("delete", "acme", "--yes")):
        refused = await operator("tenants", *words, key=key)
        assert (1, "") == (refused.code, refused.out)
        assert "needs the role operator" in refused.err
        assert "`notecase keys bootstrap --operator` creates" in refused.err


async def test_a_tenant_is_exported_to_a_directory(operator: Operator, tmp_path: Path) -> None:
    """What lies there can be imported elsewhere."""
    key = (await operator("keys", "create", "--tenant", "acme", "--role", "admin")).out.strip()
    async with Client(operator.env["NOTECASE_ADDRESS"], token=key) as client:
        blob = await client.upload(b"plan", "text/plain")
        session = await client.create_session(state={"plan": blob}, session_id="case")
        await client.put_state("app", "motto", "Look.")
        place = tmp_path / "taken"
        place.mkdir()
        assert (0, "", "") == await operator("tenants", "export", "acme", str(place))
        lines = [json.loads(line) for line in (place / "index.jsonl").read_text().splitlines()]
        assert ["tenant", "session", "state", "blob"] == [kind for line in lines for kind in line]
        assert "tenants/acme" == lines[0]["tenant"]["name"]
        assert b"plan" == (place / blob.name).read_bytes()
        assert (place / "sessions" / "case.notecase").read_bytes() == b"".join(
            [piece async for piece in client.export_session(session.name, with_blobs=False)]
        )
    again = await operator("tenants", "export", "acme", str(place))
    assert (2, "") == (again.code, again.out)
    assert "is not empty" in again.err
    refused = await operator("tenants", "export", "nobody", str(tmp_path / "nobody"))
    assert (1, "") == (refused.code, refused.out)
    assert "There is no tenant 'tenants/nobody'" in refused.err
    assert ["taken"] == sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir())


async def test_an_export_that_is_cut_goes_on_where_it_was(tmp_path: Path) -> None:
    """The files are those of an export in one go."""
    blob, other = v1.Blob(name=f"blobs/{'a' * 64}"), v1.Blob(name=f"blobs/{'b' * 64}")
    records = [
        v1.ExportTenantResponse(tenant=v1.Tenant(name="tenants/acme")),
        v1.ExportTenantResponse(session=v1.Session(name="sessions/case"), page_token="1"),
        v1.ExportTenantResponse(chunk=b"file"),
        v1.ExportTenantResponse(blob=blob, page_token="2"),
        v1.ExportTenantResponse(chunk=b"con"),
        v1.ExportTenantResponse(chunk=b"tent"),
        v1.ExportTenantResponse(blob=other, page_token="3"),
        v1.ExportTenantResponse(chunk=b"half"),
        v1.ExportTenantResponse(dropped=other.name),
    ]
    asked = []

    class Cut(v1.TenantServiceServicer):
        async def ExportTenant(self, request: v1.ExportTenantRequest, context: Any) -> Any:  # noqa: N802
            asked.append(request.page_token)
            begin = next(at for at, each in enumerate(records) if each.page_token == request.page_token)
            yield records[0]
            for record in records[max(begin, 1) : begin + 5]:
                yield record
            if begin + 5 < len(records):
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    server = grpc.aio.server()
    v1.add_TenantServiceServicer_to_server(Cut(), server)  # type: ignore[abstract]
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with Client(address) as client:
        await save(client, "tenants/acme", tmp_path / "taken")
    await server.stop(None)
    assert ["", "2", "3"] == asked
    place = tmp_path / "taken"
    assert [json.loads(line) for line in (place / "index.jsonl").read_text().splitlines()] == [
        {"tenant": {"name": "tenants/acme"}},
        {"session": {"name": "sessions/case"}},
        {"blob": {"name": blob.name}},
        {"blob": {"name": other.name}},
        {"dropped": other.name},
    ]
    assert (b"file", b"content") == ((place / "sessions/case.notecase").read_bytes(), (place / blob.name).read_bytes())
    assert not (place / other.name).exists()
