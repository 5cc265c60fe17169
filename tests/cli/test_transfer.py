"""`notecase export` and `notecase import`: a session as a file, whole or not at all."""

from pathlib import Path

from notecase import v1

from tests.cli.command import notecase
from tests.support.server import Running


async def test_a_session_is_taken_along(served: Running, agent: v1.Agent, tmp_path: Path) -> None:
    file = tmp_path / "case.notecase"
    async with served.client() as client:
        await client.create_session(agent.name, session_id="case", state={"n": 1})
        await client.invoke("/say Good evening.", session="sessions/case")
    done = await notecase("export", "case", str(file), "--server", served.address)
    assert (0, "", "") == tuple(done)
    done = await notecase("import", str(file), "--session", "moved", "--server", served.address)
    assert (0, "sessions/moved, 6 events\n", "") == tuple(done)
    assert 0 == (await notecase("export", "moved", str(tmp_path / "again"), "--server", served.address)).code
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    done = await notecase("import", str(file), "--session", "moved", "--server", served.address)
    assert 1 == done.code
    assert done.err.startswith("Error: There is already a session 'sessions/moved'")


async def test_a_file_is_never_left_half_written(served: Running, tmp_path: Path) -> None:
    """What was there stays when the export fails, and nothing beside it is left."""
    file = tmp_path / "case.notecase"
    file.write_bytes(b"before")
    done = await notecase("export", "none", str(file), "--server", served.address)
    assert (1, "") == (done.code, done.out)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(file.name, b"before")]
    done = await notecase("import", str(file), "--server", served.address)
    assert (1, "Error: The file is not an export of a session; nothing of it was imported.\n") == (done.code, done.err)
    done = await notecase("export", "none", str(tmp_path / "missing" / "file"), "--server", served.address)
    assert (1, True) == (done.code, "No such file or directory" in done.err)
