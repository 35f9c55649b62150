"""The host's costs are measured for any of timm's models, and the rows are whole."""

from bench import host, jsonl


def test_a_row_for_each_thing_that_is_asked_at_every_step(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "host.jsonl"
    host.main(["--models", "test_resnet", "--seconds", "0", "--out", str(out)])
    rows = jsonl.read(out)
    assert [row["row"] for row in rows] == ["taken anew", "unchanged", "shared"]
    assert all(row["p50"] > 0 and row["model"] == "test_resnet" for row in rows)
    assert capsys.readouterr().out.startswith("test_resnet: taken anew ")
