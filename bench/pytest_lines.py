"""A plugin of pytest: a line of results for each test, as it ends.

A report in XML is written at the end, and not at all where pytest is killed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from .children import Files, Writer
from .records import ROOT

VARIABLE = "HUBPATH_TEST_LINES"  # where lines go, and what stands in each, as JSON


def prepare(write: Writer) -> None:
    """Sets the environment of a pytest that this process is about to become."""
    files = {"folder": str(write.files.folder), "part": write.files.part}
    os.environ[VARIABLE] = json.dumps({"files": files, "group": write.group, "stamp": write.stamp})
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def writer() -> Writer:
    given = json.loads(os.environ[VARIABLE])
    files = Files(Path(given["files"]["folder"]), given["files"]["part"])
    return Writer(files, given["group"], lambda: given["stamp"])


def row_of(report) -> dict | None:
    """A test's line, of its report on the call, or on a set-up that failed or skipped."""
    if report.when == "teardown" and not report.failed:
        return None
    if report.when == "setup" and report.passed:
        return None
    row = {"name": short(report.nodeid), "ok": not report.failed, "quiet": True}
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        return {**row, "skipped": reason.removeprefix("Skipped: ")[:200]}
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash is not None else str(report.longrepr)
        return {**row, "note": " ".join(message.split())[:300]}
    return {**row, "text": f"{report.duration:.1f} s"}


def short(nodeid: str) -> str:
    return nodeid.removeprefix("tests/")


class _Lines:
    def __init__(self):
        self.write, self.announced = writer(), False

    def announce(self, count: int) -> None:
        """How many lines there will be: those of tests that are cut off are missed."""
        if not self.announced:  # each of xdist's workers collects
            self.announced = True
            self.write("collected", lines_to_come=count, text=f"{count} tests", quiet=True)

    def pytest_collection_finish(self, session) -> None:
        self.announce(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids) -> None:
        self.announce(len(ids))

    def pytest_runtest_logreport(self, report) -> None:
        row = row_of(report)
        if row is not None:
            self.write(**row)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            lines = str(report.longrepr).strip().splitlines()
            self.write(f"collect {short(report.nodeid)}", ok=False, note=lines[-1][:300])


def pytest_configure(config) -> None:
    # Under xdist the workers' reports come to the process that started them.
    if VARIABLE in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Lines())
