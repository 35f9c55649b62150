"""bench.step: what it counts, checks, refuses and writes."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from support.bench import PRESET, linear_experts
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hubpath_fast as hp
from bench import plot, step, step_counts, step_growth, step_models, step_rows
from hubpath_fast.tasks.atari.distribution import make_atoms
from hubpath_fast.tasks.atari.hub import HubPolicy


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The exit status of a quick run of small networks, and what it wrote."""
    monkeypatch.setitem(step.PRESETS, "tiny", PRESET)
    file = tmp_path / "step.json"

    def run(*options):
        status = step.main(["--preset", "tiny", "--quick", "--json", str(file), *options])
        return status, json.loads(file.read_text())

    return run


def test_everything_is_measured_and_written(run, capsys):
    status, found = run()
    assert status == 0
    rows = {(r["row"], r["mode"], r["N"]): r for r in found["sizes"]["16"]["rows"]}
    for name in ("generator", "glue", "experts alone", "reference", "dense", "sequential"):
        assert 0 < rows[name, "train", 24]["p20"] <= rows[name, "train", 24]["p80"]
    for n in (24, 1, 64):
        for name in ("sequential", "sequential contiguous", "sequential bf16", "dense"):
            assert rows[name, "predict", n]["samples_per_second"] > 0
    assert rows["sequential", "train", 24]["expert_forwards"] == 2  # K
    assert rows["dense", "train", 24]["expert_forwards"] == 3  # M
    # The counts, and what is only looked at on a CPU, where looking is free (targets in range).
    assert 1 <= rows["sequential", "train", 24]["host_reads"] <= 4
    assert rows["reference", "train", 24]["host_reads"] > 6
    for key in ("ratio_to_k_single", "bf16_to_sequential", "contiguous_to_sequential", "commit"):
        assert key in found
    text = capsys.readouterr().out
    assert "ratio_to_k_single" in text
    assert "16 px" in text


def test_a_wrong_hub_is_never_timed(run, monkeypatch):
    join = hp.executors.sequential.join
    monkeypatch.setattr(hp.executors.sequential, "join", lambda *args: join(*args) * 1.01)
    status, found = run()
    assert status == 1
    assert "ratio_to_k_single" not in found
    [note] = [r["note"] for r in found["sizes"]["16"]["rows"] if r["row"] == "sequential"
              and r["mode"] == "train"]  # fmt: skip
    assert "not timed: prediction: relative error 1.0e-02" in note


def test_a_hub_is_checked_without_tf32(tf32):
    setting, flags = step_rows.make(PRESET, 16, "cpu"), []
    for expert in setting.experts:
        expert[3].register_forward_pre_hook(lambda *_: flags.append(tf32()))
    assert step_rows.check(setting, step_rows.hub(setting)) is None
    assert set(flags) == {(False, False)}


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


def test_ratios_are_of_medians_and_of_the_fastest():
    seconds = {
        "single 0 (A)": 1.0, "single 1 (B)": 3.0, "captured single 0": 0.5,
        "captured single 1": 1.5, "generator": 0.4, "glue": 0.2, "experts alone": 3.0,
        "reference": 12.0, "dense": 16.0, "sequential": 8.0, "graphs": 2.0,
        "sequential bf16": 4.0,
    }  # fmt: skip
    times = {name: SimpleNamespace(p50=s, best=s / 2) for name, s in seconds.items()}
    found = step.ratios(times, 2, "sequential")
    assert {name: found[name] for name in found if not name.endswith("_best")} == {
        "single_mean_seconds": 2.0, "k_single_seconds": 4.0, "ratio_to_k_single": 2.0,
        "ratio_to_dense": 2.0, "ratio_to_reference": 1.5, "glue_share": 0.025,
        "generator_share": 0.05, "experts_to_k_single": 0.75, "sequential_to_k_single": 2.0,
        "dense_to_sequential": 2.0, "reference_to_sequential": 1.5, "graphs_to_k_single": 0.5,
        "dense_to_graphs": 8.0, "reference_to_graphs": 6.0, "graphs_to_k_captured_single": 1.0,
        "bf16_to_sequential": 0.5,
    }  # fmt: skip
    assert found["k_single_seconds_best"] == 2.0
    chosen = step.ratios(times, 2, "graphs")
    assert (chosen["ratio_to_k_single"], chosen["ratio_to_dense"]) == (0.5, 8.0)
    assert "ratio_to_k_single" not in step.ratios(times, 2, "threads")  # it was wrong: no time
    assert found["graphs_to_k_captured_single_best"] == 1.0


def test_graphs_count_what_they_hold(monkeypatch):
    model = hp.HubPathway(
        [nn.Linear(2, 2)], step_models.Scores(torch.zeros(1, 1), torch.zeros(1, 1)), k=1
    )
    model(torch.zeros(1, 2))
    model._executors.made["sequential"].counters.memory = 100
    monkeypatch.setattr(step, "peak_memory", lambda function, device: 10)
    assert step.count_replays(lambda: None, model, "cpu") == {"launches": None, "peak_memory": 110}


def event(name, kind, start=0.0, end=0.0):
    return SimpleNamespace(
        name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end)
    )


@pytest.fixture
def events(monkeypatch):
    """What the profiler will have seen."""
    found = []

    @contextlib.contextmanager
    def profile(activities):
        yield SimpleNamespace(events=lambda: found)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return found


CUDA, CPU = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU


def test_a_launch_is_what_the_host_asks_for(events):
    events += [event(name, CPU) for name in (
        "cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaStreamSynchronize",
    )]  # fmt: skip
    events += [event(n, CUDA) for n in ("gemm", "relu", "norm", "relu", "Memset (Device)")]
    assert step_counts.launches(lambda: None, "cuda") == 3
    del events[:3]
    assert step_counts.launches(lambda: None, "cuda") == 4


def test_device_time_counts_what_overlaps_once(events):
    events += [
        event("conv", CUDA, 10, 40), event("relu", CUDA, 30, 50), event("conv", CUDA, 35, 45),
        event("norm", CUDA, 60, 70), event("cudaGraphLaunch", CPU, 0, 5),
    ]  # fmt: skip
    found = step_counts.device_time(lambda: None, "cuda", calls=2)
    assert (found.busy, found.added) == (pytest.approx(25e-6), pytest.approx(35e-6))
    assert found.launches == 0.5
    assert found.dearest[0] == ("conv", pytest.approx(20e-6), 1.0)
    assert [name for name, *_ in found.dearest] == ["conv", "relu", "norm"]
    assert step_counts.device_time(lambda: None, "cpu") is None


def test_a_profiler_that_sees_no_device_says_nothing(events):
    events += [event("cudaLaunchKernel", CPU)]
    assert step_counts.device_time(lambda: None, "cuda") is None
    assert step_counts.launches(lambda: None, "cuda") is None


def test_the_glues_step_does_nothing_that_a_step_with_experts_does_not():
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    step = step_rows.glue_step(step_rows.make(PRESET, 16, "cpu", recorded=1))
    step()
    with Names():
        step()
    assert "addmm" in names  # the aggregator
    assert not {"add_", "slice_backward"} & set(names)  # no sums over steps, no rows filled up


def test_what_was_measured_is_on_disk_before_predictions(run, monkeypatch, tmp_path):
    def ends(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "prediction_rows", ends)
    with pytest.raises(KeyboardInterrupt):
        run("--n", "6")
    found = json.loads((tmp_path / "step.json").read_text())
    assert found["ratio_to_k_single"] > 0
    assert {(row["mode"], row["N"]) for row in found["sizes"]["16"]["rows"]} == {("train", 6)}


def test_other_layouts_and_precisions_are_what_they_are_called():
    setting = step_rows.make(PRESET, 16, "cpu")
    variants = step_rows.variants(setting)
    assert list(variants) == ["sequential contiguous", "sequential bf16"]
    plain, bf16 = variants.values()
    weights = [step_rows.hub(s).experts[0][0].weight for s in (setting, plain, bf16)]
    assert [w.is_contiguous() for w in weights] == [False, True, False]
    assert [s.x.is_contiguous() for s in (setting, plain, bf16)] == [False, True, False]
    assert [s.amp for s in (setting, plain, bf16)] == [False, False, True]
    assert step_rows.predict(bf16, step_rows.hub(bf16).experts[0], 3)().dtype == torch.bfloat16
    assert all(torch.equal(w, weights[0]) for w in weights)


def test_growth_has_the_sizes_asked_for_and_groups_of_one_size_at_each_m():
    axes = step_growth.AXES
    assert [m for _, m, _ in axes["M"]] == [2, 4, 8, 16, 32, 64]
    assert {(n, k) for n, _, k in axes["M"]} == {(64, 2)}
    assert [k for *_, k in axes["K"]] == list(range(1, 9))
    assert (axes["N"][0][0], axes["N"][-1][0]) == (8, 1024)
    for n, m, k in axes["M"]:
        scores = step_models.balanced_scores(n, m, k)
        assert hp.functional.noisy_topk(*scores(None), k).counts() == [n * k // m] * m


def test_growth_is_measured_and_drawn(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_growth, "AXES", {"M": [(8, 4, 2), (8, 64, 2)], "N": [(4, 2, 1)]})
    monkeypatch.setattr(step_growth, "timm_experts", linear_experts)
    status, found = run("--growth", "--plots", str(tmp_path))
    assert status == 0
    small, large = found["growth"]["M"]
    assert (small["M"], large["M"]) == (4, 64)
    grown = {name: large[name]["p50"] / small[name]["p50"] for name in ("step", "experts alone")}
    assert found["growth_4_to_64"] == pytest.approx(grown)
    beyond = grown["step"] / grown["experts alone"]
    assert found["growth_beyond_smaller_groups"] == pytest.approx(beyond)
    assert f"growth_beyond_smaller_groups {beyond:.3f}" in capsys.readouterr().out
    drawn = plot.main([str(tmp_path / "step.json"), "--out", str(tmp_path / "plots")])
    assert [path.name for path in drawn] == ["step-M.png", "step-N.png"]
    for path in (*drawn, tmp_path / "step-growth-cpu-M.png"):
        assert path.stat().st_size > 5000


@pytest.mark.parametrize(("device", "calls"), [("cpu", None), ("cuda", 2)])
def test_on_a_gpu_growth_is_of_steps_in_a_row(monkeypatch, device, calls):
    monkeypatch.setattr(step_growth, "step_functions", lambda *arguments: arguments[3:])
    monkeypatch.setattr(step_growth.timing, "interleaved", lambda *a, **options: (a, options))
    found = step_growth.times_of(64, 4, 2, device, 1.5, 3, "graphs")
    functions = {"step": device, "experts alone": "graphs"}  # what the stand-in gives
    assert found == ((functions, device, 1.5, 3), {"calls": calls})


def test_a_file_without_growth_is_not_drawn(tmp_path, capsys):
    (tmp_path / "step.json").write_text("{}")
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "step.json")])
    assert "has no growth to draw" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tiny", "--px", "77"], "--px: tiny has the sizes 96, 32"),
        (["--preset", "huge"], "invalid choice"),
        (["--preset", "tiny", "--n", "2"], "--n: a third of a batch is checked"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        step.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("executor", ["sequential", "threads"])
def test_the_step_of_atari_is_the_hub_of_two_policies(executor):
    setting = step_rows.make(step_models.PRESETS["atari"], 84, "cpu", n=6)
    assert [type(expert).__name__ for expert in setting.experts] == ["RainbowNetwork"] * 2
    assert (setting.x.dtype, setting.x.shape) == (torch.float32, (6, 225, 100))
    assert sum(p.numel() for p in setting.experts[0].parameters()) == 1_143_410
    model = step_rows.hub(setting, executor)
    assert sum(p.numel() for p in model.aggregator.parameters()) == 666  # 2 * 18 * 18 + 18
    assert step_rows.check(setting, model) is None
    out = setting.forward(model.train(), None)
    assert out.prediction.shape == (6, 18, 51)
    assert out.routing.counts() == [6, 6]  # K = M = 2


def test_the_step_of_atari_gets_what_a_policy_gives_its_hub():
    setting, given = step_rows.make(step_models.PRESETS["atari"], 84, "cpu", n=6), []
    policy = HubPolicy(setting.experts, make_atoms(51, -10, 10), k=2).eval()
    policy.hub.generator.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    policy(torch.randint(256, (6, 4, 225, 25)).to(torch.uint8))
    assert (setting.x.dtype, setting.x.shape) == (given[0].dtype, given[0].shape)
    for x in (setting.x, given[0]):  # bytes, as numbers
        assert torch.equal(x, x.round())
        assert (x.min(), x.max()) == (0, 255)


@pytest.mark.parametrize("n", [1, 6, 8])
def test_the_hub_of_atari_predicts(n):
    setting = step_rows.make(step_models.PRESETS["atari"], 84, "cpu", n=6)
    plain = step_rows.predict(setting, step_rows.reference_hub(setting), n)()
    assert plain.shape == (n, 18, 51)
    found = step_rows.predict(setting, step_rows.hub(setting), n)()
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)  # float32, other sums
    assert torch.equal(plain[6:], plain[: len(plain[6:])])  # the batch once more


def test_a_wrong_step_of_atari_is_found():
    setting = step_rows.make(step_models.PRESETS["atari"], 84, "cpu", n=6)
    model = step_rows.hub(setting)
    with torch.no_grad():
        model.experts[1].value_out.noise_in.mul_(1.5)  # another draw than the other's
    assert "relative error" in step_rows.check(setting, model)
