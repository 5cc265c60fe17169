"""`notecase sessions export` and `import`: a session as a file, whole or not at all."""

from pathlib import Path

from notecase import v1

from tests.cli.command import COMMAND, notecase, spawn
from tests.support.server import Running


async def test_a_session_is_taken_along(served: Running, agent: v1.Agent, tmp_path: Path) -> None:
    file = tmp_path / "case.notecase"
    async with served.client() as client:
        await client.create_session(agent.name, session_id="case", state={"n": 1})
        await client.invoke("/say Good evening.", session="sessions/case")
    done = await notecase("sessions", "export", "case", str(file), "--server", served.address)
    assert (0, "", "") == tuple(done)
    whole = file.read_bytes()
    file.write_bytes(b"before")
    done = await notecase("sessions", "export", "case", str(file), "--force", "--server", served.address)
    assert (0, "", "", whole) == (*done, file.read_bytes())
    done = await notecase("sessions", "import", str(file), "--id", "moved", "--server", served.address)
    assert (0, "sessions/moved\n", "") == tuple(done)
    process = await spawn(*COMMAND, "sessions", "export", "moved", "-", "--server", served.address)
    assert file.read_bytes() == (await process.communicate())[0]
    process = await spawn(*COMMAND, "sessions", "import", "-", "--id", "piped", "--server", served.address)
    assert b"sessions/piped\n" == (await process.communicate(file.read_bytes()))[0]
    done = await notecase("sessions", "import", str(file), "--id", "moved", "--server", served.address)
    assert 1 == done.code
    assert done.err.startswith("Error: There is already a session 'sessions/moved'")


async def test_a_file_is_never_left_half_written(served: Running, tmp_path: Path) -> None:
    """An existing file stays when the export fails, and no other file is left."""
    file = tmp_path / "case.notecase"
    file.write_bytes(b"before")
    done = await notecase("sessions", "export", "none", str(file), "--server", served.address)
    assert (2, f"Error: {file} exists; --force replaces it.\n") == (done.code, done.err)
    done = await notecase("sessions", "export", "none", str(file), "--force", "--server", served.address)
    assert (1, "") == (done.code, done.out)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(file.name, b"before")]
    done = await notecase("sessions", "import", str(file), "--server", served.address)
    assert (1, "Error: The file is not an export of a session; nothing was imported.\n") == (done.code, done.err)
    done = await notecase("sessions", "export", "none", str(tmp_path / "missing" / "file"), "--server", served.address)
    assert (2, True) == (done.code, "No such file or directory" in done.err)
