"""The benchmarks' own arithmetic and tables; what they measure is not a test's to say."""

import socket
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import where
from benchmarks.load import Load
from benchmarks.peers.__main__ import table
from benchmarks.processes import Cpus, running_server, running_stub
from benchmarks.soak.mix import Mix
from benchmarks.soak.plot import svg
from benchmarks.soak.verdict import Growth, Sample, growth
from benchmarks.where import shares
from benchmarks.written import write
from tests.promises import ROOT


def test_the_peers_table_compares_each_server_with_ours_round_by_round() -> None:
    ours = [
        {"token-flat": 10.0, "token-paced": 20.0, "turn": 1.0},
        {"token-flat": 30.0, "token-paced": 20.0, "turn": 1.0},
    ]
    theirs = [
        {"token-flat": 40.0, "token-paced": 20.0, "turn": 2.5},
        {"token-flat": 60.0, "token-paced": 30.0, "turn": 3.5},
    ]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table({"ours": ours, "peer": theirs})]
    assert ["", "server", "median", "min to max", "times ours"] == cells[0]
    assert [
        ["CPU per token, 8 streams flat out", "ours", "20 µs", "10 to 30", "1"],
        ["CPU per token, 8 streams flat out", "peer", "50 µs", "40 to 60", "3"],
        ["CPU per token, 32 streams, one every 10 ms", "ours", "20 µs", "20 to 20", "1"],
        ["CPU per token, 32 streams, one every 10 ms", "peer", "25 µs", "20 to 30", "1.25"],
        ["CPU per turn of one token, 8 at once", "ours", "1 ms", "1 to 1", "1"],
        ["CPU per turn of one token, 8 at once", "peer", "3 ms", "2.5 to 3.5", "3"],
    ] == cells[2:]


async def test_each_action_of_a_soak_ends_as_it_should_a_second_time_too(tmp_path: Path) -> None:
    cpus = Cpus.choose()
    async with (
        running_stub(cpus.load, tmp_path) as model,
        running_server(cpus.server, tmp_path, "soak", model.port) as server,
        Load.connect(server.port) as load,
    ):
        mix = Mix(load)
        await mix.prepare()
        session = await load.session()
        for _, act in mix.actions.values():
            await act(session)
            if act != mix.deletion:
                await act(session)


async def test_an_action_that_goes_wrong_is_counted_and_reported() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with Load.connect(nobody.getsockname()[1]) as load:
            mix = Mix(load)
            await mix.one()
    assert (0, 1) == (mix.done.total(), mix.wrong.total())
    assert [True] == ["UNAVAILABLE" in error for error in mix.errors]


def soaked(grown: float) -> dict[str, Growth]:
    """What is said of half an hour whose memory settles in the first half, and then grows by so many MiB an hour."""
    samples = [
        Sample(
            seconds=number * 10.0,
            resident=int((100 + min(number, 60) / 2 + grown * max(0, number - 90) / 360) * 2**20),
            descriptors=50 + number % 3,
            threads=16,
            busy=0.7,
            actions=number * 400,
        )
        for number in range(1, 181)
    ]
    return {each.watched.name: each for each in growth(samples)}


def test_a_server_that_settles_is_flat() -> None:
    found = soaked(grown=4.0)
    assert [True, True, True] == [each.flat for each in found.values()]
    assert pytest.approx(4.0, abs=0.1) == found["resident"].per_hour


def test_a_server_that_grows_is_not_flat() -> None:
    found = soaked(grown=40.0)
    assert (False, True) == (found["resident"].flat, found["descriptors"].flat)


def test_two_samples_are_too_few_to_tell() -> None:
    with pytest.raises(ValueError, match="too few"):
        growth([Sample(0.0, 0, 0, 0, 0.0, 0)] * 2)


def test_a_plot_has_a_line_for_each_panel() -> None:
    drawn = ElementTree.fromstring(
        svg([0.0, 1.0, 2.0], [("resident & more", [0.0, 50.0, 100.0]), ("threads", [0.0] * 3)])
    )
    lines = [line.attrib["points"] for line in drawn.iter("{http://www.w3.org/2000/svg}polyline")]
    assert ["60.0,150.0 420.0,90.0 780.0,30.0", "60.0,320.0 420.0,320.0 780.0,320.0"] == lines


def test_a_sample_counts_for_the_part_of_its_innermost_known_frame() -> None:
    ours = "run (notecase_server/serve.py:9);commit (notecase_server/store/steps.py:70)"
    stacks = [
        f"{ours} 3",
        f"{ours};sqlite3_step (libsqlite3.so.0);memcpy (libc.so.6) 2",
        f"{ours};execute (sqlite3/dbapi2.py:4);pwrite (libc.so.6) 2",
        f"{ours};execute (sqlite3/dbapi2.py:4);fdatasync (libc.so.6) 9",
        "start_thread (libc.so.6);grpc_core::Work (grpc/_cython/cygrpc.cpython-311-x86_64-linux-gnu.so) 2",
        "clone (libc.so.6) 1",
    ]
    assert {
        "The store's Python (`store/`)": 0.3,
        "SQLite": 0.4,
        "gRPC": 0.2,
        "The rest": 0.1,
    } == shares(stacks)


def test_the_table_of_a_profile_adds_up_to_what_was_measured() -> None:
    found = shares(["a (notecase_server/rpc/watch.py:1) 1", "b (uvloop/loop.pyx:2) 3"])
    lines = list(where.table([(where.WORKS[0], 4000.0, found), (where.WORKS[1], 20.0, found)]))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert ["The event loop", "3000", "15"] == cells[2]
    assert ["All", "4000", "20"] == cells[-1]
    for column in (1, 2):
        assert float(cells[-1][column]) == sum(float(row[column]) for row in cells[2:-1])


def test_a_table_takes_the_place_of_the_one_in_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Head\n\n<!-- measured -->\nold\n<!-- /measured -->\n\nTail\n")
    for rows in (["| one |"], ["| two |"]):
        write(page, rows)
    said = page.read_text()
    assert said.startswith("# Head\n\n<!-- measured -->\nMeasured on 20")
    assert said.endswith("\n\n| two |\n<!-- /measured -->\n\nTail\n")
    assert "one" not in said
    assert "old" not in said
    page.write_text("# No place")
    with pytest.raises(ValueError, match="no place for a table"):
        write(page, ["| three |"])
    assert "# No place" == page.read_text()


def test_the_pages_have_a_place_for_their_tables(tmp_path: Path) -> None:
    for name in ("performance.md", "profile.md"):
        page = tmp_path / name
        page.write_text((ROOT / "docs" / name).read_text())
        write(page, ["| new |"])
        assert "| new |" in page.read_text()
