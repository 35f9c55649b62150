"""bench.shelf_prune: what it times drops the same experts."""

from bench import shelf_prune


def test_both_ways_drop_the_same_experts(capsys, monkeypatch):
    for aggregator in ("sum", "linear"):
        given = ["--experts=12", "--images=40", "--classes=3", "--plain-steps=3"]
        monkeypatch.setattr("sys.argv", ["bench", *given, f"--aggregator={aggregator}"])
        shelf_prune.main()
        *_, last = capsys.readouterr().out.splitlines()
        assert last.endswith("for all; the same experts: True")
