"""Where the lists of a set lie below its folder, and where the photographs that they name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from ...data.folder import SPLIT_NAMES
from ...data.names import FileFinder, is_gone

OWN = ("csv", "folder", None)  # names of a user's own list
PARTS = ("train", "validation", "test")


def _hrnet(name: str, *parts: str) -> dict[str, tuple[str, ...]]:
    return {part: (f"face_landmarks_{name}_test_{part}.csv",) for part in parts}


# The files of each part, the first that is there counts. "full" is the test set of the paper.
LISTS: Mapping[str | None, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "300w": {
            "train": ("face_landmarks_300w_train.csv",),
            "full": ("face_landmarks_300w_valid.csv",),
            "common": ("face_landmarks_300w_valid_common.csv",),
            "challenge": ("face_landmarks_300w_valid_challenge.csv",),
            "test": ("face_landmarks_300w_test.csv", "face_landmarks_300w_valid.csv"),
        },
        "wflw": {
            "train": ("face_landmarks_wflw_train.csv", "list_98pt_rect_attr_train.txt"),
            "test": ("face_landmarks_wflw_test.csv", "list_98pt_rect_attr_test.txt"),
            "full": ("face_landmarks_wflw_test.csv", "list_98pt_rect_attr_test.txt"),
            **_hrnet(
                "wflw", "largepose", "expression", "illumination", "makeup", "occlusion", "blur"
            ),
        },
        "cofw": {
            "train": ("COFW_train_color.mat", "COFW_train.mat"),
            "test": ("COFW_test_color.mat", "COFW_test.mat"),
            "full": ("COFW_test_color.mat", "COFW_test.mat"),
        },
        None: {part: tuple(f"{name}.csv" for name in SPLIT_NAMES[part]) for part in PARTS},
    }
)
DEPTH = 2  # folders below the root in which lists are looked for
# Folders of photographs, beside the list or above it.
IMAGE_FOLDERS = ("images", "WFLW_images", "")
ABOVE = 3


def find_list(root: Path, name: str | None, part: str) -> Path | None:
    """The list of a part below a set's folder; None if there is none."""
    for file in LISTS[name][part]:
        for depth in range(DEPTH + 1 if name else 1):
            found = sorted(root.glob("/".join([*["*"] * depth, file])))
            if found:
                return found[0]
    return None


def image_folders(file: Path, images: str | Path | None) -> list[Path]:
    """Where a list's photographs may lie; ``images``: there alone."""
    if images is not None:
        return [Path(images)]
    near = [file.parent, *file.parent.parents][:ABOVE]
    # The current folder's parents, which Path does not tell of a relative path, are not looked at.
    return [folder / inside for folder in near for inside in IMAGE_FOLDERS if folder.is_dir()]


class ImageFinder:
    """Finds the photographs of a list, in the first folder that has them."""

    def __init__(self, file: Path, images: str | Path | None) -> None:
        folders = image_folders(file, images)
        self.folders = [folder for folder in folders if folder.is_dir()] or folders[:1]
        self._finder = FileFinder()

    def find(self, name: str) -> Path | None:
        for place, path in self._candidates(name):
            found = self._finder.find(path)
            if not is_gone(found):
                if place:  # most likely the next ones lie there as well
                    self.folders.insert(0, self.folders.pop(place))
                return found
        return None

    def _candidates(self, name: str) -> Iterator[tuple[int, Path]]:
        # A name may begin or end with a blank, and most that do were not meant to.
        for spelling in dict.fromkeys((name, name.strip())):
            home = os.path.expanduser(spelling)
            for place, folder in enumerate(self.folders):
                yield place, folder / home
