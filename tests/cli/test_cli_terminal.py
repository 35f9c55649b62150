"""What the command meets in terminals: other encodings, closed pipes, an early Ctrl-C, a umask."""

import contextlib
import io
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command import hubpath, refused
from support.waiting import LIMIT

from hubpath_fast.cli import app
from hubpath_fast.cli.messages import messages, print_in_any_encoding

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "hubpath_command.py")]
FIT = [
    "fit", "--hub", "test_resnet,test_vit", "--no-pretrained", "--image-size", "32",
    "--batch-size", "4", "--steps", "1", "--data",
]  # fmt: skip
LATIN_1 = os.fsdecode(b"caf\xe9")  # a name in Latin-1, as old archives hold


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Classes whose names few encodings have, and one whose name is no UTF-8 where it may be."""
    root = tmp_path_factory.mktemp("data")
    names = ["red", "猫"] + ([LATIN_1] if sys.platform == "linux" else [])
    for name in names:
        (root / name).mkdir()
        for i in range(4):
            pixels = np.random.RandomState(i).randint(0, 255, (32, 32, 3), np.uint8)
            with open(root / name / f"{i}.png", "wb") as file:  # Pillow takes no such name
                Image.fromarray(pixels).save(file, "png")
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    hubpath(*FIT, data, "--workers", 0, "--out", out)
    return out


def said(*arguments, **environment):
    """(status, output as bytes, errors as bytes) of a process of its own."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], env=environment, capture_output=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def written(encoding, *arguments):
    """The same of this process, whose output and errors have that encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        print_in_any_encoding()
        with pytest.raises(SystemExit) as ended:
            app([*map(str, arguments)])
    for stream in streams:
        stream.flush()
    return ended.value.code, *(stream.buffer.getvalue() for stream in streams)


ENVIRONMENTS = {
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("encoding", [*ENVIRONMENTS, "cp1252", "ascii"])
def test_names_that_the_output_cannot_hold_are_spelt_out(run, data, encoding):
    images = [os.fsencode(path / "0.png") for path in sorted(data.iterdir())]
    command = ["predict", run, *map(os.fsdecode, images)]
    if encoding in ENVIRONMENTS:
        status, output, errors = said(*command, **ENVIRONMENTS[encoding])
    else:
        status, output, errors = written(encoding, *command)
    assert (status, errors) == (0, b"")
    lines = output.splitlines()
    assert len(lines) == len(images)
    cat = os.fsencode(data / "猫" / "0.png")
    for path, line in zip(images, lines, strict=True):
        # In the C locale Python itself takes every byte above 127 for one that is no text.
        keep = {"utf-8": path == cat}.get(encoding, False)
        text = path.decode() if keep or path.isascii() else spelt(path, encoding)
        assert line.startswith(text.encode() + b": ")


def spelt(path, encoding):
    text = path.decode("ascii" if encoding == "C" else "utf-8", "surrogateescape")
    return text.encode("ascii", "backslashreplace").decode()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_trees_are_drawn_in_any_encoding(data, encoding):
    status, _, errors = written(encoding, "data", "check", "cars", "--root", data)
    assert status == 2
    assert b"`- stanford_cars/" in errors
    assert b"|- " in errors
    assert b"\\u25" not in errors


def test_our_own_signs_have_plain_ones():
    print_in_any_encoding()
    text = "├─ └─ │ ━ ± × … – 猫 \udce9"
    assert text.encode("ascii", "hubpath") == rb"|- `- | = +/- x ... - \u732b \udce9"
    assert text.encode("cp1252", "hubpath").decode("cp1252") == r"|- `- | = ± × … – \u732b \udce9"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("utf-8", "hubpath")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems write names as UTF-8")
def test_a_name_that_the_locale_cannot_write_is_named_with_the_remedy(run):
    status, _, errors = said("evaluate", run, **ENVIRONMENTS["C"])
    assert status == 2
    assert errors.splitlines()[0].endswith(b"cannot be written in ascii; set PYTHONUTF8=1")
    assert b"\\u732b" in errors


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_report_of_names_that_are_no_text(run, tmp_path):
    hubpath("report", run, "--out", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert r"caf\udce9" in page
    assert "猫" in page
    confusion = tmp_path / "report" / "figures" / "confusion.csv"
    assert r"caf\udce9" in confusion.read_text(encoding="utf-8")


def test_a_reader_that_has_seen_enough_is_no_error():
    process = subprocess.Popen(
        [*COMMAND, "hub", "list", "timm/*"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()  # as `head` does
    _, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors) == (1, b"")


@pytest.mark.parametrize(("handler", "status"), [("default_int_handler", 130), ("SIG_IGN", 0)])
def test_ctrl_c_while_python_still_imports_is_one_line(tmp_path, handler, status):
    (tmp_path / "hubpath_fast").mkdir()
    slow = "import time; print('importing', flush=True); time.sleep(3)"
    (tmp_path / "hubpath_fast" / "__init__.py").write_text(slow)
    (tmp_path / "hubpath_fast" / "cli.py").write_text("main = lambda: None")
    code = (
        f"import signal, sys; signal.signal(signal.SIGINT, signal.{handler})\n"
        "sys.path[:0] = sys.argv[1:]; import hubpath_command; hubpath_command.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(ROOT)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline().strip() == b"importing"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors) == (status, b"stopped\n" if status else b"")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_all_files_of_a_run_have_the_mode_that_the_umask_gives(data, tmp_path, umask):
    out = tmp_path / "deep" / "run"
    cache = ["--cache", "disk", "--cache-dir", tmp_path / "cache", "--workers", 0]
    before = os.umask(umask)
    try:
        hubpath(*FIT, data, *cache, "--out", out, "--seeds", "0")
        hubpath("report", out / "seed-0")
    finally:
        os.umask(before)
    found = list(tmp_path.rglob("*"))
    assert {path.name for path in found} > {
        "fit.json", "result.json", "seeds.json", "log.jsonl", "router.safetensors", "state.pt",
        "config.json", "report.html", "confusion.png", "confusion.csv",
    }  # fmt: skip
    assert any(path.suffix == ".npy" for path in found)
    for path in found:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            PermissionError(13, "Permission denied", "/data/run"),
            "failed: Permission denied: /",
        ),
        (FileNotFoundError(2, "No such file", "/x"), "error: No such file: /x"),
        (
            OSError(18, "Cross-device", "a", None, "b"),
            "failed: Cross-device: a -> b",
        ),
        (OSError("no network"), "failed: no network"),
    ],
)
def test_errors_of_the_system_are_told_in_words(error, words, capsys):
    import typer

    with pytest.raises(typer.Exit), messages():
        raise error
    text = capsys.readouterr().err
    assert text.startswith(words)
    assert "[Errno" not in text


def test_a_file_in_the_place_of_a_folder_is_named(run, data):
    file = run.parent / "file"  # not among the images, of which more would be said
    file.touch()
    for command in (["report", run], [*FIT, data], ["demo"]):
        assert f"out: {file} is a file; give a folder" in refused(*command, "--out", file)
    cache = ["--workers", 0, "--out", run.parent / "new", "--cache", "disk", "--cache-dir", file]
    assert f"cache_dir: {file} cannot be made" in refused(*FIT, data, *cache)
    assert not (run.parent / "new").exists()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_the_digits_do_not_take_is_named(seed, tmp_path):
    said = refused("demo", "--seed", seed, "--out", tmp_path / "demo")
    assert f"seed: expected an integer in 0..4294967295, got {seed}" in said


def test_folders_with_brackets_are_folders(tmp_path):
    """Brackets are markup to what draws colours, and "[/]" ends some that was never begun."""
    for i in range(8):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, 20 * i, 0)).save(path)
    out = tmp_path / "[/]" / "run[old]"
    said = hubpath(*FIT, tmp_path / "images", "--workers", 0, "--out", out).stdout
    assert f"with the weights of step 1; kept in {out / 'best'}\n" in said
    assert (out / "result.json").is_file()
    page = out / "report" / "report.html"
    assert hubpath("report", out).stdout.endswith(f"The report is in {page}.\n")
