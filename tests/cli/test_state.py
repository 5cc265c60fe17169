"""`notecase state`: read, put and watched, for people at a terminal and for scripts in a pipe."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty
from notecase import Client, v1

from tests.cli.command import COMMAND, missing, notecase, spawn, terminal
from tests.client.proxy import Proxy
from tests.support.ports import free_port
from tests.support.server import Running, Spawned

NOTES: Mapping[str, Any] = {"case": "the missing violin", "seen": 3, "photo": b"\xff\x00", "tags": ["a", 1.5, None]}


@pytest.fixture
async def client(served: Running) -> AsyncIterator[Client]:
    async with served.client() as client:
        yield client


@pytest.fixture
async def case(client: Client) -> str:
    """A session of a user, with notes of every look."""
    return (await client.create_session(session_id="case", user="users/ada", state=NOTES)).name


class Watch:
    """`notecase state watch` in a pipe."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def next(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(await self.process.stdout.readline())
        return told


@asynccontextmanager
async def watching(address: str, session: str) -> AsyncIterator[Watch]:
    """Watches from the moment the block is entered until Ctrl-C, which must end it well."""
    process = await spawn(*COMMAND, "state", "watch", session, "--server", address)
    assert process.stderr is not None
    try:
        assert (await process.stderr.readline()).startswith(b"Watching ")
        yield Watch(process)
        process.send_signal(signal.SIGINT)
        assert 130 == await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
        out, err = await process.communicate()
    assert b"" == out
    assert all(line.startswith(f"{address} cannot be reached".encode()) for line in err.splitlines())


async def test_a_state_in_a_pipe_is_one_object_of_json(served: Running, case: str) -> None:
    """Of a session by its id, its name, or the name of its state."""
    for owner in ("case", case, f"{case}/state"):
        done = await notecase("state", "get", owner, "--server", served.address)
        assert (0, "") == (done.code, done.err)
        assert {**NOTES, "photo": "/wA="} == json.loads(done.out)
        assert sorted(NOTES) == list(json.loads(done.out))


async def test_one_key_is_its_value_alone(served: Running, case: str) -> None:
    """Text and bytes as they are, so that a file comes out as it went in; -o json is JSON always."""
    there = {"NOTECASE_ADDRESS": served.address}
    assert (0, "the missing violin\n", "") == await notecase("state", "get", "case", "case", env=there)
    assert (0, '"the missing violin"\n', "") == await notecase("state", "get", "case", "case", "-o", "json", env=there)
    assert (0, '["a", 1.5, null]\n', "") == await notecase("state", "get", "case", "tags", env=there)
    process = await spawn(*COMMAND, "state", "get", "case", "photo", env=there)
    assert (b"\xff\x00", b"") == await process.communicate()


async def test_a_missing_key_is_reported_and_the_others_are_printed(served: Running, case: str) -> None:
    done = await notecase("state", "get", "case", "seen", "none", "--server", served.address)
    assert (1, {"seen": 3}, "sessions/case/state has no 'none'.\n") == (done.code, json.loads(done.out), done.err)
    done = await notecase("state", "get", "case", "none", "--server", served.address)
    assert (1, "", "sessions/case/state has no 'none'.\n") == done


async def test_more_than_a_page_is_printed_whole(served: Running, client: Client) -> None:
    """The app's, which is read without an owner."""
    for start in (0, 1000):
        ops = [v1.StateOp(key=f"k{n}", increment=n) for n in range(start, start + 1000)]
        await client.state.UpdateState(v1.UpdateStateRequest(name="app/state", ops=ops))
    done = await notecase("state", "get", "--server", served.address)
    assert {f"k{n}": n for n in range(2000)} == json.loads(done.out)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("the harbour", "the harbour"),
        ("3", 3),
        ("-1", -1),
        ("-0.0", -0.0),
        ("9223372036854775807", (1 << 63) - 1),
        ("true", True),
        ("null", None),
        ('"3"', "3"),
        ('{"a": [1, {}]}', {"a": [1, {}]}),
        ("{a: 1}", "{a: 1}"),
        ("NaN", "NaN"),
        ("", ""),
    ],
)
async def test_json_keeps_its_type_and_all_else_is_text(
    served: Running, client: Client, given: str, value: object
) -> None:
    done = await notecase("state", "put", "users/ada", "k", given, "--server", served.address)
    assert (0, "1\n", "") == done
    held = (await client.get_state("users/ada"))["k"]
    assert (repr(value), type(value)) == (repr(held), type(held))


async def test_text_can_be_said_to_be_text(served: Running, client: Client) -> None:
    done = await notecase("state", "put", "app", "k", "3", "--text", "--server", served.address)
    assert (0, "1\n", "") == done
    assert {"k": "3"} == await client.get_state("app")


async def test_a_file_is_put_and_read_back(served: Running, client: Client, case: str, tmp_path: Path) -> None:
    """Its content is referred to by the key; into a pipe it comes out as it went in."""
    plan = tmp_path / "plan.pdf"
    plan.write_bytes(b"%PDF-1.7 \xe2\x82\xac")
    server = ("--server", served.address)
    assert (await notecase("state", "put", case, "plan", str(plan), "--file", *server)).code == 0
    blob = (await client.get_state(case, "plan"))["plan"]
    assert (blob.filename, blob.media_type, blob.size_bytes) == ("plan.pdf", "application/pdf", 12)
    assert (await notecase("state", "get", case, "plan", *server)).out.encode() == plan.read_bytes()
    told = json.loads((await notecase("state", "get", case, "plan", "-o", "json", *server)).out)
    expected = {"name": blob.name, "media_type": "application/pdf", "size_bytes": "12", "filename": "plan.pdf"}
    assert told == expected
    assert json.loads((await notecase("state", "get", case, *server)).out)["plan"] == expected
    for wrong, problem in ((tmp_path / "none.pdf", "cannot be read"), (tmp_path / "unknown", "The media type")):
        (tmp_path / "unknown").write_bytes(b"\xff")
        done = await notecase("state", "put", case, "plan", str(wrong), "--file", *server)
        assert (done.code, problem in done.err) == (2, True)


async def test_a_put_prints_the_version_that_the_next_one_can_ask_for(served: Running, client: Client) -> None:
    """Of two writers with the same version, one gets an error with the current version."""
    there = {"NOTECASE_ADDRESS": served.address}
    version = "0"
    for value in ("first", "second"):
        done = await notecase("state", "put", "app", "k", value, "--if-version", version, env=there)
        assert (0, "") == (done.code, done.err)
        version = done.out.strip()
    done = await notecase("state", "put", "app", "k", "late", "--if-version", "1", env=there)
    assert (1, "") == (done.code, done.out)
    assert "changed since you read it" in done.err
    assert version in done.err
    assert {"k": "second"} == await client.get_state("app")


@pytest.mark.parametrize("value", [str(1 << 63), r'"\ud800"', "[" * 400 + "]" * 400, "[" * 99_999])
async def test_what_state_cannot_hold_is_a_sentence(served: Running, client: Client, value: str) -> None:
    done = await notecase("state", "put", "app", "k", value, "--server", served.address)
    assert (1, "") == (done.code, done.out)
    assert done.err.startswith("Error: State cannot hold this value: ")
    assert {} == await client.get_state("app")


@pytest.mark.parametrize("words", [("k", "\udcff"), ("\udcff", "1"), ("k", '{"\udcff": 1}')])
async def test_text_that_is_not_utf_8_is_a_sentence(served: Running, client: Client, words: tuple[str, str]) -> None:
    """As a shell passes $'\\xff'."""
    done = await notecase("state", "put", "app", *words, "--server", served.address)
    assert (1, "") == (done.code, done.out)
    assert done.err.startswith("Error: State cannot hold this value: ")
    assert {} == await client.get_state("app")


@pytest.mark.parametrize("value", ["[" * 17 + "]" * 17, "1e999"])
async def test_a_refusal_of_the_server_is_printed_in_its_words(served: Running, value: str) -> None:
    done = await notecase("state", "put", "app", "k", value, "--server", served.address)
    assert (1, "") == (done.code, done.out)
    assert done.err.startswith("Error: value")


async def test_a_session_that_is_not_there_is_a_sentence(served: Running) -> None:
    for command in (["get", "none"], ["put", "none", "k", "1"], ["watch", "none"]):
        done = await notecase("state", *command, "--server", served.address)
        assert (1, "", f"Error: {missing('sessions/none')}\n") == done


async def test_changes_of_all_three_scopes_are_printed_as_they_come(served: Running, client: Client, case: str) -> None:
    """One line each, with what was done; other users' are not, nor what was there before."""
    await client.put_state("app", "old", 1)
    async with watching(served.address, "case") as watch:
        ops = [v1.StateOp(key="seen", increment=-1), v1.StateOp(key="case", remove=Empty())]
        await client.state.UpdateState(v1.UpdateStateRequest(name=f"{case}/state", ops=ops))
        assert {"state": f"{case}/state", "version": 2, "key": "seen", "increment": -1} == await watch.next()
        assert {"state": f"{case}/state", "version": 2, "key": "case", "remove": True} == await watch.next()
        await client.put_state("users/eve", "name", "Eve")
        await client.put_state("users/ada", "name", "Ada")
        assert {"state": "users/ada/state", "version": 1, "key": "name", "set": "Ada"} == await watch.next()
        append = v1.StateOp(key="tags", append=v1.Value(string_value="x"))
        await client.state.UpdateState(v1.UpdateStateRequest(name="app/state", ops=[append]))
        assert {"state": "app/state", "version": 2, "key": "tags", "append": "x"} == await watch.next()


async def test_a_cut_loses_no_change_of_any_scope(served: Running, client: Client, case: str) -> None:
    """The session's come again from its log; what else was changed or removed meanwhile is read."""
    for key in ("gone", "kept"):
        await client.put_state("users/ada", key, 1)
    async with Proxy(served.address) as proxy, watching(proxy.address, case) as watch:
        await client.put_state("users/ada", "kept", 2)
        assert 2 == (await watch.next())["set"]
        proxy.deaf = True  # changes of this moment are lost
        await client.put_state(case, "seen", 4)
        remove = v1.StateOp(key="gone", remove=Empty())
        await client.state.UpdateState(v1.UpdateStateRequest(name="users/ada/state", ops=[remove]))
        await client.put_state("app", "weather", "fog")
        proxy.deaf = False
        proxy.cut()
        told = [await watch.next() for _ in range(3)]
        await client.put_state("app", "weather", "rain")
        assert {"state": "app/state", "version": 2, "key": "weather", "set": "rain"} == await watch.next()
    assert [
        ("app/state", 1, "weather", "fog"),
        (f"{case}/state", 2, "seen", 4),
        ("users/ada/state", 4, "gone", True),
    ] == sorted(tuple(one.values()) for one in told)


async def test_a_watch_outlasts_a_restart_of_the_server(tmp_path: Path) -> None:
    store, log = f"sqlite:{tmp_path / 'notecase.db'}", tmp_path / "log"
    port = free_port()
    server = await Spawned.start(store, log, port=port)
    try:
        async with Client(server.address) as client:
            await client.create_session(session_id="case")
            async with watching(server.address, "case") as watch:
                await server.kill()
                server = await Spawned.start(store, log, port=port)
                await client.put_state("sessions/case", "seen", 1)
                told = await watch.next()
    finally:
        await server.kill()
    assert {"state": "sessions/case/state", "version": 1, "key": "seen", "set": 1} == told


async def test_a_watch_ends_with_its_session(served: Running, client: Client, case: str) -> None:
    process = await spawn(*COMMAND, "state", "watch", "case", "--server", served.address)
    assert process.stderr is not None
    await process.stderr.readline()
    await client.sessions.DeleteSession(v1.DeleteSessionRequest(name=case))
    out, err = await process.communicate()
    assert (1, b"", f"Error: {missing('sessions/case')}\n".encode()) == (process.returncode, out, err)


async def test_at_a_terminal_state_is_a_table_and_changes_are_read_by_people(
    served: Running, client: Client, case: str
) -> None:
    """What a note says cannot command the terminal."""
    async with terminal("state", "get", "case", "--server", served.address) as screen:
        assert 0 == await screen.ended()
    rows = [line.split("  ")[0] for line in screen.screen.splitlines()]
    assert ["KEY", *sorted(NOTES)] == rows
    assert "2 bytes" in screen.screen
    async with terminal("state", "put", "case", "case", "\x1b]0;title\x07", "--server", served.address) as screen:
        assert 0 == await screen.ended()
    assert "case = \ufffd]0;title\ufffd  (version 2)\n" == screen.screen
    async with terminal("state", "get", "users/ada", "--server", served.address) as screen:
        assert 0 == await screen.ended()
    assert "This state has no keys.\n" == screen.screen
    async with terminal("state", "watch", "case", "--server", served.address) as screen:
        await screen.until("Watching sessions/case/state, users/ada/state, app/state.")
        await client.put_state("users/ada", "name", "Ada")
        await screen.until("users/ada  name = Ada")
        ops = [
            v1.StateOp(key="seen", increment=-2),
            v1.StateOp(key="tags", append=v1.Value(string_value="mud")),
            v1.StateOp(key="case", remove=Empty()),
        ]
        await client.state.UpdateState(v1.UpdateStateRequest(name=f"{case}/state", ops=ops))
        for line in ("seen -= 2", "tags += [mud]", "case is removed"):
            await screen.until(f"sessions/case  {line}")
        await screen.type("\x03")
        assert 130 == await screen.ended()
