"""The benchmark of an extraction, small."""

from __future__ import annotations

import pytest

from bench.shelf_extract import main


def test_it_counts_decodes_and_the_share_of_bodies(capsys):
    words = ["--models", "1", "--name", "test_resnet", "--images", "8", "--px", "32"]
    main([*words, "--views", "2"])
    shown = capsys.readouterr().out
    assert "decodes: 8 of 8 images for 1 models" in shown
    assert "(goal 80%)" in shown
    with pytest.raises(SystemExit):
        main(["--name", "test_resnet", "--models", "5"])
