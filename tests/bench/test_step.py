"""bench.step: what it counts, checks, refuses and writes."""

import json

import pytest
import torch
from torch import nn

import hubpath_fast as hp
from bench import step, step_counts, step_growth, step_models, step_rows

PRESET = step_models.Preset(
    lambda: [
        nn.Sequential(
            nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 5)
        )
        for _ in range(3)
    ],
    24, 2, 5, (16,), {16: 4}, 4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_everything_is_measured_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(step.PRESETS, "tiny", PRESET)
    file = tmp_path / "step.json"
    assert step.main(["--preset", "tiny", "--quick", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    rows = {(r["row"], r["mode"], r["N"]): r for r in found["sizes"]["16"]["rows"]}
    for name in ("generator", "glue", "experts alone", "reference", "dense", "sequential"):
        assert 0 < rows[name, "train", 24]["p20"] <= rows[name, "train", 24]["p80"]
    for n in (24, 1, 64):
        assert rows["sequential", "predict", n]["samples_per_second"] > 0
    assert rows["sequential", "train", 24]["expert_forwards"] == 2  # K
    assert rows["dense", "train", 24]["expert_forwards"] == 3  # M
    # The counts, and what is only looked at on a CPU, where looking is free (targets in range).
    assert 1 <= rows["sequential", "train", 24]["host_reads"] <= 4
    assert rows["reference", "train", 24]["host_reads"] > 6
    k_single = 2 * sum(r["p50"] for (name, *_), r in rows.items() if name in SINGLES) / 3
    assert found["k_single_seconds"] == pytest.approx(k_single)
    assert found["ratio_to_k_single"] == pytest.approx(
        rows["sequential", "train", 24]["p50"] / k_single
    )
    for key in ("ratio_to_dense", "glue_share", "generator_share", "commit", "device"):
        assert key in found
    text = capsys.readouterr().out
    assert "ratio_to_k_single" in text
    assert "16 px" in text


SINGLES = {f"single {i} (Sequential)" for i in range(3)}


def test_a_wrong_hub_is_never_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(step.PRESETS, "tiny", PRESET)
    run = hp.model.executors.sequential.join
    monkeypatch.setattr(hp.model.executors.sequential, "join", lambda *args: run(*args) * 1.01)
    file = tmp_path / "step.json"
    assert step.main(["--preset", "tiny", "--quick", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert "ratio_to_k_single" not in found
    [note] = [r["note"] for r in found["sizes"]["16"]["rows"] if r["row"] == "sequential"
              and r["mode"] == "train"]  # fmt: skip
    assert "not timed: prediction: relative error 1.0e-02" in note


def test_dense_predicts_as_the_reference_does():
    setting = step_rows.make(PRESET, 16, "cpu")
    nn.init.normal_(setting.generator.clean.weight)
    plain, dense = (step_rows.reference_hub(setting, dense).eval() for dense in (False, True))
    torch.testing.assert_close(dense(setting.x), plain(setting.x), rtol=1e-5, atol=1e-6)


def test_reads_of_the_host_are_counted():
    x = torch.arange(4)
    assert step_counts.host_reads(lambda: x + 1) == 0
    assert step_counts.host_reads(lambda: (x.sum().item(), x.tolist(), bool(x.any()))) == 3
    assert step_counts.host_reads(lambda: (x[x > 1], x.nonzero())) == 2


def test_balanced_scores_give_every_expert_its_share():
    scores = step_models.balanced_scores(48, 8, 2)
    routing = hp.functional.noisy_topk(*scores(None), 2)
    assert routing.counts() == [12] * 8


def linear_experts(names, outputs):
    return [nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, outputs)) for _ in names]


def test_growth_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_growth, "AXES", {"M": [(8, 4, 2), (8, 64, 2)], "N": [(4, 2, 1)]})
    monkeypatch.setattr(step_growth, "timm_experts", linear_experts)
    arguments = ["--preset", "tiny", "--quick", "--growth", "--plots", str(tmp_path),
                 "--json", str(tmp_path / "growth.json")]  # fmt: skip
    assert step.main(arguments) == 0
    found = json.loads((tmp_path / "growth.json").read_text())["growth"]
    assert [row["M"] for row in found["M"]] == [4, 64]
    grown = found["growth_4_to_64"]
    assert grown["beyond"] == pytest.approx(grown["step"] / grown["experts alone"])
    assert (tmp_path / "step-growth-M-cpu.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tiny", "--px", "77"], "--px: tiny has the sizes 96, 32"),
        (["--preset", "huge"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        step.main(arguments)
    assert message in capsys.readouterr().err


def test_interpreted_kernels_are_never_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="never timed"):
        step.main(["--preset", "tiny", "--quick"])
