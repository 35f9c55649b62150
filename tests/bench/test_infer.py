"""bench.infer: its arithmetic, what it checks and refuses, and the records that it writes."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import hubpath_fast as hp
from bench import infer, infer_child, infer_goals, infer_latency, infer_rows, infer_setup
from bench.infer_latency import Latency, Slowest
from bench.infer_rows import Row
from hubpath_fast.data import load_image
from hubpath_fast.serving.forms import blank, make_form
from hubpath_fast.serving.images import draw


def test_quantiles_are_those_of_the_images():
    found = Latency.of([float(second) for second in range(100, -1, -1)])
    assert found == Latency(50.0, 90.0, 99.0, 0.0, 101)
    assert Latency.of([2.0]) == Latency(2.0, 2.0, 2.0, 2.0, 1)


def test_the_slowest_pair_has_the_largest_median_of_those_asked_often():
    asked = [(0, 1)] * 5 + [(1, 2)] * 3 + [(0, 2)]
    seconds = [1, 1, 1, 1, 50, 2, 3, 4, 9]  # one slow answer of (0, 1), one image of (0, 2)
    assert infer_latency.slowest(seconds, asked) == Slowest((1, 2), 3, 3)
    assert infer_latency.slowest([1, 5], [(0,), (0, 1, 2)]) == Slowest((0, 1, 2), 5, 1)


def test_answers_are_compared_with_their_own_experts_image_by_image():
    experts = [[1.0, 2.0, 4.0], [2.0, 2.0, 2.0], [9.0, 9.0, 4.0]]
    asked = [(0, 1), (0, 1), (2,)]
    # 8 / (1 + 2 + 1), 15 / (2 + 2 + 1), 20 / (4 + 1)
    found = infer_latency.to_alone([8.0, 15.0, 20.0], experts, [1.0, 1.0, 1.0], asked)
    assert found == 3.0
    assert infer_latency.mean_of(experts) == [4.0, pytest.approx(13 / 3), pytest.approx(10 / 3)]


def test_each_image_is_a_round_of_all_rows_and_times_stand_in_the_images_order(clock):
    calls = []

    def row(name, share):
        def answer(item):
            calls.append((name, item))
            clock.now += share * item

        return answer

    items = [3.0, 1.0, 2.0, 4.0]
    rows = {"a": row("a", 1), "b": row("b", 10), "c": row("c", 100)}
    found = infer_latency.ask_each(rows, items, clock=clock)
    assert found == {"a": items, "b": [10 * i for i in items], "c": [100 * i for i in items]}
    timed = calls[6:]  # two untimed answers of each row come first
    assert calls[:6] == [(name, item) for name in "abc" for item in items[:2]]
    rounds = [timed[start : start + 3] for start in range(0, 12, 3)]
    assert [{item for _, item in each} for each in rounds] == [{item} for item in items]
    assert len({tuple(name for name, _ in each) for each in rounds}) > 1  # in new orders


def test_an_ensemble_is_the_experts_nearest_to_the_mean():
    singles = [Row(str(i), "experts", "folder", False, (i,), 10 + i) for i in range(4)]
    row = infer_setup.ensemble_of(singles, [1.0, 9.0, 4.0, 5.0], 2)  # the mean is 4.75
    assert (row.name, row.experts, row.bytes) == ("ensemble of 2", (2, 3), 25)


def test_an_ensemble_says_the_mean_of_its_experts_probabilities():
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double() for _ in range(2)]
    mean, std = torch.rand(2, 3).double(), 0.5 + torch.rand(2, 3).double()
    images = torch.randint(0, 256, (5, 3, 2, 2), dtype=torch.uint8)
    parts = []
    for expert, m, s in zip(experts, mean, std, strict=True):
        x = (images.double() / 255 - m[:, None, None]) / s[:, None, None]
        parts.append(expert(x).softmax(dim=1))
    found = infer_rows.Ensemble(experts, mean, std)(images)
    torch.testing.assert_close(found, sum(parts) / 2, rtol=0, atol=1e-14)


def test_a_row_that_fails_or_says_something_else_is_not_timed(monkeypatch):
    answers = torch.tensor([[0.25, 0.75]]).expand(8, 2)
    by_expert = torch.stack([answers, answers.flip(1)], dim=1)
    images = torch.zeros(9, 3, 2, 2, dtype=torch.uint8)
    questions = infer_setup.Questions(images, ((0,),) * 9, answers, by_expert)
    says = {
        "right": answers + 5e-5, "wrong": answers + 2e-4, "lost": answers * float("nan"),
        "one": answers.flip(1), "both": torch.full((8, 2), 0.5),
    }  # fmt: skip

    def open_row(row, device):
        if row.name == "broken":
            raise ValueError("no such file\nand more")
        return lambda images: says[row.name]

    monkeypatch.setattr(infer_setup, "open_row", open_row)
    rows = [Row(name, "program", "") for name in ("right", "wrong", "lost", "broken")]
    rows += [Row("one", "experts", "", experts=(1,)), Row("both", "experts", "", experts=(0, 1))]
    found, notes = infer_setup.open_checked(rows, questions, "cpu")
    assert list(found) == ["right", "one", "both"]
    assert notes == {
        "wrong": "wrong: it differs from the model by 2.0e-04; not timed",
        "lost": "wrong: it differs from the model by nan; not timed",
        "broken": "does not run: ValueError: no such file",
    }


def test_goals_are_ratios_of_rows_that_ran():
    rows = [
        {"row": "model", "images_per_second_64": 300.0},
        {"row": "cond", "tensor": {"p50": 3.0}, "to_alone": 1.2},
        {"row": "parts", "tensor": {"p50": 2.0}, "to_alone": 1.05, "images_per_second_64": 240.0},
        {"row": "dense", "tensor": {"p50": 5.0}, "to_alone": 2.5},
    ]
    found = infer_goals.judge(rows)
    assert [(goal["found"], goal["met"]) for goal in found] == [
        (1.05, True), (2.5, True), (1.25, False),
    ]  # fmt: skip
    assert infer_goals.text(found).splitlines() == [
        "one image: parts, over its K experts alone and the generator: 1.05, wanted at most 1.10: "
        "met",
        "one image: dense, over parts: 2.50, wanted at least 2.00: met",
        "64 images: seconds of parts, over the model's: 1.25, wanted at most 1.10: missed",
    ]
    rows[2]["note"] = rows[3]["note"] = "does not run"
    found = infer_goals.judge(rows)
    assert [(goal["found"], goal["met"]) for goal in found] == [
        (1.2, False), (None, None), (None, None),
    ]  # fmt: skip
    assert infer_goals.text(found).endswith("wanted at most 1.10: not measured")


def test_a_routers_scores_are_spread_around_zero_for_each_expert():
    model, images = small_model(), draw(64, 3, 32, torch.Generator().manual_seed(4))
    infer_setup.spread(model, images)
    with torch.no_grad():
        clean, _ = model.generator(images / 255)
    # float32: a thousand roundings of numbers that are some tens before they are centred
    torch.testing.assert_close(clean.mean(dim=0), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(clean.std(dim=0), torch.ones(3), rtol=0, atol=1e-3)


def test_a_spread_router_asks_every_expert():
    model = small_model()
    questions = infer_setup.make_questions(model, 70)
    counts = [sum(index in asked for asked in questions.asked) for index in range(3)]
    assert sum(counts) == 2 * 70
    assert min(counts) > 70 / 6  # of 70 * 2 / 3 in the mean
    routing = model.route(questions.images[:1])
    assert questions.asked[0] == tuple(sorted(routing.experts[0].tolist()))


HUB = ("timm/test_resnet", "timm/test_efficientnet", "timm/test_byobnet")
PRESET = infer_setup.Preset(HUB, 32, 4)


def small_model():
    return infer_setup.make_model(PRESET)


def export(model, path, form, device):
    """Without the proof, which takes processes of its own."""
    if form == "cond":
        raise hp.serving.ExportError("expert 1 (test_byobnet) cannot be exported (why)")
    model.requires_grad_(False)
    module = make_form(model, form, 32, True, False)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(module, (blank(model, 3, 32),), dynamic_shapes=shapes)
    torch.export.save(program, path)


@pytest.fixture
def here(monkeypatch):
    """Exports are not proved, and rows are opened in this process only."""
    monkeypatch.setattr(hp, "export", export)
    monkeypatch.setattr(infer_setup, "PHOTOS", 2)
    monkeypatch.setitem(infer_setup.PRESETS, "tiny", PRESET)
    asked = []

    def ask(row, images, device, times):
        asked.append((row["name"], times))
        if row["name"] == "test_resnet":
            return {"load_seconds": 4.0, "peak_memory_1": None}
        return infer_child.measure(row, images, device)

    monkeypatch.setattr(infer_child, "ask", ask)
    return asked


def test_a_quick_run_has_every_row_once_or_says_why_not(here, tmp_path, monkeypatch, capsys):
    decoded = []

    def load(path):
        decoded.append(path.name)
        return load_image(path)

    monkeypatch.setattr("hubpath_fast.data.load_image", load)
    file = tmp_path / "infer.jsonl"
    status = infer.main(["--quick", "--forms", "dense,cond", "--out", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    goals = [row for row in rows if "goal" in row]
    known = {row["row"]: row for row in rows if "row" in row}
    assert list(known) == [
        "model", "frozen model", "dense", "cond", "slowest expert", "mean expert",
        "ensemble of 2", "generator",
    ]  # fmt: skip
    assert status == 1
    assert known["cond"]["note"] == (
        "not exported: ExportError: expert 1 (test_byobnet) cannot be exported (why)"
    )
    for name in known.keys() - {"cond", "generator"}:
        row = known[name]
        for what in ("tensor", "jpeg"):
            assert 0 < row[what]["best"] <= row[what]["p50"] <= row[what]["p90"] <= row[what]["p99"]
            assert row[what]["images"] == 16
        assert row["images_per_second_8"] > 0 < row["images_per_second_64"]
        assert row["bytes"] > 0 < row["load_seconds"]
        assert (row["M"], row["K"], row["px"], row["quick"]) == (3, 2, 32, True)
        assert row["torch"] == torch.__version__
    # times from files hold the files' decoding: model, frozen model, dense, ensemble and 3 experts
    # are asked of 16 of the two files, and of the first two before that
    assert Counter(decoded) == {"00.jpg": 7 * (8 + 1), "01.jpg": 7 * (8 + 1)}
    assert known["dense"]["bytes"] > 100_000
    assert known["model"]["bytes"] > 3 * known["mean expert"]["bytes"]  # and the router's
    assert set(known["model"]["slowest"]["experts"]) < {name.removeprefix("timm/") for name in HUB}
    assert "slowest" not in known["dense"]  # whatever the image asks
    assert known["dense"]["to_alone"] > 0
    assert len(known["ensemble of 2"]["experts"]) == 2
    assert known["mean expert"]["load_seconds"] > 4 / 3
    assert known["mean expert"]["peak_memory_1"] is None  # one of them is not known
    assert sorted(here) == sorted(
        (name, 1) for name in ("model", "frozen model", "dense", "ensemble of 2", *known_labels())
    )
    assert [goal["met"] for goal in goals].count(None) == 3
    text = capsys.readouterr().out
    assert "cond              not exported: ExportError" in text
    assert "seconds of parts, over the model's: wanted at most 1.10: not measured" in text


def known_labels():
    return [name.removeprefix("timm/") for name in HUB]


def test_a_package_is_measured_in_a_process_without_this_one(tmp_path):
    class Answer(nn.Module):
        def forward(self, images):
            return images.float().mean(dim=(2, 3)).softmax(dim=1)

    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(Answer(), (images,), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "answer.pt2")
    torch.save(images, tmp_path / "images.pt")
    row = infer_rows.to_dict(Row("answer", "program", str(tmp_path / "answer.pt2")))
    found = infer_child.ask(row, tmp_path / "images.pt", "cpu", 1)
    for name in ("import_seconds", "load_seconds", "first_seconds"):
        assert found[name] > 0
    if Path("/proc/self/status").exists():
        assert 1e7 < found["memory_imported"] <= found["peak_memory_1"] <= found["peak_memory_3"]
    gone = infer_rows.to_dict(Row("answer", "program", str(tmp_path / "none.pt2")))
    with pytest.raises(RuntimeError, match=r"none\.pt2"):
        infer_child.ask(gone, tmp_path / "images.pt", "cpu", 1)


def test_parts_are_run_by_the_file_in_their_folder(tmp_path):
    (tmp_path / "serve.py").write_text(
        "class Parts:\n"
        "    def __init__(self, folder, device):\n"
        "        self.said = folder, device\n"
        "    def __call__(self, images):\n"
        "        assert self.said[1] == 'cpu'\n"
        "        return images.float().mean(dim=(2, 3)) + len(self.said[0])\n"
    )
    answer = infer_rows.open_row(Row("parts", "parts", str(tmp_path)), "cpu")
    found = answer(torch.ones(2, 3, 4, 4, dtype=torch.uint8))
    assert torch.equal(found, torch.full((2, 3), 1.0 + len(str(tmp_path))))


def test_the_process_of_a_package_imports_torch_alone():
    for kind in ("program", "parts"):
        assert not set(infer_rows.KINDS[kind][1]) & {"hubpath_fast", "timm"}


def test_several_processes_count_by_their_median():
    assert infer_child.middle([3.0, 1.0, 2.0]) == 2.0
    assert infer_child.middle([1.0, 2.0]) == 1.0
    assert infer_child.middle([1.0, None, 2.0]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "--images: expected an integer of at least 1, got 0"),
        (["--forms", "sparse,jit"], "expected some of sparse, cond, dense, parts, got jit"),
        (["--preset", "tiny", "--model", "folder"], "not allowed with argument"),
    ],
)
def test_bad_arguments_of_infer_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        infer.main(arguments)
    assert message in capsys.readouterr().err
