"""A saved model as huggingface_hub knows models, through its ``ModelHubMixin``.

The mixin's own way to save and open one is to keep the constructor's arguments as JSON and call it
again, which cannot build experts: both steps are this package's. Importing this module imports
huggingface_hub, so it is imported where something is sent to the hub, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelHubMixin


class SavedModelOnHub(ModelHubMixin, library_name="hubpath_fast"):
    """write: puts the files of a model, and its card, into an empty folder.

    ``push_to_hub`` is the mixin's; ``from_pretrained`` gives a ``HubPathway``.
    """

    def __init__(self, write: Callable[[Path], None]) -> None:
        self.write = write

    def _save_pretrained(self, save_directory: Path) -> None:
        self.write(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, force_download: bool, **arguments: Any) -> Any:
        from .load import from_pretrained

        return from_pretrained(model_id, **arguments)

    def make_branch(
        self, repository: str, branch: str, private: bool | None, token: str | bool | None
    ) -> None:
        """The repository and the branch, where they are not there: the mixin makes no branch."""
        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        api.create_branch(repository, branch=branch, exist_ok=True)
