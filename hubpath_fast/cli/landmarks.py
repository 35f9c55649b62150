"""``hubpath landmarks``: points of a face, or of anything, in place of classes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.markup import escape

from ..notes import show_notes
from ..runs.config import LANDMARKS, FitConfig
from .fit import (
    Device,
    ExpertMajor,
    OptionalPath,
    OptionalStr,
    Room,
    fit_command,
)
from .messages import console, errors, messages
from .options import options
from .predict import end, find, one_line, say

if TYPE_CHECKING:
    from ..recipes.landmarks_predict import FacePoints

Folder = Annotated[
    Path, typer.Argument(help="folder of a run of `hubpath landmarks fit`, or a saved hub")
]
OptionalInt = Optional[int]  # noqa: UP045

app = typer.Typer(
    help="Learn landmarks, such as the points of a face, with a hub of pre-trained models.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

SHOWN = ("data", "images", "dataset", "hub", "k", "steps", "lr_expert", "device")
HIDDEN = (
    "lr_head", "lr_router", "batch_size", "optimizer", "schedule", "weight_decay", "clip_norm",
    "accumulate", "explore", "aggregator", "head_init", "image_size", "pretrained", "eval_every",
    "patience", "save_every", "seed", "workers", "cache", "cache_dir", "validation", "flip",
    "fallback", "warm_up", "parallel", "targets", "sigma", "head_width", "unit", "flip_pairs",
    "box",
)  # fmt: skip


@app.command()
@options(FitConfig, SHOWN, HIDDEN, {"lr_expert": "--lr"})
def fit(
    asked,
    preset: Annotated[
        OptionalStr, typer.Option(help="landmarks-300w, landmarks-wflw or landmarks-cofw")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("hubpath-landmarks"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="KEY=VALUE: any setting that --print-config shows"),
    ] = None,
    data_root: Annotated[OptionalStr, typer.Option(help="folder of a published set")] = None,
    seeds: Annotated[OptionalStr, typer.Option(hidden=True)] = None,
    config: Annotated[OptionalPath, typer.Option(hidden=True)] = None,
    amp: Annotated[bool, typer.Option("--amp", hidden=True)] = False,
    print_config: Annotated[bool, typer.Option("--print-config", hidden=True)] = False,
) -> None:
    """Train a Hub-Pathway on your own faces (a CSV: image,x,y,...), or on 300W, WFLW or COFW.

    --data is the list, --images the folder of its images (default: the list's); or --preset
    landmarks-wflw --data-root DIR. --seeds 0,1,2 trains a run for each; --amp is bf16 autocast.
    """
    with messages():
        fit_command(
            asked, preset, out, resume, set_, data_root, seeds, config, amp, print_config, LANDMARKS
        )


@app.command()
def evaluate(
    run: Folder,
    subset: Annotated[
        OptionalStr, typer.Option(help="a published part of the test set alone, such as largepose")
    ] = None,
    norm: Annotated[
        OptionalStr,
        typer.Option(
            help="what errors are divided by: ocular,pupil,diagonal or two landmarks (36-45); "
            "several with commas"
        ),
    ] = None,
    jitter: Annotated[
        float, typer.Option(help="score again with boxes moved by up to this share, such as 0.1")
    ] = 0.0,
    device: Device = "cpu",
    data: Annotated[OptionalStr, typer.Option(help="another list of the same landmarks")] = None,
    images: Annotated[OptionalStr, typer.Option(help="folder of the photographs of --data")] = None,
    data_root: Annotated[
        OptionalStr, typer.Option(help="where the run's own data set lies now")
    ] = None,
    workers: Annotated[
        OptionalInt,
        typer.Option(help="processes that decode images; 0: decode here; as in training"),
    ] = None,
    room: Room = None,
    expert_major: ExpertMajor = False,
) -> None:
    """The errors of a run's best checkpoint on held-out faces, or on those of another list.

    Each line says what its errors are divided by: figures with different units do not compare.
    """
    with messages():
        from ..recipes.landmarks_evaluate import evaluate_landmarks, row_text

        norms = [part.strip() for part in (norm or "").split(",") if part.strip()]
        memory = room, expert_major
        result = evaluate_landmarks(
            run, data, images, device, subset, norms, jitter, data_root, workers, *memory
        )
        for row in result["rows"]:
            console.print(row_text(row), soft_wrap=True, highlight=False, markup=False)
        show_notes(result["notes"], console)


@app.command()
def predict(
    run: Folder,
    images: Annotated[
        list[str],
        typer.Argument(
            help='files, folders, patterns ("photos/**/*.jpg"), or - for a list on stdin'
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="folder for points.csv and the photographs with their points")
    ],
    box: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help='where the face is: x0,y0,x1,y1 in pixels, or "image" for all of it; one for all '
            "photographs, or one for each"
        ),
    ] = None,
    device: Device = "cpu",
    room: Room = None,
    expert_major: ExpertMajor = False,
) -> None:
    """The landmarks of a face in each photograph, and which experts were asked with what weight.

    The run finds points in a box, not the box: it should be as tight around the points as those of
    the faces that it was trained on, whose boxes are made of the true points. Coordinates are those
    of the photograph as viewers show it, with 0 for the centre of the first pixel.

    An image that cannot be read, or whose box lies outside, is named on stderr, and the others are
    answered; then the status is 1, or 2 if there is no answer.
    """
    with messages():
        from ..recipes import landmarks_predict as recipe
        from ..runs.folder import open_run

        if out.exists() and not out.is_dir():
            raise ValueError(f"out: expected a folder, got the file {out}")
        for text in box or ():
            recipe.read_box(text)  # before anything is loaded
        found = find(images)
        boxes = recipe.boxes_of(box or (), len(found))
        opened = open_run(run, device, LANDMARKS, room)
        show_notes(opened.notes, errors)
        out.mkdir(parents=True, exist_ok=True)
        taken = {Path(item.path).resolve() for item in found}
        faces, table = [], out / recipe.POINTS
        try:
            for face in recipe.predict_landmarks(opened, found, boxes, expert_major):
                faces.append(face)
                _tell(face, out, taken)
        except KeyboardInterrupt:
            stopped = f"stopped after {len(faces)} of {len(found)} images; {table} holds their rows"
            raise InterruptedError(stopped) from None
        finally:
            recipe.write_points(faces, opened.task.layout.names, table)
        broken = sum(face.error is not None for face in faces)
        if broken < len(faces):
            print(one_line(f"points of {len(faces) - broken} of {len(faces)} faces in {table}"))
        show_notes(opened.room_notes(), errors)
        end(broken, len(faces), "have no points")


def _tell(face: FacePoints, out: Path, taken: set[Path]) -> None:
    """Draws what was found and says it on stdout; what was not, on stderr."""
    from ..recipes.landmarks_predict import draw_points, face_text

    if face.error is not None:
        sys.stdout.flush()  # in the order given, where both go to one place
        say(f"[bold red]error:[/] {escape(one_line(face.error))}")
        return
    if face.note is not None:
        show_notes([one_line(face.note)], errors)
    print(one_line(face_text(face, draw_points(face, out, taken))), flush=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for summary.json and report.html")] = Path(
        "hubpath-landmarks-demo"
    ),
    seed: Annotated[int, typer.Option(help="of the split, the poses, the weights, the noise")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="a few steps, under a minute")] = False,
    device: Device = "cpu",
) -> None:
    """The whole loop on landmarks of handwritten digits: no download, no GPU, a few minutes."""
    with messages():
        from ..recipes.landmarks_demo import landmarks_demo

        landmarks_demo(out, seed, quick, device, console)
