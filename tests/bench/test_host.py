"""The host's costs are measured for any of timm's models and for the glue; the rows are whole."""

import subprocess
import sys

from bench import host, jsonl
from bench.records import ROOT


def test_a_row_for_each_thing_that_is_asked_at_every_step(tmp_path, capsys):
    out = tmp_path / "host.jsonl"
    arguments = ["--models", "test_resnet", "--sizes", "--seconds", "0", "--out", str(out)]
    host.main(arguments)
    rows = jsonl.read(out)
    assert [row["row"] for row in rows] == ["taken anew", "unchanged", "shared"]
    assert all(row["p50"] > 0 and row["model"] == "test_resnet" for row in rows)
    assert capsys.readouterr().out.startswith("test_resnet: taken anew ")


def test_launches_from_a_kept_plan_and_planned_ones(tmp_path):
    """In a process of its own: in this one kernels may be interpreted."""
    out = tmp_path / "host.jsonl"
    subprocess.run(
        [sys.executable, "-m", "bench.host", "--models", "--sizes", "1", "--seconds", "0",
         "--out", str(out)],
        check=True, cwd=ROOT,
    )  # fmt: skip
    rows = [row for row in jsonl.read(out) if row["N"] == 48]
    calls = {f"{a}, {b}" for a in ("training", "evaluation") for b in ("kept", "planned")}
    assert {row["row"] for row in rows} == calls | {"the step of bench.glue"}
    assert all(row["best"] > 0 for row in rows)
