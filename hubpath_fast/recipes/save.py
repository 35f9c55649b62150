"""``hubpath save``: the model of a run in a folder of its own, for others to open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints import CONFIG_FILE, load_config
from ..pretrained.costs import measured_costs
from ..pretrained.hub_api import check_repository, push_folder
from ..pretrained.save import check_free, save_model
from ..runs.folder import Run, open_run

TOLD = (
    "trainer",
    "run",
)  # of a checkpoint's config.json: the settings, without this machine's paths


def save(
    run: str | Path,
    out: str | Path,
    slim: bool = False,
    push: str | None = None,
    private: bool | None = None,
) -> str | None:
    """Writes a run's best checkpoint as ``model.save_pretrained`` does, with the routes that the
    run keeps, the settings that it was trained with, and a model card, for which an image's costs
    are measured.

    run: as of ``open_run``. out: a new folder, or that of a saved hub, which is replaced. slim: see
    ``save_pretrained``. push: "OWNER/NAME" on the Hugging Face hub, where it is then put, too;
    private: see ``push_to_hub``. Returns the address of that commit.

    Raises ValueError: no run, a folder of something else, a repository that cannot be written to.
    """
    out = Path(out)
    check_free(out)
    if push is not None:
        check_repository(push)
    opened = open_run(run)
    opened.check_apart(out)
    result = None
    if opened.folder is not None:
        place = opened.folder.checkpoint()
        if Path(run).resolve() in (opened.folder.path.resolve(), place.resolve()):
            result = opened.folder.result()  # of other weights, such as last/'s, it says nothing
    if result is not None:
        result = {**result, "costs": measured_costs(opened.model)}
    told = settings_told(opened, run)
    card = push or out.resolve().name
    save_model(opened.model, out, slim=slim, more=told, card=card, result=result)
    return None if push is None else push_folder(out, push, private=private)


def settings_told(opened: Run, run: str | Path) -> dict[str, Any]:
    """The settings that a run's model was trained with. run: as it was opened by."""
    held = load_config(Path(run) if opened.folder is None else opened.folder.checkpoint())
    return {name: held[name] for name in TOLD if name in held}


def description(out: Path) -> str:
    """What was written, in a line."""
    files = [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    experts = load_config(out)["model"]["experts"]
    return (
        f"{len(experts)} experts, {size:.1f} MiB in {len(files)} files ({CONFIG_FILE} says which)"
    )
