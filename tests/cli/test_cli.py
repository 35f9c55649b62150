"""``hubpath`` as a user types it, on a real folder of PNG files written from the digits."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from support.checkpoint_files import all_weights
from support.command import hubpath, refused, shown
from support.waiting import LIMIT, has_text, wait_until

from hubpath_fast.data import DigitsTask, write_image_folder
from hubpath_fast.hub.source import PlainTask
from hubpath_fast.runs.build import build_model
from hubpath_fast.runs.config import FitConfig
from hubpath_fast.training import Trainer

HUB = "test_resnet,test_efficientnet,test_resnet"
FIT = [
    "fit", "--hub", HUB, "--no-pretrained", "--image-size", "32", "--batch-size", "16",
    "--workers", "0", "--no-flip",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """80 training, 40 validation and 40 test digits as PNG files in folders of classes."""
    task = DigitsTask(0, num_validation=60)
    return write_image_folder(task, tmp_path_factory.mktemp("digits"), limit=60)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "run"
    return out, hubpath(*FIT, "--data", folder, "--steps", 6, "--out", out).output


def test_fit_says_what_it_does_and_leaves_a_run(run):
    out, output = run
    assert "10 classes, 60 train, 60 validation, 60 test images at 32 px" in output
    assert "K = 2 of 3" in output
    assert (
        "speed executor sequential (the experts are on cpu, and torch has one thread), "
        "amp none, channels_last on, augment host, 0 workers\n"
    ) in output
    result = json.loads((out / "result.json").read_text())
    assert f"test: {100 * result['test_accuracy']:.1f} % of 60 images" in output
    assert (out / "best" / "router.safetensors").is_file()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6
    assert len(lines[-1]["load"]) == 3


def test_convolutions_are_channels_last_unless_it_is_set_off(run):
    config = FitConfig.from_dict(json.loads((run[0] / "fit.json").read_text())["config"])
    for layout, on in ((torch.channels_last, True), (torch.contiguous_format, False)):
        model = build_model(config.replace(channels_last=on), PlainTask(10), 32, False)
        weights = [p for p in model.experts.parameters() if p.dim() == 4]
        assert all(w.is_contiguous(memory_format=layout) for w in weights)


def test_evaluate_repeats_the_result_of_fit(run, folder):
    out, _ = run
    expected = json.loads((out / "result.json").read_text())
    output = hubpath("evaluate", out).output
    assert f"test: accuracy {expected['test_accuracy']:.4f}" in output
    assert hubpath("evaluate", out, "--data", folder).output == output


def test_predict_names_class_probability_and_experts(run, folder):
    out, _ = run
    images = sorted((folder / "test").rglob("*.png"))[:3]
    lines = hubpath("predict", out, *images).output.splitlines()
    assert len(lines) == 3
    for path, line in zip(images, lines, strict=True):
        assert line.startswith(f"{path}: ")
        experts = dict(part.rsplit(" ", 1) for part in line.split("experts: ")[1].split(", "))
        assert len(experts) == 2
        assert set(experts) <= {"test_resnet #1", "test_efficientnet", "test_resnet #2"}
        weights = [float(w) for w in experts.values()]
        assert weights == sorted(weights, reverse=True)
        assert 0 < sum(weights) <= 1.01


def test_print_config_is_read_back_and_options_go_first(run, folder, tmp_path):
    settings = shown(*FIT[1:], "--data", folder, "--steps", 6, "--lr", "0.001")
    assert settings["hub"] == HUB.split(",")
    assert settings["trainer"]["lr_expert"] == 0.001
    assert settings["trainer"]["lr_head"] == 0.003
    assert settings["trainer"]["lr_router"] == 0.01
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert shown("--config", tmp_path / "settings.json", "--k", 3) == {**settings, "k": 3}


def test_a_stopped_run_goes_on_to_the_same_weights(folder, tmp_path):
    """SIGTERM during a real process; --resume alone knows the rest of the settings."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--data", str(folder), "--steps", "40"]
    hubpath(*FIT, *options, "--out", whole)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", "from hubpath_fast.cli import main; main()", *FIT, *options,
         "--out", str(cut)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log = cut / "log.jsonl"
    wait_until(lambda: process.poll() is not None or has_text(log), "the first line of the log")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LIMIT)
    if process.returncode == 0:
        pytest.skip("the run ended before the signal reached it")
    assert process.returncode == 130, output
    assert "--resume" in output
    assert not (cut / "result.json").exists()
    hubpath("fit", "--resume", "--out", cut)
    for name in ("best", "last"):
        assert all_weights(whole / name) == all_weights(cut / name)


class Stops(Trainer):
    """Stops by itself after three steps."""

    def _step(self, *batch):
        super()._step(*batch)
        if self.state.step == 3:
            self.stop()


def test_a_stopped_run_of_several_seeds_says_how_it_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hubpath_fast.recipes.fit.Trainer", Stops)
    seeds = [*FIT, "--data", folder, "--steps", 6, "--seeds", "0,1", "--out", tmp_path / "seeds"]
    assert f"--resume (--out {tmp_path / 'seeds'})" in hubpath(*seeds, status=130).output


def test_augmenting_on_the_device_resumes_to_the_same_weights(folder, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = [*FIT, "--data", folder, "--steps", 6, "--augment", "device"]
    hubpath(*options, "--out", whole)
    assert json.loads((whole / "fit.json").read_text())["config"]["augment"] == "device"
    with monkeypatch.context() as patch:
        patch.setattr("hubpath_fast.recipes.fit.Trainer", Stops)
        hubpath(*options, "--out", cut, status=130)
    other = refused("fit", "--resume", "--augment", "host", "--out", cut)
    assert "fit.augment: 'device' there, 'host' now" in other
    hubpath("fit", "--resume", "--out", cut)
    assert all_weights(whole / "last") == all_weights(cut / "last")


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "data")


REFUSED = [
    (["--k", 4], "k: expected an integer in 1..3"),
    (["--hub", "resnet5,test_resnet"], "resnet50"),
    (["--set", "executor=graphs"], "executor: 'graphs' needs CUDA"),
    (["--device", "gpu"], "device: expected cpu, cuda, cuda:0, ..., got 'gpu'"),
    (["--device", "xla"], "device: torch sees no XLA device, got 'xla'"),
    (["--device", "cuda:99"], "got 'cuda:99'; use one that is there, or cpu"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_wrong_input_is_one_message_and_leaves_nothing(options, message, folder, tmp_path):
    said = refused(*FIT, "--data", folder, *options, "--out", tmp_path / "out")
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_wrong_is_named(folder, tmp_path):
    broken = next((copy(folder, tmp_path) / "train").rglob("*.png"))
    broken.write_bytes(b"no image")
    assert str(broken) in refused(*FIT, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "c.json").write_text('{"data": "x", "hub": ["test_resnet"], "epoch": 3}')
    assert "unknown setting 'epoch'" in refused("fit", "--config", tmp_path / "c.json")
    assert "holds no run of `hubpath fit`" in refused("evaluate", tmp_path)
    assert ":smile: holds no run" in refused("evaluate", ":smile:")  # and no picture of one


def test_another_run_in_the_folder_is_refused_and_kept(run, folder):
    out, _ = run
    before = all_weights(out / "last")
    same = [*FIT, "--data", folder, "--steps", 6, "--out", out]
    assert "holds another run" in refused(*same)
    assert "run.fit.k: 2 there, 1 now" in refused(*same, "--resume", "--k", 1)
    assert all_weights(out / "last") == before


def test_a_truncated_checkpoint_is_named(run, folder, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    weights = next((tmp_path / "run" / "best" / "experts").glob("01-*"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(weights) in refused("evaluate", tmp_path / "run")


def test_other_data_and_no_images_are_refused(run, folder, tmp_path):
    out, _ = run
    other = copy(folder, tmp_path)
    for split in ("train", "val", "test"):
        (other / split / "3").rename(other / split / "three")
    assert "three" in refused("evaluate", out, "--data", other)
    (tmp_path / "note.png").write_text("no image")
    assert str(tmp_path / "note.png") in refused("predict", out, tmp_path / "note.png")


def test_a_run_is_not_written_among_its_images(folder, tmp_path):
    data = copy(folder, tmp_path)
    for out in (data, data / "train" / "run"):
        assert "lies in the data's folder" in refused(*FIT, "--data", data, "--out", out)
    compared = ["compare", "--hub", HUB, "--data", data, "--out", data / "test" / "compared"]
    assert "lies in the data's folder" in refused(*compared)


@pytest.mark.parametrize("command", ["evaluate", "report", "predict"])
def test_a_device_that_is_not_there_is_refused(run, command):
    images = ["a.png"] if command == "predict" else []
    assert "got 'mps'" in refused(command, run[0], *images, "--device", "mps")


def test_grey_and_odd_sized_images_are_taken(run, tmp_path):
    Image.new("L", (17, 40), 200).save(tmp_path / "grey.png")
    Image.new("RGBA", (64, 20), (1, 2, 3, 4)).save(tmp_path / "alpha.png")
    hubpath("predict", run[0], tmp_path / "grey.png", tmp_path / "alpha.png")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_jpeg_that_was_cut_short_is_one_clear_message(folder, tmp_path, workers):
    """Its header is whole, so that it is found when a worker decodes it."""
    data = copy(folder, tmp_path)
    cut = next((data / "train").rglob("*.png")).with_suffix(".jpg")
    Image.effect_noise((64, 64), 90).save(cut)
    cut.write_bytes(cut.read_bytes()[:-200])
    options = ["--data", data, "--steps", 9, "--workers", workers, "--out", tmp_path / "run"]
    said = refused(*FIT, *options)
    assert said.count("\n") == 1
    assert said.startswith(f"error: cannot read the image {cut} (")
    hubpath("data", "check", "folder", "--root", data)
    checked = hubpath("data", "check", "folder", "--root", data, "--decode", status=1)
    assert f"train: 1 images are broken: {cut}" in checked.output


def test_data_list_and_check(folder, tmp_path):
    listed = hubpath("data", "list").output
    for name in ("cifar-100", "coco-70", "aircraft", "cars", "indoors", "dmlab", "eurosat"):
        assert name in listed
    assert "65,550" in listed
    assert "complete" in hubpath("data", "check", "folder", "--root", folder).output
    expected, found = refused("data", "check", "cars", "--root", folder).split("found:")
    assert "expected:" in expected
    assert "├─ train/" in found
    assert "did you mean cars" in refused("data", "check", "car")


def test_data_download_says_where_from_and_where_to(tmp_path, monkeypatch):
    """Without a network, and for a set that nobody serves any more."""
    from torchvision.datasets import EuroSAT

    def offline(self):
        (tmp_path / "root").mkdir(exist_ok=True)
        raise OSError("no network")

    monkeypatch.setattr(EuroSAT, "download", offline)
    for name, reason in (("eurosat", "(no network)"), ("cars", "cannot be downloaded")):
        said = refused("data", "download", name, "--root", tmp_path / "root")
        assert reason in said
        assert "https://" in said
        assert f"The root is {tmp_path / 'root'}, and is to look like this:" in said
        assert not list((tmp_path / "root").iterdir())


def test_data_download_puts_a_whole_set_in_place(tmp_path, monkeypatch):
    from torchvision.datasets import EuroSAT

    def served(self):
        folder = f"{self._data_folder}/Forest"
        os.makedirs(folder)
        Image.new("RGB", (4, 4)).save(f"{folder}/Forest_1.jpg")

    monkeypatch.setattr(EuroSAT, "download", served)
    hubpath("data", "download", "eurosat", "--root", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["eurosat"]
    assert (tmp_path / "eurosat" / "2750" / "Forest" / "Forest_1.jpg").is_file()
    assert "exists already" in refused("data", "download", "eurosat", "--root", tmp_path)
