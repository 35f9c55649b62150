"""Asks an exported package in a process of its own: ``python -I run_package.py JOB_FOLDER``.

It shows that a package needs torch, or onnxruntime, and nothing else: this file imports nothing of
hubpath_fast, and makes importing it, timm or torchvision an error. ``-I`` keeps the folder that it
was started in and the user's settings out of the search.

JOB_FOLDER has ``job.json`` ({"format", "package", "device", "path", "asks": [{"first", "last",
"batch", "score_shift"}]}) and ``images.npy``, uint8 [N, 3, S, S]. For ask i it answers images
first..last-1, ``batch`` at a time, and writes ``answer-i-j.npy``, one file for each output j of the
package. ``score_shift``, [M] or null, takes the place of the package's buffer of that name, float32
[1, M]. Questions without one come first. ``path``: folders where torch and the like lie.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from pathlib import Path

BLOCKED = ("hubpath_fast", "kernels", "timm", "torchvision")


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name}: a package must run without it")
        return None


def pt2(package: str, device: str):
    import torch

    program = torch.export.load(package).module()

    def answer(images, shift):
        if shift is not None:
            with torch.no_grad():
                program.score_shift.copy_(torch.tensor(shift))
        with torch.no_grad():
            return program(torch.from_numpy(images).to(device))

    return answer


def aoti(package: str, device: str):
    import torch

    program = torch._inductor.aoti_load_package(package)

    def answer(images, shift):
        if shift is not None:
            held = torch.tensor([shift], device=device)
            program.load_constants({"score_shift": held}, check_full_update=False)
        with torch.no_grad():
            return program(torch.from_numpy(images).to(device))

    return answer


def onnx(package: str, device: str):
    import numpy as np
    import onnxruntime

    on_cuda = [("CUDAExecutionProvider", {"use_tf32": "0"})]
    providers = on_cuda if device.startswith("cuda") else ["CPUExecutionProvider"]
    sessions: dict = {}  # with what they were given, which they only refer to

    def session(shift):
        options, held = onnxruntime.SessionOptions(), None
        options.log_severity_level = 3  # errors: warnings of unused nodes are not the user's
        if shift is not None:
            held = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([shift], np.float32))
            options.add_initializer("score_shift", held)
        return onnxruntime.InferenceSession(package, options, providers=providers), held

    def answer(images, shift):
        key = str(shift)
        if key not in sessions:
            sessions.clear()
            sessions[key] = session(shift)
        return sessions[key][0].run(None, {"images": images})

    return answer


def in_parts(package: str, device: str):
    import importlib.util

    import torch

    spec = importlib.util.spec_from_file_location("serve", f"{package}/serve.py")
    spec.loader.exec_module(serve := importlib.util.module_from_spec(spec))
    hub = serve.Parts(package, device)

    def answer(images, shift):
        if shift is not None:
            with torch.no_grad():
                held = dict(hub.router.named_buffers())["form.score_shift"]
                held.copy_(torch.tensor(shift))
        return hub(torch.from_numpy(images), routing=True)

    return answer


def main(folder: Path) -> None:
    sys.meta_path.insert(0, Refuse())
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    sys.path += job["path"]
    if job["format"] != "onnx":
        keep_float32()
    ask(folder, job)


def keep_float32() -> None:
    """All bits of it: a GPU's convolutions would be in TF32, by more apart than is allowed."""
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def ask(folder: Path, job: dict) -> None:
    import numpy as np

    images = np.load(folder / "images.npy")
    kinds = {"pt2": pt2, "aoti": aoti, "onnx": onnx, "parts": in_parts}
    answer = kinds[job["format"]](job["package"], job["device"])
    for number, question in enumerate(job["asks"]):
        batches = []
        for first in range(question["first"], question["last"], question["batch"]):
            last = min(first + question["batch"], question["last"])
            outputs = answer(images[first:last], question["score_shift"])
            outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
            batches.append([o if isinstance(o, np.ndarray) else as_numpy(o) for o in outputs])
        for which, parts in enumerate(zip(*batches)):  # noqa: B905  (as many, of one program)
            np.save(folder / f"answer-{number}-{which}.npy", np.concatenate(parts))


def as_numpy(tensor):
    tensor = tensor.detach().cpu()
    lacks = str(tensor.dtype) == "torch.bfloat16"  # numpy has no such type
    return (tensor.float() if lacks else tensor).numpy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
