"""What a report says of classes: worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from hubpath_fast.report import FigureFolder
from hubpath_fast.tasks.classification_report import (
    confusion_counts,
    most_confused,
    report_fields,
    shown_classes,
)

COUNTS = np.array([[5, 2, 0], [0, 9, 1], [3, 0, 1234]])


def test_counts():
    counts = confusion_counts(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 1]), 3)
    assert counts.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]


def test_most_confused_and_shown():
    assert most_confused(COUNTS) == [(2, 0, 3), (0, 1, 2), (1, 2, 1)]
    assert shown_classes(COUNTS, 3) == [0, 1, 2]
    assert shown_classes(COUNTS, 2) == [0, 2]
    assert shown_classes(np.eye(4, dtype=int), 2) == [0, 1]


def test_many_classes_show_the_most_confused(tmp_path):
    count, per = 40, 3
    targets = torch.arange(count).repeat_interleave(per)
    guesses = targets.clone()
    guesses[[3 * per, 3 * per + 1, 7 * per]] = torch.tensor([30, 30, 31])
    classes = [f"class {i}" for i in range(count)]
    predictions = torch.nn.functional.one_hot(guesses, count).float()
    fields = report_fields(classes, predictions, targets)
    assert fields["marked"].sum() == 3
    assert fields["heads"][9:12] == [
        ["✗ predicted class 30", "is class 3"],
        ["✗ predicted class 30", "is class 3"],
        ["✓ class 3"],
    ]
    assert fields["details"]["prediction"][21] == "class 31"
    (make,) = fields["own"]
    section = make(SimpleNamespace(split="test"), FigureFolder(tmp_path, 0.2))
    assert section.text == "Hub-Pathway is wrong on 3 of 120 test samples (2.5 %)."
    picture, pairs = section.items
    assert "Shown are 4 of 40 classes" in picture.caption
    assert "3 of 3 errors lie between them. The CSV has all classes." in picture.caption
    labels = [t.get_text() for t in picture.figure.axes[0].get_yticklabels()]
    assert labels == ["class 3", "class 7", "class 30", "class 31"]
    assert pairs.rows == [["class 3", "class 30", 2, 2 / 3], ["class 7", "class 31", 1, 1 / 3]]
    assert len((tmp_path / "confusion.csv").read_text().splitlines()) == count + 1


def test_where_classes_are_skewed_balanced_accuracy_is_said(tmp_path):
    """Of 12 of the first class 9 are right, of 4 of the second 1."""
    targets = torch.tensor([0] * 12 + [1] * 4)
    guesses = torch.tensor([0] * 9 + [1] * 3 + [1] + [0] * 3)
    predictions = torch.nn.functional.one_hot(guesses, 3).float()
    (make,) = report_fields(["a", "b", "c"], predictions, targets)["own"]
    held_out = make(SimpleNamespace(split="validation"), FigureFolder(tmp_path, 0.2)).text
    assert held_out.startswith("Hub-Pathway is wrong on 6 of 16 validation samples (37.5 %).")
    assert make(SimpleNamespace(split="test"), FigureFolder(tmp_path, 0.2)).text == (
        "Hub-Pathway is wrong on 6 of 16 test samples (37.5 %). Balanced accuracy, the mean over "
        "the classes of the share that is right, is 50.0 %, where accuracy is 62.5 %: the largest "
        "class has 12 samples, the smallest 4."
    )
