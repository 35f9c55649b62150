"""``hubpath shelf extract`` as a user types it."""

from __future__ import annotations

from support.command import hubpath, refused
from support.snapshots import spec_of, write_photos, write_weights


def test_models_are_computed_and_what_failed_is_a_status(tmp_path):
    photos, shelf = write_photos(tmp_path / "photos"), tmp_path / "shelf"
    good = write_weights(tmp_path / "good.safetensors")
    bad = write_weights(tmp_path / "bad.safetensors", scale=1e30)
    out = hubpath(
        "shelf", "extract", "--data", photos, "--hub", spec_of(good), "--out", shelf
    ).stdout
    assert "models: 1, of which 0 are on the shelf and 1 to compute, on 10 images" in out
    assert "models: 1 computed, 0 there before" in out
    assert "10 decodes for 10 forwards" in out
    hub = f"{spec_of(good)},{spec_of(bad)}"
    out = hubpath("shelf", "extract", "--hub", hub, "--out", shelf, status=1).stdout
    assert "models: 0 computed, 1 there before, 1 left out, as said above" in out
    assert out.count(f"left out: {spec_of(bad)}: its features of") == 1


def test_wrong_input_is_one_sentence(tmp_path):
    out = ["--out", tmp_path / "shelf", "--hub", "tiny", "--no-pretrained"]
    assert "data: nothing given" in refused("shelf", "extract", *out)
    digits = ["--dataset", "digits", *out]
    assert "dtype: expected one of fp16, fp32, got 'bf16'" in refused(
        "shelf", "extract", *digits, "--dtype", "bf16"
    )
    assert "batch_size: expected an integer" in refused(
        "shelf", "extract", *digits, "--batch-size", "many"
    )
    assert "torch sees no CUDA" in refused("shelf", "extract", *digits, "--device", "cuda:9")
    assert not (tmp_path / "shelf").exists()
