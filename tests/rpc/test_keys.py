"""KeyService: who may make which key, and that a key opens what its role says, from the next call on."""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from notecase import v1
from notecase_server.auth.keys import Keys
from notecase_server.rpc import interceptor
from notecase_server.serve import new_id, now
from notecase_server.serve_stores import open_store
from notecase_server.store.contract import MAX_KEYS, KeyRow

from tests.e2e.driving import fields_of, metadata_of, reason_of
from tests.support.server import Running, running

Words = tuple[tuple[str, str], ...]
ADMIN, OPERATOR = v1.Key.ROLE_ADMIN, v1.Key.ROLE_OPERATOR
TENANTS = [v1.Key.ROLE_VIEWER, v1.Key.ROLE_USER, v1.Key.ROLE_DEVELOPER, ADMIN]


def bearer(secret: str) -> Words:
    return (("authorization", f"Bearer {secret}"),)


class Scene:
    """A server that takes keys, an admin of acme's, and an operator."""

    def __init__(self, served: Running, admin: Words, operator: Words) -> None:
        self.served = served
        self.admin = admin
        self.operator = operator

    async def make(
        self, by: Words, tenant: str = "", role: int = v1.Key.ROLE_USER, **rest: Any
    ) -> v1.CreateKeyResponse:
        key = v1.Key(display_name="ci", role=role)  # type: ignore[arg-type]
        return await self.served.keys.CreateKey(v1.CreateKeyRequest(tenant=tenant, key=key, **rest), metadata=by)

    async def names(self, by: Words, tenant: str = "") -> list[str]:
        keys = (await self.served.keys.ListKeys(v1.ListKeysRequest(tenant=tenant), metadata=by)).keys
        return [key.name for key in keys]

    async def look(self, by: Words) -> None:
        await self.served.sessions.ListSessions(v1.ListSessionsRequest(), metadata=by)


@pytest.fixture(params=["memory", "sqlite"])
async def scene(request: pytest.FixtureRequest, tmp_path: Any) -> AsyncIterator[Scene]:
    url = "memory:" if request.param == "memory" else f"sqlite:{tmp_path / 'notecase.db'}"
    store = await open_store(url, now)
    keys = Keys(store, new_id, now, lambda: 0.0)
    _, admin = await keys.create("acme", v1.Key(display_name="first", role=ADMIN))
    _, operator = await keys.create("", v1.Key(display_name="first", role=OPERATOR))
    async with running(store, authenticators=(), auth="keys") as served:
        yield Scene(served, bearer(admin), bearer(operator))


async def refusal(call: Awaitable[Any]) -> tuple[str, set[str]]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    status = rpc_status.from_call(refused.value)  # type: ignore[arg-type]
    assert status is not None
    named = any(detail.Is(error_details_pb2.BadRequest.DESCRIPTOR) for detail in status.details)
    return reason_of(refused.value), fields_of(refused.value) if named else set()


async def test_an_admin_makes_lists_rotates_and_revokes_keys_of_its_tenant(scene: Scene) -> None:
    made = await scene.make(scene.admin)
    by = bearer(made.secret)
    await scene.look(by)
    assert made.key.name == (await scene.names(scene.admin))[0]
    rotated = await scene.served.keys.RotateKey(v1.RotateKeyRequest(name=made.key.name), metadata=scene.admin)
    assert made.key.name == rotated.key.name
    assert "UNAUTHENTICATED" == (await refusal(scene.look(by)))[0]
    by = bearer(rotated.secret)
    await scene.look(by)
    await scene.served.keys.RevokeKey(v1.RevokeKeyRequest(name=made.key.name), metadata=scene.admin)
    assert "UNAUTHENTICATED" == (await refusal(scene.look(by)))[0]
    assert made.key.name not in await scene.names(scene.admin)


async def test_a_secret_is_shown_once(scene: Scene) -> None:
    made = await scene.make(scene.admin, request_id="once")
    assert (made.key, "") == ((repeat := await scene.make(scene.admin, request_id="once")).key, repeat.secret)
    assert 2 == len(await scene.names(scene.admin))
    request = v1.RotateKeyRequest(name=made.key.name, request_id="again")
    first, second = [await scene.served.keys.RotateKey(request, metadata=scene.admin) for _ in range(2)]
    assert (first.key, "") == (second.key, second.secret)
    await scene.look(bearer(first.secret))


async def test_a_key_is_read_by_its_name_in_its_tenant_alone(scene: Scene) -> None:
    made = (await scene.make(scene.admin)).key

    async def look(by: Words, tenant: str = "", name: str = made.name) -> v1.Key:
        return await scene.served.keys.GetKey(v1.GetKeyRequest(name=name, tenant=tenant), metadata=by)

    assert made == await look(scene.admin)
    assert made == await look(scene.operator, "tenants/acme")
    assert "KEY_NOT_FOUND" == (await refusal(look(scene.operator)))[0]
    assert "KEY_NOT_FOUND" == (await refusal(look(scene.operator, "tenants/other")))[0]
    assert ("ROLE_MISSING", {"tenant"}) == await refusal(look(scene.admin, "tenants/other"))
    assert ("INVALID_FIELD", {"name"}) == await refusal(look(scene.admin, name="acme"))


async def test_an_admin_names_its_own_tenant_or_none(scene: Scene) -> None:
    await scene.make(scene.admin, "tenants/acme")
    for tenant in ("tenants/other", "tenants/default"):
        assert ("ROLE_MISSING", {"tenant"}) == await refusal(scene.make(scene.admin, tenant))
        assert ("ROLE_MISSING", {"tenant"}) == await refusal(scene.names(scene.admin, tenant))
    assert ("INVALID_FIELD", {"tenant"}) == await refusal(scene.make(scene.admin, "acme"))


@pytest.mark.parametrize("role", [v1.Key.ROLE_UNSPECIFIED, OPERATOR, 77])
async def test_an_admin_makes_no_other_keys_than_a_tenants(scene: Scene, role: int) -> None:
    assert ("INVALID_FIELD", {"key.role"}) == await refusal(scene.make(scene.admin, role=role))


async def test_an_operator_makes_keys_of_any_tenant_and_of_operators(scene: Scene) -> None:
    for role in TENANTS:
        made = await scene.make(scene.operator, "tenants/other", role)
        await scene.look(bearer(made.secret))
    assert 4 == len(await scene.names(scene.operator, "tenants/other"))
    assert 1 == len(await scene.names(scene.operator, "tenants/acme"))
    assert 1 == len(await scene.names(scene.operator))
    another = await scene.make(scene.operator, role=OPERATOR)
    assert 2 == len(await scene.names(bearer(another.secret)))
    for tenant, role in (("tenants/other", OPERATOR), ("", ADMIN)):
        assert ("INVALID_FIELD", {"key.role"}) == await refusal(scene.make(scene.operator, tenant, role))


async def test_an_operator_reads_no_content(scene: Scene) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await scene.look(scene.operator)
    assert ("ROLE_MISSING", "VIEWER") == (reason_of(refused.value), metadata_of(refused.value)["role"])
    assert "an operator has no tenant" in str(refused.value.details())


async def test_another_tenants_key_is_not_found(scene: Scene) -> None:
    other = (await scene.make(scene.operator, "tenants/other")).key.name
    revoke = v1.RevokeKeyRequest(name=other)
    assert "KEY_NOT_FOUND" == (await refusal(scene.served.keys.RevokeKey(revoke, metadata=scene.admin)))[0]
    rotate = v1.RotateKeyRequest(name=other)
    assert "KEY_NOT_FOUND" == (await refusal(scene.served.keys.RotateKey(rotate, metadata=scene.admin)))[0]
    assert "KEY_NOT_FOUND" == (await refusal(scene.served.keys.RevokeKey(revoke, metadata=scene.operator)))[0]
    revoke.tenant = "tenants/other"
    await scene.served.keys.RevokeKey(revoke, metadata=scene.operator)
    assert [] == await scene.names(scene.operator, "tenants/other")
    assert "TENANT_NOT_FOUND" == (await refusal(scene.names(scene.operator, "tenants/othr")))[0]


@pytest.mark.parametrize("role", TENANTS[:-1])
async def test_others_have_nothing_to_do_with_keys(scene: Scene, role: int) -> None:
    by = bearer((await scene.make(scene.admin, role=role)).secret)
    assert "ROLE_MISSING" == (await refusal(scene.names(by)))[0]
    assert "ROLE_MISSING" == (await refusal(scene.make(by)))[0]


async def test_what_is_wrong_with_a_request_is_named(scene: Scene) -> None:
    rotate = v1.RotateKeyRequest(name="keys/ci")
    rotate.overlap.FromSeconds(31 * 24 * 60 * 60)
    wrong = await refusal(scene.served.keys.RotateKey(rotate, metadata=scene.admin))
    assert ("INVALID_FIELD", {"name", "overlap"}) == wrong
    key = v1.Key(display_name="x" * 5000, role=ADMIN)
    key.expire_time.seconds = -1
    wrong = await refusal(scene.served.keys.CreateKey(v1.CreateKeyRequest(key=key), metadata=scene.admin))
    assert ("INVALID_FIELD", {"key.display_name", "key.expire_time"}) == wrong
    key = v1.Key(role=ADMIN)
    key.expire_time.seconds = 1
    wrong = await refusal(scene.served.keys.CreateKey(v1.CreateKeyRequest(key=key), metadata=scene.admin))
    assert ("INVALID_FIELD", {"key.expire_time"}) == wrong


async def test_a_stream_ends_when_its_key_is_revoked(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptor, "JUDGE_SECONDS", 3600)
    made = await scene.make(scene.admin)
    by = bearer(made.secret)
    await scene.served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case"), metadata=by)
    request = v1.WatchEventsRequest(name="sessions/case", options=v1.WatchOptions(keep_open=True))
    stream = scene.served.runs.WatchEvents(request, metadata=by)
    frame: Any = await stream.read()
    assert frame.HasField("attached")
    await scene.served.server._doorway.judge()
    await scene.served.keys.RevokeKey(v1.RevokeKeyRequest(name=made.key.name), metadata=scene.admin)
    await scene.served.server._doorway.judge()
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        while await stream.read() is not grpc.aio.EOF:
            pass
    assert grpc.StatusCode.UNAUTHENTICATED == ended.value.code()


async def test_a_tenants_keys_are_bounded() -> None:
    store = await open_store("memory:", now)
    _, admin = await Keys(store, new_id, now, lambda: 0.0).create("acme", v1.Key(role=ADMIN))
    for number in range(MAX_KEYS - 1):
        await store.add_key(KeyRow("acme", f"{number}", v1.Key(), b"", b""))
    async with running(store, authenticators=(), auth="keys") as served:
        scene = Scene(served, bearer(admin), ())
        assert "QUOTA_EXCEEDED" == (await refusal(scene.make(scene.admin)))[0]


async def watching(served: Running) -> Any:
    """A stream that a caller without a credential keeps open."""
    await served.sessions.CreateSession(v1.CreateSessionRequest(session_id="case"))
    request = v1.WatchEventsRequest(name="sessions/case", options=v1.WatchOptions(keep_open=True))
    stream = served.runs.WatchEvents(request)
    await stream.read()
    return stream


async def ended(stream: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        while await stream.read() is not grpc.aio.EOF:
            pass
    return reason_of(refused.value)


async def test_a_server_without_credentials_requires_them_from_its_first_key_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the next call on; streams that are open end with the next look."""
    monkeypatch.setattr(interceptor, "JUDGE_SECONDS", 3600)
    async with running(f"sqlite:{tmp_path / 'notecase.db'}", authenticators=()) as served:
        stream = await watching(served)
        made = await served.keys.CreateKey(v1.CreateKeyRequest(key=v1.Key(role=ADMIN)))
        get = v1.GetSessionRequest(name="sessions/case")
        assert "UNAUTHENTICATED" == (await refusal(served.sessions.GetSession(get)))[0]
        by = bearer(made.secret)
        assert "sessions/case" == (await served.sessions.GetSession(get, metadata=by)).name
        await served.server._doorway.judge()
        assert "UNAUTHENTICATED" == await ended(stream)
        await served.keys.RevokeKey(v1.RevokeKeyRequest(name=made.key.name), metadata=by)
        assert "UNAUTHENTICATED" == (await refusal(served.sessions.GetSession(get)))[0]


async def test_a_key_that_another_process_makes_is_the_first_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one look, which comes every two seconds."""
    monkeypatch.setattr(interceptor, "JUDGE_SECONDS", 0.01)
    path = tmp_path / "notecase.db"
    async with running(f"sqlite:{path}", authenticators=()) as served:
        stream = await watching(served)
        write = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute(sys.argv[2]); db.commit()"
        words = (sys.executable, "-c", write, str(path), "UPDATE store SET keyed = 1")
        assert 0 == await (await asyncio.create_subprocess_exec(*words)).wait()
        assert "UNAUTHENTICATED" == await ended(stream)
        assert "UNAUTHENTICATED" == (await refusal(served.sessions.ListSessions(v1.ListSessionsRequest())))[0]
