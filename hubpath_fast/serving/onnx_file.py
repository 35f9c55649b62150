"""Writing an ONNX file of an exported program, and what it says of itself. Needs the extra [onnx].

An ONNX file is one protobuf message, and two messages one behind the other are read as one with the
fields of both: so metadata can be appended.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch.export import ExportedProgram

from .errors import ExportError

OLDEST_OPSET = 18  # what torch.onnx writes; it converts to older ones only where it happens to work
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def check_onnx(opset: int | None) -> None:
    """Raises ExportError where a library is missing, and ValueError for an opset that is not
    written."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"format: onnx needs {', '.join(missing)}; pip install 'hubpath-fast[onnx]'"
        )
    if opset is None:
        return
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise ValueError(
            f"opset: expected an integer in {OLDEST_OPSET}..{newest} (onnx {onnx.__version__}), "
            f"got {opset}; leave it out for the one that torch writes"
        )


def write_onnx(program: ExportedProgram, path: Path, outputs: list[str], opset: int | None) -> None:
    """Writes the program as one file. outputs: their names."""
    import torch

    written = torch.onnx.export(
        program,
        (),
        input_names=["images"],
        output_names=outputs,
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    written.save(path, external_data=False)


def metadata(key: str, text: str) -> bytes:
    """What, appended to an ONNX file, adds one entry to its metadata."""
    import onnx

    model = onnx.ModelProto()
    entry = model.metadata_props.add()
    entry.key, entry.value = key, text
    return model.SerializeToString()


def read_metadata(path: Path, key: str) -> str:
    """The entry ``key`` of a file's metadata; KeyError, ValueError where it has none."""
    try:
        import onnx
    except ImportError as error:
        raise ValueError(f"onnx is not installed: {error}") from error
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return {entry.key: entry.value for entry in model.metadata_props}[key]
