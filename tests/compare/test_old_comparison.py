"""A comparison that an earlier version left: it goes on, and is reported."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from support.compare import MIXED, QUIET, row_of

from hubpath_fast.compare import compare
from hubpath_fast.compare.settings import PROBLEM, as_begun, make_settings, open_folder
from hubpath_fast.files import write_json
from hubpath_fast.recipes.analysis import report


class TestOlder:
    """A folder that ``hubpath compare`` of commit 78f8c81 left, without its checkpoints:
    ``--data digits --hub test_resnet,test_efficientnet --k 1 --quick --steps 3 --no-pretrained``,
    its methods single, best-single, ensemble, hub-pathway, k-sweep and zoo-tuning."""

    @pytest.fixture
    def older(self, tmp_path) -> Path:
        archive = Path(__file__).parents[1] / "data_files" / "old_comparison.tar.xz"
        with tarfile.open(archive) as file:
            file.extractall(tmp_path, filter="data")
        return tmp_path / "before"

    def test_it_goes_on(self, older):
        before = json.loads((older / "table.json").read_text())
        settings = make_settings(
            "digits", MIXED, quick=True, top={"pretrained": False, "k": 1}, trainer={"steps": 3}
        )
        methods = "single,best-single,ensemble,hub-pathway,k-sweep,zoo-tuning"
        kept = {p: p.stat().st_mtime_ns for p in older.glob("runs/seed-0/*/result.json")}
        rows = compare(settings, f"{methods},without-explore", (0,), older, 1, QUIET)
        added = row_of(rows, "without-explore")
        assert added["status"] == "done"
        assert added["rates"] == [[2e-3]]  # the pathway's
        assert len(kept) == 4
        assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items())
        for old in before["rows"]:
            now = row_of(rows, old["method"])
            assert {key: now[key] for key in old} == old

    def test_its_defaults_are_said_and_kept(self, older):
        settings = make_settings(
            "digits", MIXED, quick=True, top={"pretrained": False, "k": 1}, trainer={"steps": 3}
        )
        begun, note = as_begun(settings, older)
        fit = begun.fit
        assert (fit.generator_width, fit.generator_stride, fit.head_init) == (16, 2, None)
        assert note == (
            f"{older} was begun by an earlier version, and goes on with its defaults "
            "(generator_width: 16 there, None now; generator_stride: 2 there, None now; "
            "trainer.lr_router: 0.003 there, 0.01 now)"
        )

    def test_a_folder_of_today_is_none(self, tmp_path):
        given = make_settings("digits", MIXED, top={"router_supervision": 0.5})
        open_folder(tmp_path, given)
        write_json(tmp_path / "runs" / "seed-0" / PROBLEM, {})
        default = make_settings("digits", MIXED)
        assert as_begun(default, tmp_path) == (default, None)
        with pytest.raises(ValueError, match=r"router_supervision: 0.5 there, 0.1 now"):
            open_folder(tmp_path, default)

    def test_it_is_reported(self, older):
        page = report(older)
        table = json.loads((older / "table.json").read_text())
        value = row_of(table["rows"], "hub-pathway")["mean"]
        assert f"{100 * value:.1f}" in page.read_text()
        assert (older / "report/figures/mean_weight.csv").is_file()
