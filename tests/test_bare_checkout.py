"""A checkout that was never installed, where packages are missing that no kernel needs.

So it is on some machines with a GPU, where nothing can be installed either.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("hubpath_fast", "kernels", "bench", "tests")
ABSENT = ("platformdirs",)
UNSET = ("PYTEST", "PYTHONPATH", "TRITON_INTERPRET")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ABSENT:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r})\n")
    return folder


def printed(checkout: Path, *arguments: str) -> str:
    """What Python prints, started in the checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(UNSET)}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # some need what is absent here
    done = subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_kernels_are_the_checkouts_own(checkout):
    code = (
        "import hubpath_fast, hubpath_fast.kernels, hubpath_fast._backends\n"
        "assert hubpath_fast._backends.triton_ops() is hubpath_fast.kernels\n"
        "print(hubpath_fast.__file__, hubpath_fast.kernels.__file__)"
    )
    folders = [Path(file).resolve().parent for file in printed(checkout, "-c", code).split()]
    assert folders == [checkout.resolve() / name for name in ("hubpath_fast", "kernels")]


def test_all_files_of_gpu_tests_can_be_imported(checkout):
    code = "from bench.gpu_check import gpu_tests; print(*gpu_tests())"
    files = printed(checkout, "-c", code).split()
    options = ("--collect-only", "-q", "-p", "xdist", "-n", "0", "-m", "gpu")
    collected = printed(checkout, "-m", "pytest", *options, *files)
    for name in ("test_gpu_router", "test_gpu_outputs", "test_graphs_gpu", "test_executors"):
        assert f"{name}.py::" in collected
    assert "error" not in collected.lower().splitlines()[-1]


@pytest.mark.parametrize("part", ["gpu_check", "gpu_speed"])
def test_both_parts_of_the_suite_say_what_they_would_do(checkout, part):
    plan = printed(checkout, "-m", f"bench.{part}", "--dry-run")
    assert plan.splitlines()[0].startswith("machine ")
    assert "planned" in plan
