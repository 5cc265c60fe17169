"""The benchmarks' own arithmetic and tables; what they measure is not a test's to say."""

from benchmarks.peers.__main__ import table


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
