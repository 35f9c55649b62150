"""What ``hubpath shelf extract`` computes, keeps, computes again, and leaves out."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from support.snapshots import (
    SIDE,
    contents,
    spec_of,
    write_photos,
    write_weights,
)
from torch import nn
from torch.nn import functional as F

from hubpath_fast.data import eval_transform, splits
from hubpath_fast.features import Shelf, compute
from hubpath_fast.features.bodies import ends_linearly, features_of, open_body, random_hash
from hubpath_fast.features.compute import Computation
from hubpath_fast.features.wanted import read_names
from hubpath_fast.hub import create_model
from hubpath_fast.hub.errors import HubError
from hubpath_fast.hub.expert import Expert
from hubpath_fast.locks import locked
from hubpath_fast.model.features import OnFeatures
from hubpath_fast.recipes.shelf_extract import ExtractSettings, extract_shelf


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for seed in range(3):
        write_weights(folder / f"snap{seed}.safetensors", seed)
    return folder


@pytest.fixture
def extracted(tmp_path, photos, weights):
    """A call with other defaults, into one folder."""

    def call(hub=None, out=tmp_path / "shelf", data=photos, **settings):
        hub = hub or spec_of(weights / "snap*.safetensors")
        asked = ExtractSettings(data=data and str(data), **settings)
        return extract_shelf(out, hub, asked)

    call.out = tmp_path / "shelf"
    return call


def images_of(photos: Path, shelf: Shelf) -> list[Image.Image]:
    rows = shelf.images().rows
    names = [row.path for split in ("train", "validation", "test") for row in rows[split]]
    return [Image.open(photos / name).convert("RGB") for name in names]


def test_images_are_decoded_once_for_each_size_and_not_for_each_model(
    extracted, weights, monkeypatch
):
    loads, load = [], splits.load_image
    monkeypatch.setattr(splits, "load_image", lambda path: loads.append(path) or load(path))
    hub = [spec_of(weights / f"snap{i}.safetensors", size) for i in range(3) for size in (32, 40)]
    done = extracted(hub)
    assert len(done.computed) == 6
    assert done.images == 10
    assert done.decodes == len(loads) == 2 * 10
    assert done.looked == 6 * 10
    assert sorted(path.name for path in extracted.out.iterdir()) == [
        "contents.safetensors", "features", "images.csv.gz", "router.safetensors", "shelf.json",
        "targets.safetensors",
    ]  # fmt: skip


def test_features_are_what_the_head_gets_in_fit_with_frozen_bodies(extracted, photos, weights):
    extracted(dtype="fp32")
    shelf = Shelf.open(extracted.out)
    names = [f"{spec_of(weights / f'snap{i}.safetensors', None)}&freeze=body" for i in range(3)]
    model = create_model(names, 2, k=2, input_size=SIDE)
    transform = eval_transform(SIDE)
    images = torch.stack([transform(image) for image in images_of(photos, shelf)])
    on = OnFeatures(model)
    on.keep([(images, torch.zeros(len(images)))], len(images), torch.device("cpu"))
    assert shelf.labels == ("snap0", "snap1", "snap2")
    for i, head in enumerate(on.heads):
        # Two ways to normalise, of one rounding each, and some forty layers behind it.
        torch.testing.assert_close(shelf.features(i)[0], head.kept, rtol=1e-6, atol=1e-6)
    assert torch.equal(shelf.pixels()[0], images)  # a router looks at them as they are, if so small


def test_half_precision_rounds_the_same_features_once(extracted, tmp_path):
    extracted(dtype="fp32", out=tmp_path / "whole")
    extracted()
    whole, half = Shelf.open(tmp_path / "whole"), Shelf.open(extracted.out)
    for i in range(3):
        assert half.features(i).dtype == torch.float16
        assert torch.equal(half.features(i), whole.features(i).half())


def test_the_source_head_gives_what_the_network_of_the_file_says(extracted, photos, weights):
    extracted(dtype="fp32")
    shelf = Shelf.open(extracted.out)
    import timm

    network = timm.create_model("test_resnet", num_classes=5).eval()
    network.load_state_dict(load_file(weights / "snap1.safetensors"))
    image = eval_transform(SIDE)(images_of(photos, shelf)[3])[None] / 255
    mean, std = (torch.tensor(network.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = network((image - mean) / std)[0]
    weight, bias = shelf.source_head(1)
    found = weight @ shelf.features(1)[0, 3] + bias
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_views_are_the_crop_of_evaluation_and_then_random_ones(extracted, tmp_path):
    kept = {}
    for views in (1, 2, 3):
        extracted(out=tmp_path / str(views), dtype="fp32", views=views)
        shelf = Shelf.open(tmp_path / str(views))
        kept[views] = shelf.features(0), shelf.pixels()
    for one, more in zip(kept[2], kept[3], strict=True):
        assert torch.equal(one, more[:2])
        assert not torch.equal(more[0], more[1])
        assert not torch.equal(more[1], more[2])
    for one, more in zip(kept[1], kept[2], strict=True):
        assert torch.equal(one, more[:1])


def test_a_second_call_computes_only_what_is_new(extracted, weights):
    first = extracted(spec_of(weights / "snap0.safetensors"))
    before = contents(extracted.out)
    times = {path: path.stat().st_mtime_ns for path in extracted.out.glob("features/*")}
    again = extracted(spec_of(weights / "snap0.safetensors"))
    assert (first.computed, first.there) == (["snap0"], ())
    assert (again.computed, again.there, again.decodes) == ([], ("snap0",), 0)
    assert contents(extracted.out) == before
    more = extracted(data=None)  # the shelf knows its own
    assert (more.computed, more.there) == (["snap1", "snap2"], ("snap0",))
    for path, then in times.items():
        assert path.stat().st_mtime_ns == then
    assert Shelf.open(extracted.out).labels == ("snap0", "snap1", "snap2")


def test_what_a_spec_says_of_fine_tuning_makes_no_other_model(extracted, weights):
    name = spec_of(weights / "snap0.safetensors")
    extracted(name)
    done = extracted(f"{name}&lr=0.1&freeze=body&bn=running")
    assert (done.computed, done.there) == ([], ("snap0",))
    assert Shelf.open(extracted.out).models[0].name == name


def test_changed_weights_are_computed_again_in_the_place_of_the_old(extracted, tmp_path):
    files = [write_weights(tmp_path / f"bird{i}.safetensors", i) for i in range(2)]
    hub = [spec_of(path) for path in files]
    extracted(hub)
    old = Shelf.open(extracted.out)
    write_weights(files[0], seed=7)
    with pytest.raises(ValueError, match=r"its weights .* are not those that its features were"):
        open_body(old.models[0])
    done = extracted(hub[:1])  # by itself, it keeps its name and its place
    assert (done.computed, done.there) == (["bird0"], ())
    new = Shelf.open(extracted.out)
    assert new.labels == old.labels
    assert [m.position for m in new.models] == [m.position for m in old.models]
    assert new.models[0].key != old.models[0].key
    assert new.models[1] == old.models[1]
    assert len(list(extracted.out.glob("features/*"))) == 2
    fresh = extracted(hub, out=tmp_path / "fresh")
    assert len(fresh.computed) == 2
    assert contents(tmp_path / "fresh") == contents(extracted.out)


def test_a_body_is_opened_again_with_the_weights_of_its_features(extracted, photos):
    extracted(dtype="fp32")
    shelf = Shelf.open(extracted.out)
    images = torch.stack([eval_transform(SIDE)(image) for image in images_of(photos, shelf)])
    for i, model in enumerate(shelf.models):
        assert torch.equal(features_of(open_body(model), images), shelf.features(i)[0])


class Odd(nn.Module):
    """Ends with a head that is not a linear layer of what it calls its features."""

    def __init__(self, rectified: bool, cosine: bool):
        super().__init__()
        self.rectified, self.cosine = rectified, cosine
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        if cosine:
            self.head.forward = lambda x: F.linear(F.normalize(x), self.head.weight)

    def forward_features(self, x):
        return self.stem(x)

    def forward_head(self, x, pre_logits: bool = False):
        x = x.mean(dim=(2, 3))
        if pre_logits:
            return x
        return self.head(x.relu() if self.rectified else x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize(
    ("rectified", "cosine", "linear"),
    [(False, False, True), (True, False, False), (False, True, False)],
)
def test_a_head_is_kept_only_where_it_is_linear_on_the_features(rectified, cosine, linear):
    torch.manual_seed(0)
    body = Expert("odd", Odd(rectified, cosine).eval(), (0.5,) * 3, (0.1,) * 3, 8)
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    assert ends_linearly(body, images) is linear


def test_random_weights_are_a_function_of_seed_and_name(extracted, tmp_path):
    hub = "tiny?size=32,timm/test_vit?size=160"
    done = extracted(hub, pretrained=False, seed=3)
    shelf = Shelf.open(extracted.out)
    assert len(done.computed) == len(shelf.models) == 5  # tiny has an architecture twice
    for model in shelf.models:
        assert random_hash(open_body(model, seed=3)) == model.weights
        assert shelf.source_head(shelf.find(model.label)) is None
    with pytest.raises(ValueError, match="drawn by the seed 4"):
        open_body(shelf.models[0], seed=4)
    again = extracted(hub)  # the shelf knows that they are random
    assert len(again.there) == 5


def test_models_that_fail_are_left_out_and_tried_again(extracted, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    large = write_weights(tmp_path / "large.safetensors", 0, scale=1e3)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((weights / "snap0.safetensors").read_bytes()[:-1000])
    infinite = write_weights(tmp_path / "infinite.safetensors", 0, scale=1e30)
    hub = [
        spec_of(large), spec_of(broken), spec_of(weights / "snap0.safetensors"),
        spec_of(infinite), "timm/test_resnet.r160_in1k", spec_of(large, 7),
    ]  # fmt: skip
    done = extracted(hub, image_size=32)
    assert done.computed == ["snap0"]
    reasons = dict(done.failed)
    assert len(reasons) == 5
    assert "fp16 holds 65504 at most" in reasons[spec_of(large)]
    assert "broken" in reasons[spec_of(broken)]
    assert "not finite" in reasons[spec_of(infinite)]
    assert "cannot be downloaded" in reasons["timm/test_resnet.r160_in1k"]
    assert "at least 8 pixels a side, got 7" in reasons[spec_of(large, 7)]
    shelf = Shelf.open(extracted.out)
    assert dict(shelf.record.failed) == reasons
    assert shelf.labels == ("snap0",)

    write_weights(broken, 5)
    done = extracted(hub[:3])
    assert done.computed == ["broken"]
    shelf = Shelf.open(extracted.out)
    assert shelf.labels == ("broken", "snap0")  # in the order of the hub
    assert set(dict(shelf.record.failed)) == set(reasons) - {spec_of(broken)}


def test_a_batch_too_large_for_the_device_is_halved(extracted, weights, tmp_path, monkeypatch):
    extracted(out=tmp_path / "whole", dtype="fp32")
    sizes = []

    def small(expert, images):
        sizes.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return features_of(expert, images)

    monkeypatch.setattr(compute, "features_of", small)
    assert len(extracted(dtype="fp32").computed) == 3
    assert set(sizes) == {10, 5, 2}
    whole, halved = Shelf.open(tmp_path / "whole"), Shelf.open(extracted.out)
    for i in range(3):  # sums in another order, over some forty layers
        torch.testing.assert_close(halved.features(i), whole.features(i), rtol=1e-5, atol=1e-5)

    monkeypatch.setattr(compute, "features_of", out_of_memory)
    done = extracted(spec_of(weights / "snap0.safetensors", 40), dtype="fp32")
    assert "one image is too much for its memory" in done.failed[0][1]


def out_of_memory(expert, images):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_wrong_names_are_all_said_before_anything_starts(extracted, tmp_path):
    hub = f"resnet5000,timm/no*such,{spec_of(tmp_path / '*.pth')},{spec_of(tmp_path / 'a.pth')}"
    with pytest.raises(HubError) as caught:
        extracted(hub)
    assert len(caught.value.problems) == 4
    for part in ("'resnet5000'", "nothing matches 'timm/no*such'", "*.pth'", "a.pth"):
        assert part in str(caught.value)
    assert not extracted.out.exists()


def test_a_pattern_means_the_models_with_weights():
    pattern = "timm/test_resnet*?size=160&lr=0.1"
    assert [str(spec) for spec, _ in read_names(pattern, True)] == [
        "timm/test_resnet.r160_in1k?size=160"
    ]
    with_weights, all_names = (read_names("timm/test_vit?*", only) for only in (True, False))
    lacking = {str(spec) for spec, _ in all_names} - {str(spec) for spec, _ in with_weights}
    assert {name.partition(".")[0] for name in lacking} == {
        "timm/test_vit4",
        "timm/test_vit_relpos",
    }
    for name in ("timm/test_vit4", "timm/test_vit?"):
        with pytest.raises(HubError, match=r"timm/test_vit4.* has no pre-trained weights"):
            read_names(name, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": 2}, "views: .* has 1, got 2"),
        ({"dtype": "fp32"}, "dtype: .* has fp16, got fp32"),
        ({"image_size": 40}, "image_size: .* has None, got 40"),
        ({"pretrained": False}, "pretrained: .* has True, got False"),
        ({"seed": 1}, "seed: .* has 0, got 1"),
        ({"validation": 0.5}, "validation: .* has 0.15, got 0.5"),
        ({"dataset": "digits"}, "dataset: .* has folder, got digits"),
    ],
)
def test_another_kind_of_features_is_refused(shelf_of_one, extracted, settings, message):
    with pytest.raises(ValueError, match=message):
        extracted(**settings)


@pytest.fixture
def shelf_of_one(extracted, weights, tmp_path, photos):
    """On photos of its own."""
    own = shutil.copytree(photos, tmp_path / "own")
    extracted(spec_of(weights / "snap0.safetensors"), data=own)
    return own


def test_other_images_are_refused_by_name(shelf_of_one, extracted, photos):
    (shelf_of_one / "train" / "cat" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1 gone .*train/cat/1\.png"):
        extracted(data=None)
    shutil.copy(photos / "train" / "cat" / "1.png", shelf_of_one / "train" / "cat" / "1.png")
    shelf_of_one.rename(shelf_of_one.with_name("moved"))
    with pytest.raises(ValueError, match="if it was moved, give shelf extract --data DIR"):
        extracted(data=None)
    assert extracted(data=photos).computed == ["snap1", "snap2"]  # copies elsewhere are the same


def test_other_contents_of_the_same_size_are_refused_by_name(shelf_of_one, extracted, weights):
    path = shelf_of_one / "train" / "dog" / "2.png"
    path.write_bytes(path.read_bytes() + b"!" * 5)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"1 changed .*train/dog/2\.png: "):
        extracted(data=None)
    path.write_bytes(whole[:-5])
    assert extracted(data=None, hub=spec_of(weights / "snap1.safetensors", 40)).decodes == 10
    pixels = np.asarray(Image.open(path).convert("RGB")).copy()
    for level in range(256):  # until it is as many bytes
        pixels[0, 0] = level
        Image.fromarray(pixels).save(path)
        if path.stat().st_size == len(whole) - 5 and path.read_bytes() != whole[:-5]:
            break
    before = contents(extracted.out)
    with pytest.raises(ValueError, match=r"1 of the 10 images have other contents .*dog/2\.png"):
        extracted(data=None)
    left = contents(extracted.out)
    assert {name: left[name] for name in before} == before


def test_a_full_disk_is_found_before_anything_is_written(extracted, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 100, 100))
    with pytest.raises(ValueError, match=r"need .* KiB .*, but 0.1 KiB are free"):
        extracted()
    assert not extracted.out.exists()


def test_one_extraction_at_a_time_works_in_a_folder(extracted):
    refused = pytest.raises(ValueError, match=f"another extraction .*process {os.getpid()}")
    with locked(extracted.out, "extraction"), refused:
        extracted()


def test_landmarks_are_no_classes(extracted):
    with pytest.raises(ValueError, match="has landmarks and no classes"):
        extracted(dataset="wflw")


def test_stopped_by_a_signal_it_goes_on_with_the_model_it_was_at(extracted, tmp_path, monkeypatch):
    extracted(out=tmp_path / "whole")
    look = Computation.look

    def stopped(self, images):
        if self.planned.label == "snap1":
            os.kill(os.getpid(), signal.SIGTERM)
        return look(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Computation, "look", stopped)
        with pytest.raises(InterruptedError, match="by SIGTERM"):
            extracted(views=2, out=tmp_path / "stopped")
    assert Shelf.open(tmp_path / "stopped").labels == ("snap0",)
    extracted(views=2)
    assert extracted(data=None, out=tmp_path / "stopped").computed == ["snap1", "snap2"]
    assert contents(tmp_path / "stopped") == contents(extracted.out)


KILLED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from hubpath_fast.recipes.shelf_extract import ExtractSettings, extract_shelf
from rich.console import Console
data, out, hub = sys.argv[1:]
extract_shelf(out, hub, ExtractSettings(data=data, views=4), console=Console(file=sys.stdout))
"""


def test_killed_at_a_random_point_the_next_one_makes_the_same_files(
    extracted, tmp_path, photos, weights
):
    hub = ",".join(
        spec_of(weights / f"snap{i}.safetensors", size) for size in (32, 48) for i in range(3)
    )
    extracted(hub, views=4, out=tmp_path / "whole")
    words = [sys.executable, "-u", "-c", KILLED, photos, extracted.out, hub]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True)
    lines = random.SystemRandom().randrange(2, 20)  # of what it tells, a line each twentieth
    for _ in range(lines):
        process.stdout.readline()
    time.sleep(random.SystemRandom().random() * 0.02)
    process.kill()
    process.wait()
    process.stdout.close()
    there = len(list(extracted.out.glob("features/*.safetensors")))
    done = extracted(hub, views=4)
    assert len(done.there) == there
    assert len(done.computed) == 6 - there
    assert contents(extracted.out) == contents(tmp_path / "whole"), f"killed after {lines} lines"
