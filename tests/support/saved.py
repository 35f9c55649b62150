"""What a checkpoint holds on disk."""

from __future__ import annotations

from pathlib import Path


def all_weights(folder: Path) -> dict[str, bytes]:
    """The bytes of all its safetensors files, the model's and the optimizer's, by their names."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}
    assert files, f"{folder} holds no weights"
    return files
