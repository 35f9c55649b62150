"""A model as a package for a program without hubpath_fast, and the order in which forms are tried.

See ``forms`` for what they are, ``proof`` for how a package is checked before it is there at all.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import replacing_folder
from ..devices import check_device, eval_mode
from ..executors import ResidentExecutor
from ..files import sync
from ..model import FixedRoutes, HubPathway
from ..model.saving import model_config
from .errors import ExportError, expert_name, first_line, refusal, refusing
from .forms import FORMS, Fixed, Form, Sparse, blank, forwards, ladder, make_form
from .images import reachable
from .package import VERSION, append_about
from .parts import check_target, write_index, write_parts
from .programs import EXAMPLE, MOST_SPARES, any_batch, quiet, without_traces
from .proof import Proof, prove

FORMATS = ("pt2", "aoti", "onnx", "parts")
ENDINGS = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}


@dataclass(frozen=True)
class Package:
    """A package that was written: where, and what it says of itself."""

    path: Path
    about: dict[str, Any]

    @property
    def form(self) -> str:
        return self.about["form"]

    @property
    def largest_difference(self) -> float:
        return self.about["proof"]["largest_difference"]


def export(
    model: HubPathway,
    path: str | Path,
    format: str = "pt2",
    form: str | None = None,
    device: str = "cpu",
    routing: bool = False,
    batch: int | None = None,
    input_size: int | None = None,
    opset: int | None = None,
) -> Package:
    """Writes a model as a package that needs torch alone, or onnxruntime, and proves it.

    The package takes images uint8 [N, 3, S, S]; every expert's normalisation and size are inside.
    It answers with probabilities [N, C] of a model that tells classes, or whose task is not known
    and whose outputs are [N, C]; else with what the model predicts [N, C, ...]. Before it is there,
    it is opened in a fresh process without this package and compared with the model, see ``proof``.

    Args:
        model: it stays as it is.
        path: of the file, .pt2 or .onnx; of "parts" a folder. What is there is replaced.
        format: "pt2" (``torch.export``), "aoti" (compiled by AOTInductor: minutes, and a C++
            compiler), "onnx" (needs the extra [onnx]) or "parts" (a folder: the router and each
            expert by themselves, see ``hubpath_fast.serve``).
        form: "sparse", "cond", "dense" or "parts"; None: the first of them that can be exported,
            at a batch of 1 cond before sparse.
        device: that the package is for.
        routing: whether it also returns experts int64 [N, K] and weights [N, K].
        batch: the one batch size that it takes; None: any, on CUDA up to 65,533.
        input_size: S; None: as the model was made for.
        opset: of ONNX; None: the one that torch writes.

    Returns:
        Where it is and what it says of itself: "form", "forwards" (of experts, for a batch of 1 and
        of N), "classes", "input", "outputs", "proof", "tried" (forms that failed, and why),
        "versions", "config". ``read_package`` reads it from the file.

    Raises:
        ExportError: the model cannot be exported (which expert, and why), a library or compiler is
            missing, or the package differs from the model. Nothing is written then.
        ValueError: a wrong argument.
    """
    path = Path(path)
    check_arguments(path, format, form, batch)
    if "parts" in (format, form):
        format, form = "parts", None
        check_target(path)
    on = check_device(device)
    size = input_size_of(model, input_size)
    if format == "onnx":
        from .onnx_file import check_onnx

        check_onnx(opset)
    elif opset is not None:
        raise ValueError(f"opset: it is for the format onnx, got it with {format}; leave it out")
    if format == "aoti" and on.type == "cpu":
        from .compiled import check_compiler

        check_compiler()
    model = whole_on(model, on)
    with eval_mode(model), without_gradients(model):
        check_parts(model, size)
        routing = routing or format == "parts"  # which are asked for at each call
        work = Work(model, format, size, tells_classes(model, size), routing, batch, opset)
        return work.write(path, form)


def export_parts(model: HubPathway, folder: str | Path, **options: Any) -> Package:
    """``export`` with ``format="parts"``, whose other options it takes."""
    return export(model, folder, format="parts", **options)


def check_arguments(path: Path, format: str, form: str | None, batch: int | None) -> None:
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if form is not None and form not in (*FORMS, "parts"):
        raise ValueError(f"form: expected one of {', '.join((*FORMS, 'parts'))}, got {form!r}")
    if batch is not None and (type(batch) is not int or batch < 1):
        raise ValueError(f"batch: expected an integer of at least 1, or None, got {batch!r}")
    if "parts" in (format, form) and (batch is not None or format in ("aoti", "onnx")):
        got = f"format {format}" if batch is None else f"batch {batch}"
        raise ValueError(
            f"form: parts are packages of torch.export for any batch, got {got}; leave it out"
        )
    if format == "parts" and form not in (None, "parts"):
        raise ValueError(f"form: the format parts is a form of its own, got {form!r}; leave it out")
    ending = ENDINGS.get(format)
    if ending is not None and form != "parts" and path.suffix != ending:
        raise ValueError(f"path: a package of format {format} ends with {ending}, got {path}")
    if ending is not None and form != "parts" and path.is_dir():
        raise ValueError(
            f"path: expected a file to write the package of format {format} to, got the folder "
            f"{path}; choose another"
        )


def input_size_of(model: HubPathway, given: int | None) -> int:
    """S. Raises ValueError where it is not known, or the model cannot take such images."""
    if model.input_mean is None:
        raise ValueError(
            "model: a package takes uint8 images, and the model has no normalization of its "
            "experts' images; make it with normalization=(mean, std)"
        )
    size = model.origin.input_size if given is None else given
    if size is None:
        raise ValueError(
            "input_size: the model was made of modules and does not know its images' size; give "
            "input_size, the pixels a side"
        )
    return size


def whole_on(model: HubPathway, device: torch.device) -> HubPathway:
    """The model, if all of it is on the device; else a copy that is, also where its experts come
    there only when they are asked."""
    on_host = device.type != "cpu" and isinstance(model.executor, ResidentExecutor)
    if model.input_mean.device == device and not on_host:
        return model
    model = copy.deepcopy(model)
    if on_host:
        model.executor = "sequential"
    return model.to(device)


@torch.no_grad()
def check_parts(model: HubPathway, size: int) -> None:
    """Raises ExportError, naming it, where a part fails on such images: else each exporter would
    say so in its own way, of what it happens to do then."""
    images, count = blank(model, EXAMPLE, size), len(model.experts)
    given = f"on images {list(images.shape)}: "
    with refusing("the router", given):
        model.route(images)
    for index in sorted(reachable(model)):
        with refusing(expert_name(model, index), given):
            model(images, routing=FixedRoutes([index], [1.0], count).routing(images))


@torch.no_grad()
def tells_classes(model: HubPathway, size: int) -> bool:
    """Whether outputs are turned into probabilities."""
    task = model.origin.task
    if task is not None:
        return task["name"] == "classification"
    return model(blank(model, 1, size)).dim() == 2


@dataclass
class Work:
    """One export: what was asked for. tried: the forms that failed, and why."""

    model: HubPathway
    format: str
    size: int
    probabilities: bool
    routing: bool
    batch: int | None
    opset: int | None

    def write(self, path: Path, form: str | None) -> Package:
        """Tries the forms, and puts the first that can be exported in its place."""
        if self.format == "parts":
            return self.write_parts(path)
        tried: list[dict[str, str]] = []
        names = ladder(self.model, self.batch, self.format == "aoti") if form is None else (form,)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", suffix=".part", dir=path.parent
        ) as room:
            for name in names:
                made = Path(room) / f"package{ENDINGS[self.format]}"
                try:
                    used = self.write_form(name, made)
                except ExportError as error:
                    tried.append({"form": name, "reason": str(error)})
                    continue
                proof = self.prove(made, Path(room))
                about = self.about(used.name, partial(forwards, used), proof, tried)
                append_about(made, self.format, about)
                os.replace(made, path)
                sync(path.parent)
                return Package(path, about)
        reasons = "; ".join(f"{t['form']}: {t['reason']}" for t in tried)
        raise ExportError(f"the model cannot be exported as {self.format}; {reasons}")

    def write_parts(self, path: Path) -> Package:
        """Writes the folder aside, has it asked as any package is, and puts it in its place."""
        with (
            replacing_folder(path) as folder,
            tempfile.TemporaryDirectory(prefix=".hubpath-") as room,
        ):
            parts = write_parts(self.model, folder, self.size, self.probabilities)
            form = make_form(self.model, "dense", self.size, False, False)
            k = len(form.asked) if isinstance(form, Fixed) else form.k
            about = self.about("parts", lambda n: n * k, None, []) | parts
            write_index(folder, about)
            proof = self.prove(folder, Path(room))
            about = self.about("parts", lambda n: n * k, proof, []) | parts
            write_index(folder, about)
        return Package(path, about)

    def write_form(self, name: str, path: Path) -> Form:
        """Exports one form. Raises ExportError, naming the expert, where it cannot be."""
        form = make_form(self.model, name, self.size, self.probabilities, self.routing)
        with quiet():
            program = self.program(form)
            try:
                self.write_program(program, path)
            except Exception as error:  # each compiler has its own way to refuse
                raise ExportError(f"it cannot be written ({first_line(error)})") from error
        return form

    def program(self, form: Form) -> torch.export.ExportedProgram:
        images = blank(self.model, self.batch or EXAMPLE, self.size)
        shapes = None if self.batch is not None else (any_batch(images.device),)
        while True:
            try:
                program = torch.export.export(form, (images,), dynamic_shapes=shapes, strict=False)
                return without_traces(program)
            except Exception as error:  # torch has many ways to refuse, and no common class
                index = form.progress.index
                if isinstance(form, Sparse) and index is not None and form.spares[index] == 1:
                    form.spares[index] = MOST_SPARES
                    continue
                where = "outside of the experts"
                if index is not None:
                    where = expert_name(self.model, index)
                raise refusal(where, error) from error

    def write_program(self, program: torch.export.ExportedProgram, path: Path) -> None:
        if self.format == "onnx":
            from .onnx_file import write_onnx

            write_onnx(program, path, self.outputs, self.opset)
        elif self.format == "aoti":
            from .compiled import write_compiled

            write_compiled(program, path)
        else:
            torch.export.save(program, path)

    @property
    def outputs(self) -> list[str]:
        answer = "probabilities" if self.probabilities else "outputs"
        return [answer, *(["experts", "weights"] if self.routing else [])]

    def prove(self, package: Path, room: Path) -> Proof:
        return prove(
            package,
            self.format,
            self.model,
            self.size,
            self.probabilities,
            self.routing,
            self.batch,
            room,
        )

    def about(
        self,
        form: str,
        forwards: Callable[[int], int],
        proof: Proof | None,
        tried: list[dict[str, str]],
    ) -> dict[str, Any]:
        """What the package says of itself. forwards: of experts, by the number of images. proof:
        None: it is still to come."""
        model, labels = self.model, self.model.origin.labels
        n = 64 if self.batch is None else self.batch
        task = model.origin.task or {}
        config = model_config(model)
        del config["model"]["frozen"]  # of training: in a package nothing has gradients
        return {
            "hubpath_package": VERSION,
            "format": self.format,
            "form": form,
            "device": model.input_mean.device.type,
            "batch": self.batch,
            "input": ["uint8", ["N" if self.batch is None else n, model.input_mean.shape[1],
                                self.size, self.size]],
            "outputs": self.outputs,
            "classes": list(task.get("classes", ())),
            "forwards": {str(count): forwards(count) for count in sorted({1, n})},
            "proof": proof and {
                "images": proof.images,
                "batches": list(proof.batches),
                "images_of_expert": dict(zip(labels, proof.asked, strict=True)),
                "reached_by_score": [labels[index] for index in proof.by_score],
                "largest_difference": proof.difference,
                "tolerance": proof.tolerance,
            },
            "tried": tried,
            "versions": {"torch": torch.__version__, "hubpath_fast": own_version()},
            "config": config,
        }  # fmt: skip


def own_version() -> str:
    try:
        return version("hubpath-fast")
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"


@contextlib.contextmanager
def without_gradients(model: HubPathway) -> Iterator[None]:
    """Parameters ask for none meanwhile: a package keeps what they ask for."""
    asking = [p for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
