"""docs.make_images: what it reads of demos, and what it draws."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from docs import make_images
from docs.make_images import ACCURACY, IMAGES, WEIGHTS, main
from hubpath_fast.recipes.demo import demo_settings

SUMMARY = {
    "best_single": 0.8, "ensemble": 0.9, "ensemble_hard": 0.89, "ensemble_top_k": 0.85,
    "hub_pathway": 0.95, "oracle": 0.99, "singles": {"a": 0.8, "b": 0.7, "c": 0.6}, "k": 2,
}  # fmt: skip


def demo(folder, seed, **changes):
    """What a demo leaves that is read: four test images in two groups, three experts."""
    run = folder / "runs" / f"seed-{seed}" / "pathway"
    run.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"seed": seed} | changes))
    result = {"validation": {"accuracy": 0.5, "loss": 1.0}}
    (run / "result.json").write_text(json.dumps(result))
    weights = torch.tensor([[0.75, 0.25, 0], [0.25, 0, 0.5], [0, 0.5, 0.25], [0, 0.5, 0.5]])
    save_file({"test": torch.zeros(4, 10), "weights": weights}, run / "outputs.safetensors")
    groups = {"test": torch.zeros(4, dtype=torch.int64), "groups": torch.tensor([0, 0, 1, 1])}
    save_file(groups, run.parent / "targets.safetensors")
    noted = {"group_names": ["up", "down"], "classes": list("0123456789")}
    (run.parent / "problem.json").write_text(json.dumps(noted))
    (folder / "compare.json").write_text(json.dumps({"settings": demo_settings().to_dict()}))
    return folder


def test_demos_become_the_stored_results(tmp_path):
    folders = [demo(tmp_path / "0", 0), demo(tmp_path / "1", 1, hub_pathway=0.97)]
    found = make_images.read_demos(folders, "a CPU")
    rows = {row["name"]: row for row in found[ACCURACY]["rows"]}
    assert len(rows) == 6
    assert rows["Hub-Pathway"] == {"name": "Hub-Pathway", "forwards": 2, "accuracies": [0.95, 0.97]}
    assert rows["oracle"]["bound"]
    assert rows["ensemble of 3, soft vote"]["forwards"] == 3
    assert found[ACCURACY]["seeds"] == [0, 1]
    weights = found[WEIGHTS]
    assert weights["seeds"] == [0]
    assert weights["mean_weights"] == [[0.5, 0.125, 0.25], [0.0, 0.5, 0.375]]
    assert (weights["renderings"], weights["experts"]) == (["up", "down"], ["a", "b", "c"])
    with pytest.raises(ValueError, match="different seeds"):
        make_images.read_demos([folders[0], folders[0]], "a CPU")


def test_pictures_are_drawn_from_demos(tmp_path, capsys):
    folder, results, images = demo(tmp_path / "0", 0), tmp_path / "results", tmp_path / "images"
    results.mkdir()
    main([str(folder), "--hardware", "a CPU"], results, images)
    assert json.loads((results / WEIGHTS).read_text())["hardware"] == "a CPU"
    names = {path.name for path in images.iterdir()}
    assert names == {path.name for path in IMAGES.iterdir()}
    for path in images.iterdir():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels[0, 0].tolist() == [255, 255, 255]  # readable on a dark page, too
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    with pytest.raises(SystemExit):
        main(["somewhere"], results, images)
