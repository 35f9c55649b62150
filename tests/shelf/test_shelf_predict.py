"""``hubpath shelf predict``: a frozen hub's answers on new images, body by body."""

from __future__ import annotations

import csv
import dataclasses
import gc
import shutil
import weakref
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.body_shelves import images_of, make_body_shelf, make_hub
from support.command import hubpath, refused
from support.shelves import make_shelf

from hubpath_fast.recipes import predict as decoding
from hubpath_fast.recipes.shelf_predict import open_predictor, predict_each, sentence
from hubpath_fast.shelf import predict as bodies
from hubpath_fast.shelf.model import join
from hubpath_fast.shelf.run import open_hub
from hubpath_fast.shelf.save import save_hub

K = 2
# Of probabilities. Bodies get batches of other sizes than for the shelf; rounded to float16 a
# feature may then fall to the other side.
NEAR = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return make_body_shelf(tmp_path_factory.mktemp("bodies"))


@pytest.fixture(scope="module", params=["image", "features:e"])
def hub(request, shelf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "hub"
    return make_hub(shelf, folder, router=request.param)


def frozen_answers(hub):
    """(probabilities [n, C], weights [n, M]) of all images on the shelf, by their features."""
    opened = open_hub(hub)
    numbers = torch.arange(opened.shelf.record.num_images).double()
    with torch.no_grad():
        routing = opened.model.route(numbers)
        weights = torch.zeros(len(numbers), len(opened.models))
        weights.scatter_(1, routing.experts, routing.weights)
        return opened.model(numbers).softmax(dim=1), weights


def files_of(shelf):
    """All images of the shelf, in its order."""
    return [path for part in images_of(shelf.folder.parent / "data").values() for path in part]


@pytest.mark.parametrize("router", ["image", "features:e"])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_new_images_are_answered_as_the_same_images_on_the_shelf(tmp_path, dtype, router):
    shelf, near = make_body_shelf(tmp_path, dtype, limit=20), NEAR[dtype]
    hub = make_hub(shelf, tmp_path / "hub", router=router)
    opened, predictor = open_predictor(shelf.folder, hub)
    expected, weights = frozen_answers(hub)
    assert len({tuple(row) for row in (weights > 0).tolist()}) >= 3  # routes differ
    # Backwards, so that nothing is read by an image's number on the shelf.
    found = [*predict_each(opened, predictor, files_of(shelf)[::-1])][::-1]
    probabilities = torch.stack([answer.probabilities for answer in found])
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=near)
    sure = expected.topk(2).values.diff(dim=1)[:, 0].abs() > 2 * near
    assert torch.equal(probabilities.argmax(1)[sure], expected.argmax(1)[sure])
    for answer, row in zip(found, weights, strict=True):
        spoke = {opened.labels[i]: row[i].item() for i in row.nonzero()[:, 0].tolist()}
        assert answer.experts == pytest.approx(spoke, abs=near)
        assert list(answer.experts.values()) == sorted(answer.experts.values(), reverse=True)
        assert answer.label == opened.shelf.classes[int(answer.probabilities.argmax())]


def test_each_body_runs_once_on_its_own_images_and_is_alone_in_memory(shelf, hub, monkeypatch):
    opened, predictor = open_predictor(shelf.folder, hub)
    _, weights = frozen_answers(hub)
    ran, alive, order, decoded = Counter(), [], [], Counter()
    open_body, features_of, load_image = bodies.open_body, bodies.features_of, decoding.load_image

    def opening(model, *args):
        gc.collect()
        assert all(body() is None for body in alive)
        body = open_body(model, *args)
        body.label = model.label
        alive.append(weakref.ref(body.module))
        order.append(model.label)
        return body

    def running(body, images):
        ran[body.label] += len(images)
        return features_of(body, images)

    def loading(path):
        decoded[path] += 1
        return load_image(path)

    monkeypatch.setattr(bodies, "open_body", opening)
    monkeypatch.setattr(bodies, "features_of", running)
    monkeypatch.setattr(decoding, "load_image", loading)
    files = files_of(shelf)
    [*predict_each(opened, predictor, files)]
    asked = {label: int((weights[:, i] > 0).sum()) for i, label in enumerate(opened.labels)}
    expected = Counter({label: count for label, count in asked.items() if count})
    watched = opened.settings.router == "features:e"
    if watched:
        expected["e"] = len(files)
        assert order[0] == "e"
    assert ran == expected
    assert len(order) == len(set(order)) == len(expected)
    assert set(decoded.values()) == {1}
    assert len(decoded) == len(files)
    run = predictor.forwards
    assert (run.images, run.experts) == (len(files), K * len(files))
    assert (run.router, run.opened) == (len(files) if watched else 0, len(order))
    said = sentence(predictor)
    assert f"{K * len(files)} expert forwards of {len(files)} images, 2 an image" in said
    assert (f"and {len(files)} of e, which the router looks at" in said) == watched


def test_little_memory_answers_the_same_part_by_part(shelf, hub):
    opened, predictor = open_predictor(shelf.folder, hub)
    files = files_of(shelf)[:5]
    whole = [*predict_each(opened, predictor, files)]
    once = predictor.forwards.opened
    parts = [*predict_each(opened, predictor, files, workers=2, memory=1)]
    each = K + (predictor.watched is not None)
    assert predictor.forwards.opened - once == each * len(files)
    for one, other in zip(whole, parts, strict=True):
        assert (one.given, one.label) == (other.given, other.label)
        torch.testing.assert_close(one.probabilities, other.probabilities, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), 7e4], ids=["nan", "more than fp16 holds"])
@pytest.mark.parametrize("router", ["image", "features:e"])
def test_features_that_no_shelf_keeps_are_an_error_of_that_image(
    tmp_path, monkeypatch, value, router
):
    shelf = make_body_shelf(tmp_path, torch.float16, limit=12)
    opened, predictor = open_predictor(
        shelf.folder, make_hub(shelf, tmp_path / "hub", router=router)
    )
    files, features_of = files_of(shelf), bodies.features_of
    expected = [*predict_each(opened, predictor, files)]
    first = None  # the image that is the first of the first body's

    def broken(body, images):
        nonlocal first
        found = features_of(body, images).clone()
        first = images[:1] if first is None else first
        if images.shape[1:] == first.shape[1:]:
            found[(images == first).flatten(1).all(dim=1), 0] = value
        return found

    monkeypatch.setattr(bodies, "features_of", broken)
    found = [*predict_each(opened, predictor, files)]
    wrong = [i for i, answer in enumerate(found) if answer.error is not None]
    assert len(wrong) == 1
    why = "are not finite" if value != value else "are more than fp16 holds"
    assert f"{files[wrong[0]]}: the features of " in found[wrong[0]].error
    assert why in found[wrong[0]].error
    assert found[wrong[0]].label is None
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        if i not in wrong:
            assert torch.equal(one.probabilities, other.probabilities)


def test_features_are_rounded_as_the_shelf_keeps_them(tmp_path, monkeypatch):
    shelf = make_body_shelf(tmp_path, torch.float16, limit=12)
    opened, predictor = open_predictor(shelf.folder, make_hub(shelf, tmp_path / "hub"))
    files, features_of, half = files_of(shelf), bodies.features_of, []
    expected = [*predict_each(opened, predictor, files)]

    def rounded(body, images):
        half.append(features_of(body, images).half().float())
        return half[-1]

    monkeypatch.setattr(bodies, "features_of", rounded)
    for one, other in zip(predict_each(opened, predictor, files), expected, strict=True):
        assert torch.equal(one.probabilities, other.probabilities)
    assert half


def test_a_hub_that_a_newcomer_has_joined_answers_too(shelf, hub, tmp_path):
    opened = open_hub(hub)
    join(opened.model, shelf, shelf.find("f"))
    numbers = torch.arange(shelf.record.num_images).double()
    with torch.no_grad():  # of half of the images its score is among the K largest
        clean, _ = opened.model.generator.generator(numbers)
        opened.model.generator.clean[-1].bias.copy_(clean.topk(K).values[:, -1].median())
    models = (*opened.models, shelf.find("f"))
    save_hub(dataclasses.replace(opened, models=models), tmp_path / "larger")
    expected, weights = frozen_answers(tmp_path / "larger")
    assert 0 < (weights[:, -1] > 0).sum() < len(weights)
    opened, predictor = open_predictor(shelf.folder, tmp_path / "larger")
    # Backwards, so that nothing is read by an image's number on the shelf.
    found = [*predict_each(opened, predictor, files_of(shelf)[::-1])][::-1]
    probabilities = torch.stack([answer.probabilities for answer in found])
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-5)
    assert [("f" in answer.experts) for answer in found] == (weights[:, -1] > 0).tolist()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A shelf with a hub in it."""
    shelf = make_body_shelf(tmp_path_factory.mktemp("own"), limit=12)
    make_hub(shelf, shelf.folder / "hub")
    return shelf


class TestCommand:
    def test_it_writes_what_predict_writes_and_says_what_it_ran(self, own, tmp_path):
        photos = tmp_path / "photos"
        photos.mkdir()
        for i, path in enumerate(images_of(own.folder.parent / "data")["test"][:3]):
            shutil.copy(path, photos / f"{i}.png")
        (photos / "1.5.png").write_bytes(b"no image")
        out = tmp_path / "answers.csv"
        result = hubpath(
            "shelf", "predict", own.folder, photos, "--out", out, "--classes", status=1
        )
        assert "3 of 4 images answered in" in result.stdout
        assert "6 expert forwards of 3 images, 2 an image" in result.stderr
        assert "1 of 4 images have no answer" in result.stderr
        rows = [*csv.DictReader(out.open())]
        assert [*rows[0]][:4] == ["path", "label", "probability", "error"]
        assert [c for c in rows[0] if c.startswith("expert:")] == [f"expert:{x}" for x in "abcd"]
        assert [c for c in rows[0] if c.startswith("class:")] == [
            f"class:{name}" for name in own.classes
        ]
        assert [bool(row["error"]) for row in rows] == [False, True, False, False]
        read = [row for row in rows if not row["error"]]
        assert all(sum(float(row[f"expert:{x}"]) > 0 for x in "abcd") == K for row in read)

    def test_nothing_readable_ends_with_status_2(self, own, tmp_path):
        (tmp_path / "x.png").write_bytes(b"no image")
        result = hubpath("shelf", "predict", own.folder, tmp_path / "x.png", status=2)
        assert "1 of 1 images have no answer" in result.stderr
        assert "forwards" not in result.stderr

    def test_changed_weights_are_refused_by_name(self, own, tmp_path):
        copy = shutil.copytree(own.folder, tmp_path / "shelf")
        path = own.folder.parent / "weights" / "a.safetensors"
        kept, state = path.read_bytes(), load_file(path)
        image = images_of(own.folder.parent / "data")["test"]
        try:
            save_file({**state, "bn1.weight": 2 * state["bn1.weight"]}, path)
            message = refused("shelf", "predict", copy, *image)
        finally:
            path.write_bytes(kept)
        assert "a: its weights (" in message
        assert "hubpath shelf extract" in message

    def test_hubs_of_other_shelves_and_features_of_ones_own_are_refused(self, own, tmp_path):
        other = make_shelf(tmp_path / "other")
        folder = make_hub(other, other.folder / "hub", labels=("model0", "model1", "model2"))
        image = images_of(own.folder.parent / "data")["test"][0]
        message = refused("shelf", "predict", own.folder, image, "--hub", folder)
        assert f"hub: {folder} is of the shelf" in message.replace("\n", "")
        message = refused("shelf", "predict", other.folder, image)
        assert "holds features of your own" in message
        message = refused("shelf", "predict", own.folder, image, "--hub", tmp_path / "none")
        assert "holds no hub of a shelf" in message
        assert "is no shelf" in refused("shelf", "predict", tmp_path, image)
