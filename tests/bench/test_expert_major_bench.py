"""bench.expert_major: a hub that is larger than its room says the same, and brings experts in less
often where they are asked one after another."""

import pytest

from bench import expert_major


def test_experts_come_in_once_expert_by_expert(capsys):
    expert_major.main(
        ["--experts=6", "--room=2", "--px=32", "--images=48", "--batch=8", "--rounds=1", "--k=1"]
    )
    head, _, *table = capsys.readouterr().out.splitlines()
    assert head.startswith("48 images of 32 px in batches of 8, 6 test_resnet, K = 1; ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert [row[:2] for row in rows] == [
        ["batch by batch", "all"], ["expert by expert", "all"],
        ["batch by batch", "2"], ["expert by expert", "2"],
    ]  # fmt: skip
    resident, _, often, once = [int(row[2]) for row in rows]
    assert resident == 0
    assert 4 <= once <= 6 < often
    assert all(float(row[3]) > 0 for row in rows)


def test_a_way_that_says_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(expert_major, "AGREE", -1.0)
    with pytest.raises(RuntimeError, match="batch by batch, room for all: predictions differ by"):
        expert_major.main(["--experts=3", "--room=2", "--px=32", "--images=8", "--k=1"])
