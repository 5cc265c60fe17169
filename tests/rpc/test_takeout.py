"""ExportTenant: all that a tenant holds, once, bounded and repeatable; and who hears of it."""

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from notecase import v1
from notecase_server.auth.principal import Role
from notecase_server.engine import takeout
from notecase_server.rpc import refusals
from notecase_server.store.contract import Page, Query

from tests.e2e.driving import reason_of, said
from tests.support.callers import ByWord, who, word
from tests.support.server import Running, running

ADMIN, OPERATOR = word(who(Role.ADMIN)), word(who(Role.OPERATOR))
ACME = "tenants/acme"


class Taken(NamedTuple):
    """What an export brought."""

    kinds: list[str]
    sessions: dict[str, bytes]
    blobs: dict[str, bytes]
    states: dict[str, dict[str, v1.StateEntry]]
    agents: list[tuple[str, int]]
    dropped: list[str]


def taken(records: list[v1.ExportTenantResponse]) -> Taken:
    found, last = Taken([], {}, {}, {}, [], []), ""
    for record in records:
        kind = record.WhichOneof("record") or ""
        found.kinds.append(kind)
        match kind:
            case "session":
                last = record.session.name
                found.sessions[last] = b""
            case "blob":
                last = record.blob.name
                found.blobs[last] = b""
            case "chunk":
                found.__getattribute__(f"{last.partition('/')[0]}")[last] += record.chunk
            case "state":
                found.states.setdefault(record.state.name, {}).update(record.state.entries)
            case "agent":
                found.agents.append((record.agent.name, record.agent.revision))
            case "dropped":
                found.dropped.append(record.dropped)
    return found


async def export(served: Running, page_token: str = "", name: str = ACME) -> list[v1.ExportTenantResponse]:
    request = v1.ExportTenantRequest(name=name, page_token=page_token)
    return [record async for record in served.tenants.ExportTenant(request, metadata=OPERATOR)]


async def refusal(served: Running, **fields: Any) -> str:
    call = served.tenants.ExportTenant(v1.ExportTenantRequest(**{"name": ACME, **fields}), metadata=OPERATOR)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    return reason_of(refused.value)


@pytest.fixture(params=["memory", "sqlite"])
async def served(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Running]:
    """With acme, which has something of each kind, and a neighbour that has the same."""
    monkeypatch.setattr(refusals, "WRITE_SECONDS", 3600)
    url = "memory:" if request.param == "memory" else f"sqlite:{tmp_path / 'notecase.db'}"
    async with running(url, authenticators=[ByWord()]) as made:
        for tenant in ("acme", "other"):
            await made.tenants.CreateTenant(v1.CreateTenantRequest(tenant_id=tenant), metadata=OPERATOR)
            await fill(made, tenant)
        yield made


async def fill(served: Running, tenant: str) -> None:
    by = word(who(Role.ADMIN, tenant))
    tools = [v1.Tool(name="lens", client=v1.ClientTool())]
    for agent_id in ("clerk", "detective"):
        agent = v1.Agent(llm=v1.LlmAgent(tools=tools))
        await served.agents.CreateAgent(v1.CreateAgentRequest(agent_id=agent_id, agent=agent), metadata=by)
    changed = v1.Agent(name="agents/clerk", display_name="changed")
    await served.agents.UpdateAgent(v1.UpdateAgentRequest(agent=changed), metadata=by)
    upload = v1.UploadBlobRequest(
        blob=v1.Blob(media_type="text/plain"), chunk=f"of {tenant}".encode() * 60_000, last=True
    )
    blob = await served.blobs.UploadBlob(iter([upload]), metadata=by)
    for number in range(3):
        message = said("/call lens {}" if number == 1 else "/say done")
        message.parts.add().blob.CopyFrom(blob)
        session = v1.Session(name=f"sessions/case-{number}", agent="agents/detective", user="users/ada")
        start = v1.StartRun(new_session=session, run_id="first", messages=[message])
        await served.runs.Invoke(v1.InvokeRequest(start=start), metadata=by)
    for name in ("app", "users/ada", "users/eve"):
        for key in ("a", "b", "c"):
            put = v1.PutStateRequest(name=f"{name}/state", key=key, value=v1.Value(string_value=tenant))
            await served.state.PutState(put, metadata=by)


async def test_all_that_a_tenant_holds_is_exported_once_and_nothing_of_another(served: Running) -> None:
    records = await export(served)
    found = taken(records)
    assert [f"sessions/case-{number}" for number in (2, 1, 0)] == list(found.sessions)
    assert ["app/state", "users/ada/state", "users/eve/state"] == list(found.states)
    assert [{"a", "b", "c"}] * 3 == [set(entries) for entries in found.states.values()]
    assert [("agents/clerk", 2), ("agents/clerk", 1), ("agents/detective", 1)] == found.agents
    content = b"of acme" * 60_000
    assert {f"blobs/{hashlib.sha256(content).hexdigest()}": content} == found.blobs
    assert ["tenant", "session"] == found.kinds[:2]
    assert [] == found.dropped
    assert b"of other" not in b"".join(record.SerializeToString() for record in records)
    assert max(len(record.chunk) for record in records) <= 256 << 10


async def test_it_is_repeatable_and_goes_on_from_any_of_its_tokens(served: Running) -> None:
    records = await export(served)
    assert records == await export(served)
    places = [place for place, record in enumerate(records) if record.page_token]
    assert 3 + 3 + 2 + 1 == len(places)
    for place in places:
        assert [records[0], *records[place:]] == await export(served, records[place].page_token)


async def test_a_session_is_the_file_that_its_own_export_is(served: Running) -> None:
    """An active run has ended in the file, which can be imported."""
    later = v1.StartRun(session="sessions/case-1", run_id="later", messages=[said("/say done")])
    later.on_busy = v1.StartRun.ON_BUSY_QUEUE
    await served.runs.CreateRun(v1.CreateRunRequest(start=later), metadata=ADMIN)
    more = v1.RunRequest(input=v1.UserInput(messages=[said("And then?")], when=v1.UserInput.WHEN_FOLLOW_UP))
    await served.runs.SendCommand(v1.SendCommandRequest(session="sessions/case-1", command=more), metadata=ADMIN)
    files = taken(await export(served)).sessions

    async def own(name: str) -> bytes:
        request = v1.ExportSessionRequest(name=name)
        return b"".join([piece.chunk async for piece in served.sessions.ExportSession(request, metadata=ADMIN)])

    assert await own("sessions/case-0") == files["sessions/case-0"]
    header = v1.ImportHeader(session_id="copy")
    frames = [v1.ImportSessionRequest(header=header), v1.ImportSessionRequest(chunk=files["sessions/case-1"])]
    await served.sessions.ImportSession(iter(frames), metadata=ADMIN)
    assert await own("sessions/copy") == files["sessions/case-1"]
    queued = await served.runs.GetRun(v1.GetRunRequest(name="sessions/copy/runs/later"), metadata=ADMIN)
    assert v1.Run.STATE_CANCELLED == queued.state
    for name, state in (("case-1", v1.Run.STATE_WAITING), ("copy", v1.Run.STATE_CANCELLED)):
        run = await served.runs.GetRun(v1.GetRunRequest(name=f"sessions/{name}/runs/first"), metadata=ADMIN)
        assert state == run.state
    listed = await served.messages.ListMessages(v1.ListMessagesRequest(parent="sessions/copy"), metadata=ADMIN)
    calls = [
        part.tool_call.outcome for message in listed.messages for part in message.parts if part.HasField("tool_call")
    ]
    assert [v1.ToolCall.OUTCOME_CANCELLED] == calls


async def test_lists_are_read_in_pages(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    before = await export(served)
    monkeypatch.setattr(takeout, "PAGE", 1)
    monkeypatch.setattr(takeout, "PAGE_KEYS", 2)
    after = await export(served)
    assert taken(before)._replace(kinds=[]) == taken(after)._replace(kinds=[])
    assert 6 == taken(after).kinds.count("state")


async def test_what_is_removed_meanwhile_is_dropped(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    store = served.server._store
    read = store.read_events

    async def removed(key: Any, after: int, limit: int = 1000) -> list[v1.Event]:
        if key.session == "case-1" and await store.find_session("acme", "case-1") is not None:
            await served.sessions.DeleteSession(v1.DeleteSessionRequest(name="sessions/case-1"), metadata=ADMIN)
        return await read(key, after, limit)

    monkeypatch.setattr(store, "read_events", removed)
    found = taken(await export(served))
    assert ["sessions/case-1"] == found.dropped
    assert b"" == found.sessions["sessions/case-1"]
    assert 1 == len(found.blobs)


async def test_a_tenant_that_is_removed_meanwhile_ends_its_export_with_an_error(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a part of it is never taken for the whole."""
    store = served.server._store
    lists = store.list_blobs

    async def removing(tenant: str, query: Query) -> Page[v1.Blob]:
        await store.set_tenant_state(tenant, v1.Tenant.STATE_DELETING)
        return await lists(tenant, query)

    monkeypatch.setattr(store, "list_blobs", removing)
    call = served.tenants.ExportTenant(v1.ExportTenantRequest(name=ACME), metadata=OPERATOR)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        while await call.read() is not grpc.aio.EOF:
            pass
    assert "TENANT_NOT_FOUND" == reason_of(refused.value)
    assert "TENANT_NOT_FOUND" == await refusal(served)


async def test_the_audits_of_the_tenant_and_of_operators_have_it(served: Running) -> None:
    """Before anything is sent; of an export that is refused they tell nothing."""
    assert "TENANT_NOT_FOUND" == await refusal(served, name="tenants/unknown")
    assert "INVALID_FIELD" == await refusal(served, name="acme")
    other = next(record.page_token for record in await export(served, name="tenants/other") if record.page_token)
    for token in ("made-up", other):
        assert "PAGE_TOKEN_INVALID" == await refusal(served, page_token=token)
    call = served.tenants.ExportTenant(v1.ExportTenantRequest(name=ACME), metadata=OPERATOR)
    await call.read()
    call.cancel()
    where = 'method = "notecase.v1.TenantService/ExportTenant"'
    for by, told in ((ADMIN, [ACME]), (OPERATOR, [ACME, "tenants/other"])):
        page = await served.audit.ListAuditEntries(v1.ListAuditEntriesRequest(filter=where), metadata=by)
        assert [(name, "OK") for name in told] == [(entry.resource, entry.outcome) for entry in page.entries]
        look = v1.GetPrincipalRequest(name=page.entries[0].principal)
        assert "operator" == (await served.audit.GetPrincipal(look, metadata=by)).subject
