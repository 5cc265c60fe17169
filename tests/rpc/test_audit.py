"""The audit: what was done to keys, tenants, sessions and users, what was exported, answered and refused."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf.field_mask_pb2 import FieldMask
from notecase import v1
from notecase_server import errors
from notecase_server.auth.principal import Role
from notecase_server.auth.tokens import Tokens
from notecase_server.rpc import refusals
from notecase_server.serve import now
from notecase_server.serve_stores import open_store
from notecase_server.store.contract import AuditRow
from notecase_server.supervisor import Tasks
from structlog.testing import capture_logs

from tests.e2e.driving import reason_of, said
from tests.support.callers import ByWord, Words, who, word
from tests.support.server import Running, running

ADMIN = word(who(Role.ADMIN))
CLERK, BOSS = word(who(Role.USER, subject="clerk")), word(who(Role.USER, subject="boss"))
ADA = word(who(Role.USER, subject="ada-phone", user="ada"))
OPERATOR = word(who(Role.OPERATOR))
CASE = "sessions/case"

Line = tuple[str, str, str, str]


@pytest.fixture(params=["memory", "sqlite"])
async def served(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Running]:
    """With an agent that asks before it pays. Refusals are written when a test says so."""
    monkeypatch.setattr(refusals, "WRITE_SECONDS", 3600)
    url = "memory:" if request.param == "memory" else f"sqlite:{tmp_path / 'notecase.db'}"
    async with running(url, authenticators=[ByWord()]) as made:
        tools = [
            v1.Tool(name="pay", client=v1.ClientTool(), requires_approval=True),
            v1.Tool(name="ask_user", server=v1.ServerTool(function="ask_user")),
        ]
        agent = v1.CreateAgentRequest(agent_id="payer", agent=v1.Agent(llm=v1.LlmAgent(tools=tools)))
        await made.agents.CreateAgent(agent, metadata=ADMIN)
        yield made


async def begin(served: Running, by: Words, session_id: str = "case") -> None:
    request = v1.CreateSessionRequest(session_id=session_id, session=v1.Session(agent="agents/payer"))
    await served.sessions.CreateSession(request, metadata=by)


async def entries(served: Running, by: Words = ADMIN, **request: Any) -> list[v1.AuditEntry]:
    page = await served.audit.ListAuditEntries(v1.ListAuditEntriesRequest(**request), metadata=by)
    return list(page.entries)


async def lines(served: Running, by: Words = ADMIN, **request: Any) -> list[Line]:
    """Each entry as subject, method, resource and outcome, the last one first."""
    found = []
    for entry in await entries(served, by, **request):
        look = v1.GetPrincipalRequest(name=entry.principal)
        subject = (await served.audit.GetPrincipal(look, metadata=by)).subject if entry.principal else ""
        found.append((subject, entry.method.removeprefix("notecase.v1."), entry.resource, entry.outcome))
    return found


async def refusal(call: Awaitable[Any]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return reason_of(refused.value)


async def written(served: Running) -> None:
    served.server._refusals.count()
    await served.server._refusals.write()


async def test_changes_of_keys_are_audited(served: Running) -> None:
    create = v1.CreateKeyRequest(key=v1.Key(role=v1.Key.ROLE_USER), request_id="once")
    made = await served.keys.CreateKey(create, metadata=(*ADMIN, ("x-request-id", "seven")))
    await served.keys.CreateKey(create, metadata=ADMIN)
    await served.keys.RotateKey(v1.RotateKeyRequest(name=made.key.name), metadata=ADMIN)
    await served.keys.RevokeKey(v1.RevokeKeyRequest(name=made.key.name), metadata=ADMIN)
    assert "KEY_NOT_FOUND" == await refusal(
        served.keys.RevokeKey(v1.RevokeKeyRequest(name=made.key.name), metadata=ADMIN)
    )
    assert [
        ("admin", "KeyService/RevokeKey", made.key.name, "OK"),
        ("admin", "KeyService/RotateKey", made.key.name, "OK"),
        ("admin", "KeyService/CreateKey", made.key.name, "OK"),
    ] == await lines(served)
    (entry,) = await entries(served, filter='method = "notecase.v1.KeyService/CreateKey"')
    assert ("seven", 1, True) == (entry.request_id, entry.call_count, entry.HasField("create_time"))


async def test_operators_see_tenants_and_keys_and_admins_what_operators_did_to_theirs(served: Running) -> None:
    await served.tenants.CreateTenant(v1.CreateTenantRequest(tenant_id="other"), metadata=OPERATOR)
    key = v1.CreateKeyRequest(tenant="tenants/acme", key=v1.Key(role=v1.Key.ROLE_ADMIN))
    made = await served.keys.CreateKey(key, metadata=OPERATOR)
    await begin(served, CLERK)
    await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=CASE), metadata=CLERK)
    for change in (
        served.tenants.SuspendTenant(v1.SuspendTenantRequest(name="tenants/other"), metadata=OPERATOR),
        served.tenants.ResumeTenant(v1.ResumeTenantRequest(name="tenants/other"), metadata=OPERATOR),
        served.tenants.DeleteTenant(v1.DeleteTenantRequest(name="tenants/other"), metadata=OPERATOR),
    ):
        await change
    assert [
        ("operator", f"TenantService/{method}Tenant", "tenants/other", "OK")
        for method in ("Delete", "Resume", "Suspend", "Create")
    ] == await lines(served, OPERATOR)
    (entry,) = await entries(served, OPERATOR, tenant="tenants/acme")
    assert ("notecase.v1.KeyService/CreateKey", made.key.name) == (entry.method, entry.resource)
    assert [] == await entries(served, OPERATOR, tenant="tenants/acme", filter="outcome = ROLE_MISSING")
    assert [
        ("clerk", "SessionService/DeleteSession", CASE, "OK"),
        ("operator", "KeyService/CreateKey", made.key.name, "OK"),
    ] == await lines(served)
    assert "ROLE_MISSING" == await refusal(entries(served, ADMIN, tenant="tenants/other"))
    assert "TENANT_NOT_FOUND" == await refusal(entries(served, OPERATOR, tenant="tenants/acmee"))
    look = v1.GetPrincipalRequest(name=entry.principal, tenant="tenants/acme")
    found = await served.audit.GetPrincipal(look, metadata=OPERATOR)
    assert ("operator", v1.Key.ROLE_OPERATOR) == (found.subject, found.role)
    for tenant in ("", "tenants/other"):
        look.tenant = tenant
        assert "PRINCIPAL_NOT_FOUND" == await refusal(served.audit.GetPrincipal(look, metadata=OPERATOR))
    assert "ROLE_MISSING" == await refusal(served.audit.GetPrincipal(look, metadata=ADMIN))


async def test_deletions_and_exports_are_audited(served: Running) -> None:
    for session_id in ("case", "hers", "too"):
        await begin(served, CLERK if session_id == "case" else ADA, session_id)
    export = served.sessions.ExportSession(v1.ExportSessionRequest(name=CASE), metadata=ADMIN)
    assert [response async for response in export]
    await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=CASE), metadata=CLERK)
    await served.sessions.EraseUser(v1.EraseUserRequest(name="users/ada"), metadata=ADMIN)
    erased = "SessionService/EraseUser"
    told = await lines(served)
    assert ("admin", erased, "users/ada", "OK") == told[0]
    assert {("admin", erased, "sessions/hers", "OK"), ("admin", erased, "sessions/too", "OK")} == set(told[1:3])
    assert [
        ("clerk", "SessionService/DeleteSession", CASE, "OK"),
        ("admin", "SessionService/ExportSession", CASE, "OK"),
    ] == told[3:]


async def test_an_export_that_is_refused_is_none(served: Running) -> None:
    await begin(served, CLERK)
    start = v1.StartRun(session=CASE, messages=[said("/call pay {}")])
    await served.runs.CreateRun(v1.CreateRunRequest(start=start), metadata=CLERK)
    export = served.sessions.ExportSession(v1.ExportSessionRequest(name=CASE), metadata=ADMIN)
    assert "RUN_ACTIVE" == await refusal(export.read())
    assert [] == await entries(served)


async def test_answers_are_audited_with_their_principals(served: Running) -> None:
    """By a command and on a stream; answers to questions are not."""
    await begin(served, CLERK)
    inputs = []
    for run_id, decision in (("first", v1.InputResponse.DECISION_APPROVE), ("second", v1.InputResponse.DECISION_DENY)):
        start = v1.StartRun(session=CASE, run_id=run_id, messages=[said("/call pay {}")])
        start.on_busy = v1.StartRun.ON_BUSY_INTERRUPT
        made = await served.runs.CreateRun(v1.CreateRunRequest(start=start), metadata=CLERK)
        waits = await served.runs.WaitRun(v1.WaitRunRequest(name=made.name), metadata=CLERK)
        (asked,) = waits.pending_inputs
        inputs.append(asked.input_id)
        response = v1.InputResponse(input_id=asked.input_id, decision=decision)
        command = v1.SendCommandRequest(session=CASE, command=v1.RunRequest(input_response=response))
        await served.runs.SendCommand(command, metadata=BOSS)
    start = v1.StartRun(session=CASE, run_id="third", messages=[said('/call ask_user {"question": "Why?"}')])
    start.on_busy = v1.StartRun.ON_BUSY_INTERRUPT
    made = await served.runs.CreateRun(v1.CreateRunRequest(start=start), metadata=CLERK)
    (asked,) = (await served.runs.WaitRun(v1.WaitRunRequest(name=made.name), metadata=CLERK)).pending_inputs
    response = v1.InputResponse(input_id=asked.input_id, decision=v1.InputResponse.DECISION_ANSWER, answer="So.")
    command = v1.SendCommandRequest(session=CASE, command=v1.RunRequest(input_response=response))
    await served.runs.SendCommand(command, metadata=BOSS)
    assert [
        ("boss", "RunService/SendCommand", f"{CASE}/runs/second", "DENY"),
        ("boss", "RunService/SendCommand", f"{CASE}/runs/first", "APPROVE"),
    ] == await lines(served)
    assert inputs == [entry.input_id for entry in reversed(await entries(served))]


async def test_taking_back_a_remembered_answer_is_audited(served: Running) -> None:
    """Other changes of a session are not, nor is an update that removes no answer. All fields are all but these."""
    await begin(served, CLERK)
    start = v1.StartRun(session=CASE, messages=[said("/call pay {}")])
    made = await served.runs.CreateRun(v1.CreateRunRequest(start=start), metadata=CLERK)
    (asked,) = (await served.runs.WaitRun(v1.WaitRunRequest(name=made.name), metadata=CLERK)).pending_inputs
    response = v1.InputResponse(
        input_id=asked.input_id,
        decision=v1.InputResponse.DECISION_APPROVE,
        remember=v1.InputResponse.REMEMBER_SESSION,
    )
    command = v1.SendCommandRequest(session=CASE, command=v1.RunRequest(input_response=response))
    await served.runs.SendCommand(command, metadata=CLERK)
    answered = await lines(served)
    found = await served.sessions.GetSession(v1.GetSessionRequest(name=CASE), metadata=BOSS)
    found.ClearField("etag")
    given = v1.Session(name=CASE, display_name="The violin")
    for session, paths in (
        (given, ["*"]),
        (given, []),
        (given, ["display_name"]),
        (found, ["remembered"]),
        (v1.Session(name=CASE, last_sequence=found.last_sequence), ["remembered"]),
        (given, ["remembered"]),
    ):
        request = v1.UpdateSessionRequest(session=session, update_mask=FieldMask(paths=paths))
        updated = await served.sessions.UpdateSession(request, metadata=ADMIN if "*" in paths else BOSS)
        if session is found:
            assert [asked.input_id] == list(updated.remembered)
    assert {} == dict(updated.remembered)
    assert [("boss", "SessionService/UpdateSession", CASE, "OK"), *answered] == await lines(served)


async def test_refusals_are_audited_up_to_a_limit_and_then_counted(served: Running) -> None:
    for _ in range(refusals.KEPT_A_MINUTE + 5):
        assert "ROLE_MISSING" == await refusal(served.keys.ListKeys(v1.ListKeysRequest(), metadata=CLERK))
    await refusal(served.keys.ListKeys(v1.ListKeysRequest(), metadata=BOSS))
    await written(served)
    found = await entries(served, filter="outcome = ROLE_MISSING")
    counts = [(entry.method, entry.call_count) for entry in found]
    assert [("", 5)] + [("notecase.v1.KeyService/ListKeys", 1)] * (refusals.KEPT_A_MINUTE + 1) == counts
    subjects = [line[0] for line in await lines(served)]
    assert ["clerk", "boss", *["clerk"] * refusals.KEPT_A_MINUTE] == subjects
    await refusal(served.keys.ListKeys(v1.ListKeysRequest(), metadata=CLERK))
    await written(served)
    assert len(found) + 1 == len(await entries(served))  # a minute later they have entries again


async def test_refusals_of_more_principals_than_are_counted_apart_are_the_operators(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "MOST_PRINCIPALS", 1)
    for by in (CLERK, BOSS, ADA, CLERK):
        await refusal(served.keys.ListKeys(v1.ListKeysRequest(), metadata=by))
    await written(served)
    assert [("clerk", "KeyService/ListKeys", "", "ROLE_MISSING")] * 2 == await lines(served)
    (entry,) = await entries(served, OPERATOR)
    assert ("", "ROLE_MISSING", 2) == (entry.principal, entry.outcome, entry.call_count)


async def test_refusals_in_a_stream_for_a_missing_role_are_audited(served: Running) -> None:
    await begin(served, ADA, "hers")
    start = v1.StartRun(session="sessions/hers", messages=[said("/call pay {}")])
    stream = served.runs.Run(metadata=ADA)
    await stream.write(v1.RunRequest(start=start))
    async for frame in stream:
        for event in frame.batch.events:
            if event.HasField("input_requested"):
                response = v1.InputResponse(
                    input_id=event.input_requested.input_id, decision=v1.InputResponse.DECISION_APPROVE
                )
                await stream.write(v1.RunRequest(input_response=response))
        if frame.HasField("result"):
            assert v1.CommandResult.DISPOSITION_REFUSED == frame.result.disposition
            break
    stream.cancel()
    await written(served)
    assert [("ada-phone", "RunService/Run", "", "ROLE_MISSING")] == await lines(served)


async def test_calls_without_a_credential_are_counted_for_operators(served: Running) -> None:
    for _ in range(3):
        assert "UNAUTHENTICATED" == await refusal(served.sessions.ListSessions(v1.ListSessionsRequest()))
    await written(served)
    (entry,) = await entries(served, OPERATOR)
    assert ("", "", "UNAUTHENTICATED", 3) == (entry.principal, entry.method, entry.outcome, entry.call_count)
    assert [] == await entries(served)
    await written(served)
    assert 1 == len(await entries(served, OPERATOR))


async def test_the_log_says_who_was_refused_because_of_the_role(served: Running) -> None:
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        await refusal(served.keys.ListKeys(v1.ListKeysRequest(), metadata=CLERK))
    assert [("ROLE_MISSING", "acme", "clerk")] == [(line["reason"], line["tenant"], line["subject"]) for line in lines]


async def test_calls_without_a_credential_fill_no_log(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "LOGGED_A_MINUTE", 2)
    with capture_logs() as lines:
        for _ in range(5):
            await refusal(served.sessions.ListSessions(v1.ListSessionsRequest()))
        await refusal(served.keys.ListKeys(v1.ListKeysRequest(), metadata=CLERK))
        served.server._refusals.count()
        await refusal(served.sessions.ListSessions(v1.ListSessionsRequest()))
    assert [("UNAUTHENTICATED", None)] * 2 + [
        ("ROLE_MISSING", None),
        ("UNAUTHENTICATED", 5),
        ("UNAUTHENTICATED", None),
    ] == [(line["reason"], line.get("calls")) for line in lines]


async def test_calls_beyond_the_bound_fill_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused before their caller is known."""
    monkeypatch.setattr(refusals, "LOGGED_A_MINUTE", 2)
    async with running() as served:
        monkeypatch.setattr(served.server.gate, "_max_calls", 0)
        with capture_logs() as lines:
            for _ in range(5):
                assert "RATE_LIMITED" == await refusal(served.sessions.ListSessions(v1.ListSessionsRequest()))
            served.server._refusals.count()
    assert [("RATE_LIMITED", None)] * 2 + [("RATE_LIMITED", 5)] == [
        (line["reason"], line.get("calls")) for line in lines if "reason" in line
    ]


async def test_tokens_that_are_not_valid_fill_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has the reason for the first ones, and the caller does not get it."""
    monkeypatch.setattr(refusals, "LOGGED_A_MINUTE", 2)
    judge = Tokens([], Tasks("test"), now, time.monotonic)
    async with running(authenticators=[judge]) as served:
        with capture_logs() as lines:
            for _ in range(5):
                call = served.sessions.ListSessions(
                    v1.ListSessionsRequest(), metadata=(("authorization", "Bearer eyA.e.e"),)
                )
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
    why = "The token is not valid: it is not well formed or not its issuer's (DecodeError)."
    assert [("rpc_refused", why)] * 2 == [(line["event"], line["cause"]) for line in lines if "cause" in line]
    assert ["rpc_refused"] * 2 == [line["event"] for line in lines if "refused" in line["event"]]
    assert why not in str(refused.value.details())


async def test_refusals_wait_for_a_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "WRITE_SECONDS", 3600)
    monkeypatch.setattr(refusals, "MOST_WAITING", 2)
    store = await open_store("memory:", now)
    async with running(store, authenticators=[ByWord()]) as served:
        for _ in range(3):
            await refusal(served.keys.ListKeys(v1.ListKeysRequest(), metadata=CLERK))
        add = store.add_audit

        async def away(rows: Any) -> None:
            raise errors.store_unavailable()

        monkeypatch.setattr(store, "add_audit", away)
        await served.server._refusals._attempt()
        monkeypatch.setattr(store, "add_audit", add)
        await served.server._refusals._attempt()
        assert 2 == len(await entries(served))  # the third was beyond the bound


async def test_a_stop_writes_what_was_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "WRITE_SECONDS", 3600)
    url = f"sqlite:{tmp_path / 'notecase.db'}"
    async with running(url, authenticators=[ByWord()]) as served:
        await refusal(served.keys.ListKeys(v1.ListKeysRequest(), metadata=CLERK))
    async with running(url, authenticators=[ByWord()]) as served:
        assert [("clerk", "KeyService/ListKeys", "", "ROLE_MISSING")] == await lines(served)


async def test_a_refusal_is_written_within_a_second_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "WRITE_SECONDS", 0.01)
    store = await open_store("memory:", now)
    told = asyncio.Event()
    add = store.add_audit

    async def added(rows: Any) -> None:
        await add(rows)
        told.set()

    monkeypatch.setattr(store, "add_audit", added)
    async with running(store, authenticators=[ByWord()]) as served:
        await refusal(served.keys.ListKeys(v1.ListKeysRequest(), metadata=CLERK))
        await told.wait()
        assert [("clerk", "KeyService/ListKeys", "", "ROLE_MISSING")] == await lines(served)


async def test_a_caller_without_credentials_leaves_no_entries() -> None:
    async with running(authenticators=()) as served:
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case"))
        await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=CASE))
        assert [] == await entries(served, ())


async def test_pages_and_filters(served: Running) -> None:
    for number in range(3):
        await begin(served, CLERK, f"case-{number}")
        await served.sessions.DeleteSession(v1.DeleteSessionRequest(name=f"sessions/case-{number}"), metadata=CLERK)
    first = await served.audit.ListAuditEntries(v1.ListAuditEntriesRequest(page_size=2), metadata=ADMIN)
    rest = await entries(served, page_size=2, page_token=first.next_page_token)
    assert ["case-2", "case-1", "case-0"] == [each.resource.rpartition("/")[2] for each in [*first.entries, *rest]]
    assert ["sessions/case-1"] == [
        each.resource for each in await entries(served, filter='resource = "sessions/case-1"')
    ]
    again = v1.ListAuditEntriesRequest(page_token=first.next_page_token, filter="outcome = OK")
    assert "PAGE_TOKEN_INVALID" == await refusal(served.audit.ListAuditEntries(again, metadata=ADMIN))
    for unknown in ("request_id = x", "labels.a = b", 'NOT labels.a = ""'):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await entries(served, filter=unknown)
        assert "INVALID_FIELD" == reason_of(refused.value)
        assert "the fields are create_time, method, outcome, principal, resource (" in str(refused.value.details())


async def test_what_is_old_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    days = 24 * 60 * 60 * 1_000_000
    store = await open_store("memory:", lambda: now() - 91 * days)
    await store.add_audit([AuditRow("acme", v1.AuditEntry(resource="old"))])
    swept = asyncio.Event()
    forget = store.forget_audit

    async def told(before: int) -> int:
        done = await forget(before)
        swept.set()
        return done

    monkeypatch.setattr(store, "forget_audit", told)
    async with running(store, authenticators=[ByWord()]) as served:
        await swept.wait()
        assert [] == await entries(served)
