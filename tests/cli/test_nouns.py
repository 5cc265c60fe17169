"""Runs, logs, messages, blobs and the changes of sessions: what each prints, for people and for programs."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
from notecase import v1
from notecase_server.cli import named
from notecase_server.cli.connection import Exit, Refusal
from notecase_server.cli.sessions import sessions
from notecase_server.engine.summary import KEEP_RECENT

from tests.cli.command import COMMAND, Done, missing, notecase, spawn
from tests.support.server import Running


@pytest.fixture
async def case(served: Running, agent: v1.Agent) -> v1.Session:
    """A session with one turn and a note."""
    async with served.client() as client:
        session = await client.create_session(agent.name, session_id="case", state={"n": 1})
        await client.invoke("/say Good evening.", session=session.name)
    return session


class Commands:
    """The commands on one server."""

    def __init__(self, served: Running) -> None:
        self._env = {"NOTECASE_ADDRESS": served.address}

    async def __call__(self, words: str, *more: str, said: str = "") -> Done:
        return await notecase(*words.split(), *more, said=said, env=self._env)


@pytest.fixture
def command(served: Running) -> Commands:
    return Commands(served)


async def test_runs_are_listed_shown_and_cancelled(served: Running, case: v1.Session, command: Commands) -> None:
    start = v1.StartRun(
        session=case.name, run_id="r2", messages=[v1.Message(parts=[v1.Part(text="/pause 9000 /chunks 100")])]
    )
    await served.runs.CreateRun(v1.CreateRunRequest(start=start))
    table = [line.split() for line in (await command("runs list case")).out.splitlines()]
    assert ["RUN", "AGENT", "STATE", "CREATED", "ENDED"] == table[0]
    assert [("case/r2", "running"), ("detective@1", "succeeded")] == [(table[1][0], table[1][2]), tuple(table[2][1:3])]
    running = json.loads((await command("runs list -o json --filter", "state = RUNNING")).out)
    assert ["sessions/case/runs/r2"] == [run["name"] for run in running]
    assert (0, "", "") == await command("runs cancel case --reason late")
    shown = await command("runs show case/r2")
    assert "cancelled" in shown.out
    assert "STATE_CANCELLED" == json.loads((await command("runs show case -o json")).out)["state"]
    done = await command("runs cancel case/r2")
    assert (1, True) == (done.code, "r2" in done.err)
    done = await command("runs show none")
    assert (1, True) == (done.code, "There is no session 'sessions/none'" in done.err)


async def test_a_log_is_printed_and_followed(served: Running, case: v1.Session, command: Commands) -> None:
    """A line an event, without any text that a terminal would obey; -f goes on until Ctrl-C."""
    lines = (await command("logs case")).out.splitlines()
    assert [str(n) for n in range(1, 7)] == [line.split()[0] for line in lines]
    assert "state_changed n = 1" in lines[0]
    assert "message_added agents/detective: Good evening." in lines[3]
    events = [json.loads(line) for line in (await command("logs case -o json --after 4")).out.splitlines()]
    assert [("5", "usage"), ("6", "run_state_changed")] == [(one["sequence"], next(reversed(one))) for one in events]
    assert 2 == (await command("logs case -o yaml --after 4")).out.count("---\n")
    process = await spawn(*COMMAND, "logs", "case", "-f", "--after", "6", env={"NOTECASE_ADDRESS": served.address})
    assert process.stdout is not None
    async with served.client() as client:
        await client.put_state(case.name, "title", "\x1b[2J")
    assert b"title = \xef\xbf\xbd[2J" in await process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert (130, b"") == (process.returncode, err)


async def test_messages_are_listed_shown_and_added(served: Running, case: v1.Session, command: Commands) -> None:
    added = await command("messages append case - --role system", said="Be brief.")
    assert (0, "") == (added.code, added.err)
    rows = (await command("messages list case --newest")).out.splitlines()
    assert ["Be brief.", "Good evening."] == [line.split("  ")[-1].strip() for line in rows[1:3]]
    shown = await command("messages show", added.out.strip())
    assert "system: Be brief.\n" == shown.out
    shown = await command("messages show", rows[2].split()[1])
    assert "Good evening." in shown.out
    done = await command("messages show", rows[2].split()[1].rpartition("/")[2])
    assert (2, True) == (done.code, "`notecase messages list SESSION` has them." in done.err)
    (newest,) = json.loads((await command("messages list case --newest --limit 1 -o json")).out)
    assert ("ROLE_SYSTEM", added.out.strip()) == (newest["role"], newest["name"])


async def test_blobs_go_there_and_back(command: Commands, tmp_path: Path) -> None:
    file = tmp_path / "plan.pdf"
    file.write_bytes(b"%PDF-1.7")
    name = f"blobs/{hashlib.sha256(b'%PDF-1.7').hexdigest()}"
    assert (0, f"{name}\n", "") == await command("blobs upload", str(file))
    assert (0, f"{name}\n", "") == await command("blobs upload - --type application/pdf", said="%PDF-1.7")
    assert "8 bytes" in (await command("blobs show", name)).out
    assert "%PDF-1.7" == (await command("blobs download", name.removeprefix("blobs/"), "-")).out
    assert 0 == (await command("blobs download", name, str(tmp_path / "copy"))).code
    assert b"%PDF-1.7" == (tmp_path / "copy").read_bytes()
    file.write_bytes(b"mine")
    done = await command("blobs download", name, str(file))
    assert (2, f"Error: {file} exists; --force replaces it.\n", b"mine") == (done.code, done.err, file.read_bytes())
    assert 0 == (await command("blobs download --force", name, str(file))).code
    assert b"%PDF-1.7" == file.read_bytes()
    assert (0, "", "") == await command("blobs download", name, os.devnull)
    done = await command("blobs download", name, str(tmp_path))
    assert (2, f"Error: {tmp_path}: Is a directory.\n") == (done.code, done.err)
    (tmp_path / "unknown").write_bytes(b"\xff")
    done = await command("blobs upload", str(tmp_path / "unknown"))
    assert (2, True) == (done.code, "set it with --type" in done.err)


async def test_a_session_is_made_forked_rewound_compacted_and_deleted(
    served: Running, case: v1.Session, command: Commands
) -> None:
    made = await command("sessions create --agent detective --user ada --id new --name", "The violin")
    assert (0, "sessions/new\n", "") == tuple(made)
    found = json.loads((await command("sessions show new -o json")).out)
    assert ("users/ada", "The violin", "agents/detective") == (found["user"], found["display_name"], found["agent"])
    assert (0, "sessions/old\n", "") == await command("sessions fork case --at 1 --id old")
    assert "1" == json.loads((await command("sessions show old -o json")).out)["last_sequence"]
    told = "sessions/case is rewound to 1; 5 events are superseded (the log has 7)\n"
    assert (0, told, "") == await command("sessions rewind case --to 1")
    assert "no summary" in (await command("sessions compact case")).out
    assert (0, "", "") == await command("sessions delete old new --yes")
    left = json.loads((await command("sessions list -o json")).out)
    assert ["sessions/case"] == [one["name"] for one in left]
    done = await command("sessions delete case")
    assert (2, True) == (done.code, "add --yes" in done.err)


async def test_notes_are_read_from_standard_input_and_deleted(case: v1.Session, command: Commands) -> None:
    assert 0 == (await command("state put case draft -", said="First line.\nSecond.")).code
    assert "First line.\nSecond.\n" == (await command("state get case draft")).out
    assert "draft: |-\n  First line.\n  Second.\nn: 1\n" == (await command("state get case -o yaml")).out
    assert (0, "", "") == await command("state delete case draft none")
    assert {"n": 1} == json.loads((await command("state get case")).out)


async def test_what_is_run_is_text_or_the_run_itself(served: Running, case: v1.Session, command: Commands) -> None:
    """It runs in a new session, which standard error names, or in the given one; a file is sent with it."""
    assert (0, "Hello\n", "") == await command("run --session case", "/say Hello")
    done = await command("run -o json --agent detective", said="/say From a pipe.\n")
    run = json.loads(done.out)
    assert ("STATE_SUCCEEDED", "From a pipe.") == (run["state"], run["reply"]["parts"][0]["text"])
    assert done.err == f"{run['name'].partition('/runs/')[0]} with agents/detective\n"
    done = await command("run -o json", "/fail error")
    assert (1, "STATE_FAILED") == (done.code, json.loads(done.out)["state"])
    done = await command("run --session none", "Hello")
    assert (1, f"Error: {missing('sessions/none')}\n") == (done.code, done.err)
    (agents,) = json.loads((await command("agents list -o json")).out)
    assert "agents/detective" == agents["name"]


async def test_the_beginning_of_an_id_is_enough(served: Running, case: v1.Session, command: Commands) -> None:
    """The id of a session or a run that the service or a client made; if several begin so, they are listed, and nothing
    is changed."""
    for words in ("sessions show", "runs cancel"):  # given nothing, as an unset variable of the shell is
        done = await command(words, "")
        assert (1, "Error: ") == (done.code, done.err[:7])
    first, second, third = "c0ffee01" + "0" * 24, "c0ffee02-d9bc-71de-b377-2d72bd609443", "c0ffee02" + "1" * 24
    for id_ in (first, second, third):
        await served.sessions.CreateSession(v1.CreateSessionRequest(session_id=id_))
    for begun, id_ in (("c0ffee01", first), ("c0ffee02-", second), ("c0ffee021", third)):
        assert f"sessions/{id_}" == (await command("sessions show", begun)).out.split()[0]
    for words in ("sessions show", "logs", "messages list", "state get", "run hello --session"):
        done = await command(words, "c0ffee")
        assert (2, "") == (done.code, done.out)
        told, *listed = done.err.splitlines()
        assert (True, [third, second, first]) == (
            told.endswith("begin with 'c0ffee':"),
            [one.strip() for one in listed],
        )
    done = await command("state put c0ffee01 n 1")
    assert (0, "") == (done.code, done.err)
    assert {"n": 1} == json.loads((await command(f"state get sessions/{first}")).out)
    for words in ("sessions delete c0ffee01 --yes", "sessions show c0ffe", "sessions show none"):
        done = await command(words)
        assert (1, f"Error: {missing(f'sessions/{words.split()[2]}')}\n") == (done.code, done.err)
    (run,) = json.loads((await command("runs list case -o json")).out)
    which = run["name"].rpartition("/")[2]
    shown = await command(f"runs show case/{which[:8]}")
    assert run["name"] == shown.out.split()[0]
    assert f"({which[:8]})" in (await command("logs case")).out
    assert which not in (await command("logs case")).out
    for begun in ("none", which[:5]):
        done = await command(f"runs show case/{begun}")
        assert (1, True) == (done.code, f"'sessions/case/runs/{begun}'" in done.err)


async def test_an_id_that_a_caller_chose_is_not_found_by_its_beginning(
    served: Running, case: v1.Session, command: Commands
) -> None:
    """`order-1` may be a whole id, of a session that was deleted: a command must not change order-12 instead."""
    for id_ in ("order-12", "c0ffee0-12"):
        session = await served.sessions.CreateSession(v1.CreateSessionRequest(session_id=id_))
        message = v1.Message(parts=[v1.Part(text="/pause 9000 /chunks 100")])
        start = v1.StartRun(session=session.name, agent="agents/detective", run_id="first-12", messages=[message])
        await served.runs.CreateRun(v1.CreateRunRequest(start=start))
        begun = id_[:-1]
        for words in ("state put {} n 1", "runs cancel {}", "sessions rewind {} --to 1", "approve {}"):
            done = await command(words.format(begun))
            assert (1, f"Error: {missing(f'sessions/{begun}')}\n") == (done.code, done.err)
        assert 1 == (await command(f"runs cancel {id_}/first-1")).code
        run = await served.runs.GetRun(v1.GetRunRequest(name=f"{session.name}/runs/first-12"))
        assert v1.Run.STATE_CANCELLED != run.state
        assert 0 == (await command(f"runs cancel {id_}")).code


async def test_among_too_many_sessions_or_runs_only_a_complete_id_is_found(
    served: Running, case: v1.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A beginning that is unique among the newest may not be unique among all."""
    monkeypatch.setattr(named, "READ", 1)
    async with served.client() as client:
        made = await client.create_session()
        id_ = made.name.removeprefix("sessions/")
        with pytest.raises(Refusal, match="too many sessions") as refused:
            await named.session(client, id_[:13])
        assert Exit.USAGE == refused.value.code
        assert made.name == await named.session(client, id_)
        run = (await client.invoke("/say Again.", session=case.name)).run.name
        with pytest.raises(Refusal, match="too many runs in sessions/case"):
            await named.run(client, f"case/{run.rpartition('/')[2][:8]}")


async def test_commands_print_what_they_did(served: Running, agent: v1.Agent, command: Commands) -> None:
    """How much is superseded, where a summary is, why a run was cancelled, what a message calls."""
    async with served.client() as client:
        await client.create_session(agent.name, session_id="long")
        for number in range(8):
            await client.invoke(f"/say {number}", session="sessions/long")
    assert (
        "sessions/long: no summary: too short to shorten\n" == (await command("sessions compact long --keep 500")).out
    )
    told = (await command("sessions compact long")).out
    found = json.loads((await command("sessions show long -o json")).out)
    at = int(found["summary_sequence"])
    assert f"sessions/long: summary at {at}; `notecase logs long --after {at - 1}` shows it\n" == told
    assert "summarized" in (await command(f"logs long --after {at - 1}")).out.splitlines()[0]
    shown = (await command("sessions show long")).out
    assert shown.index("Summarised for the model: ") > shown.index("> /say 2")
    assert f"(event {at})" in shown
    told = (await command("sessions compact long")).out
    assert "sessions/long: no further summary: too short to shorten\n" == told
    last = int(found["last_sequence"])
    assert (
        f"sessions/long is rewound to {last - 4}; 4 events are superseded (the log has {last + 1})\n"
        == (await command(f"sessions rewind long --to {last - 4}")).out
    )


async def test_a_cancel_s_reason_and_a_message_s_calls_are_shown(
    served: Running, case: v1.Session, command: Commands
) -> None:
    said = v1.Message(parts=[v1.Part(text="/pause 9000 /chunks 100")])
    await served.runs.CreateRun(v1.CreateRunRequest(start=v1.StartRun(session=case.name, run_id="r2", messages=[said])))
    assert (0, "", "") == await command("runs cancel case --reason", "too late")
    assert "cancelled: too late" in (await command("runs show case/r2")).out
    text = [v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text="/call weather {}")])]
    await served.runs.CreateRun(v1.CreateRunRequest(start=v1.StartRun(session=case.name, run_id="r3", messages=text)))
    await served.runs.WaitRun(v1.WaitRunRequest(name=f"{case.name}/runs/r3"))
    assert "→ weather({})" in (await command("messages list case")).out


def test_help_and_service_leave_as_many_messages() -> None:
    option = next(one for one in sessions.commands["compact"].params if one.name == "keep")
    assert f"sets, or {KEEP_RECENT}." in str(getattr(option, "help", ""))


@pytest.mark.parametrize(
    "words",
    [
        ("keys", "create", "--role", "user", "--user", ""),
        ("keys", "create", "--role", "admin", "--tenant", ""),
        ("audit", "list", "--tenant", ""),
        ("sessions", "create", "--user", ""),
        ("run", "--session", "", "Hello"),
        ("profiles", "set", ""),
    ],
    ids=" ".join,
)
async def test_an_empty_value_is_refused_where_the_command_would_do_more_without_it(words: tuple[str, ...]) -> None:
    """A script's variable that is not set: a key for one user became one for all, and a new session was made."""
    done = await notecase(*words)
    assert (2, "", True) == (done.code, done.out, "It is empty; give a value, or leave the option out." in done.err)
