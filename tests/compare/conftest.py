"""The folder of digits that comparisons of these tests learn from."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubpath_fast.data.digits import DigitsTask, write_image_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_image_folder(DigitsTask(0, 30), tmp_path_factory.mktemp("data") / "digits", 30)
