"""What is written down of a model beside its weights, and the calls that save one.

How a saved model lies on disk, and how hubs' experts are built again from their names, is known in
``hubpath_fast.pretrained``, above this layer: the methods here are its doors, and import it when
they are called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..preprocessing import resized_side
from .description import describe

if TYPE_CHECKING:
    from .pathway import HubPathway

IMAGES = "uint8, or floats in [0, 1]"
INSIDE = "each expert's mean, std, size and interpolation are applied inside the model"


def model_config(model: HubPathway) -> dict[str, Any]:
    """What ``config.json`` says of a model: "model", see ``describe``, and "preprocessing", what
    its images must look like; None where that is not known, of a model of one's own modules."""
    return {"model": describe(model), "preprocessing": _preprocessing(model)}


def _preprocessing(model: HubPathway) -> dict[str, Any] | None:
    size = model.origin.input_size
    if size is None:
        return None
    task = (model.origin.task or {}).get("name", "classification")
    images = {"input_size": size, "channels": "RGB", "values": IMAGES, "normalization": INSIDE}
    if task != "classification":
        return {**images, "crop": "a square around the face's box, as `hubpath landmarks` cuts it"}
    side = resized_side(size)
    return {
        **images,
        "resize": [side, side],  # whatever the proportions
        "interpolation": "bilinear",
        "antialias": True,
        "center_crop": size,
    }


class Saving:
    """The calls of a ``HubPathway`` that write it down."""

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        classes: Sequence[str] | None = None,
        slim: bool = False,
    ) -> None:
        """Writes the model into a folder, which ``hubpath_fast.from_pretrained`` opens anywhere.

        One file for each expert, one for generator and aggregator, and ``config.json`` (see
        docs/saving.md). A folder that holds a saved model is replaced as a whole, once all is
        written; any other one that is not empty is refused.

        Args:
            folder: it is made where it is missing.
            classes: names of the C outputs, kept as the model's own; None: those that it has.
            slim: leave out bodies that are frozen and equal to the weights that their names stand
                for; the folder then says where they come from.

        Raises:
            ValueError: another number of classes than outputs, or one twice; a folder of something
                else.
            OSError: it cannot be written; what was there before is whole then.
        """
        from ..pretrained.save import save_model

        save_model(self, Path(folder).expanduser(), classes=classes, slim=slim)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        commit_message: str | None = None,
        classes: Sequence[str] | None = None,
        slim: bool = False,
        result: Mapping[str, Any] | None = None,
        licenses: Mapping[int | str, str] | None = None,
    ) -> str:
        """Saves the model on the Hugging Face hub, with a model card, in one commit; files that
        are there already are not sent again.

        Args:
            repo_id: "OWNER/NAME"; the repository is made where there is none.
            private: whether it is then made so; None: as the owner's repositories are.
            token: to write with; None: the one of `hf auth login`.
            branch: it is made where there is none; None: the default one.
            commit_message: None: a plain one.
            classes, slim: as of ``save_pretrained``.
            result: of the run, ``result.json``, for the card; None: the card has no results.
            licenses: of experts' weights, by number or label, in place of what their sources
                state, for the card.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: a wrong repo_id, no right to write, no network.
            ValueError: as of ``save_pretrained``; a licence of an expert that there is not.
        """
        from ..pretrained.hub_api import push

        asked = {"private": private, "token": token, "branch": branch}
        saved = {"classes": classes, "slim": slim, "result": result, "licenses": licenses}
        return push(self, repo_id, commit_message=commit_message, **asked, **saved)
