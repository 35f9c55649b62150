"""Groups of checks or measurements within a number of seconds, each in a process of its own.

A group that crashes, hangs or loses the device's context costs itself only: its lines are on disk
as they come (``jsonl``), and it is killed with all its children when its time is over. Processes
are forked from one that has imported everything and never touches the device, since importing
torch takes seconds, and CUDA does not survive a fork.

A group may take twice what it is planned to, as long as half of what is planned for all that come
after it is left; one that is needed, all that is left. With fewer seconds than are planned for all,
each is planned for its share.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from . import jsonl, records

CHARACTERS = 5_800  # of standard output: a short tail of it must hold the whole table
LEAST = 2.0  # seconds: a group with less time is not begun


class Write(Protocol):
    """write(name, ok=True, **values): one result, on disk when it returns. A line says ``text`` or
    ``note`` (why it is not ok) or ``error``, or by ``skipped`` why it says nothing; with ``quiet``
    it is left out of the table. ``lines_to_come``: so many more, or the group is not ok."""

    def __call__(self, name: str, ok: bool = True, **values: object) -> None: ...


@dataclass(frozen=True)
class Group:
    """run(write, seconds): what the process does, told how long it is planned to take. It may
    become another command. needed: unless it ends well, no later group is begun."""

    name: str
    seconds: float
    run: Callable[[Writer, float], None]
    about: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Files:
    """Where a part ("check" or "speed") leaves what it finds, and its processes what they print."""

    folder: Path
    part: str

    @property
    def rows(self) -> Path:
        return self.folder / f"{self.part}.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.part}.log"

    def write(self, group: str, name: str, ok: bool, **values: object) -> None:
        row = {"part": self.part, "group": group, "name": name, "ok": ok, **values}
        now = datetime.datetime.now(datetime.timezone.utc)
        jsonl.write(self.rows, [{**row, "date": now.isoformat(timespec="milliseconds")}])


class Writer:
    """What a group writes its results by. stamp: called at the first, for what stands in all."""

    def __init__(self, files: Files, group: str, stamp: Callable[[], dict]):
        self.files, self.group, self._stamp = files, group, stamp
        self._stamped: dict | None = None

    @property
    def stamp(self) -> dict:
        if self._stamped is None:
            self._stamped = self._stamp()
        return self._stamped

    def __call__(self, name: str, ok: bool = True, **values: object) -> None:
        self.files.write(self.group, name, ok, **(values | self.stamp))
        print(say({"name": name, "ok": ok, **values}), flush=True)


Runner = Callable[[Group, float, Files, Callable[[], dict]], str]


def scale_of(groups: Sequence[Group], seconds: float) -> float:
    return min(1.0, seconds / sum(group.seconds for group in groups))


def limit_of(groups: Sequence[Group], index: int, left: float, scale: float) -> float:
    """Seconds that a group may take of those that are left: all, if no later one is begun unless
    it ends well. A cold start of CUDA may take long."""
    if groups[index].needed:
        return left
    later = sum(group.seconds for group in groups[index + 1 :])
    return min(left, max(2 * groups[index].seconds * scale, 0), left - 0.5 * later * scale)


def run_groups(
    groups: Sequence[Group],
    seconds: float,
    files: Files,
    stamp: Callable[[], dict],
    runner: Runner | None = None,
    clock: Callable[[], float] = time.monotonic,
    start: float | None = None,
) -> dict[str, str]:
    """Runs the groups in turn: how each ended ("ok", or why not), which is written, too.

    stamp: called in the process of a group, what is to stand in each of its lines. start: when
    the seconds began, by the clock; None: now.
    """
    runner = runner or run_child
    start = clock() if start is None else start
    scale = scale_of(groups, seconds)
    ended: dict[str, str] = {}
    for index, group in enumerate(groups):
        begin, before = clock(), len(jsonl.read(files.rows))
        limit = limit_of(groups, index, seconds - (begin - start), scale)
        if limit < LEAST:
            ended[group.name] = "skipped: no time left"
        else:
            scaled = replace(group, seconds=min(limit, group.seconds * scale))
            how = runner(scaled, limit, files, stamp)
            lost = missing(jsonl.read(files.rows)[before:])
            ended[group.name] = ", ".join(([] if how == "ok" and lost else [how]) + lost)
        took = clock() - begin
        status = ended[group.name]
        files.write(group.name, "group", status == "ok", status=status, seconds=round(took, 2))
        print(f"[{clock() - start:5.1f} s] {group.name}: {status}, {took:.1f} s", flush=True)
        if group.needed and status != "ok":
            break
    return ended


def is_result(row: dict) -> bool:
    """Whether it is one: not how a group ended, or how many results it will have."""
    return row["name"] != "group" and "lines_to_come" not in row


def latest(rows: Sequence[dict]) -> list[dict]:
    """Of lines of one group and name the last: a result that was written again knows more."""
    return list({(row["group"], row["name"]): row for row in rows}.values())


def missing(rows: Sequence[dict]) -> list[str]:
    """How many of the lines that a group announced did not come, in words; nothing if all did."""
    for index, row in enumerate(rows):
        if "lines_to_come" in row:
            come = {later["name"] for later in rows[index + 1 :]} - {"error"}
            if len(come) < row["lines_to_come"]:
                count = row["lines_to_come"]
                return [f"{count - len(come)} of {count} results are missing"]
    return []


def run_child(
    group: Group,
    limit: float,
    files: Files,
    stamp: Callable[[], dict],
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Runs a group in a forked process of its own session, for at most ``limit`` seconds."""
    files.folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    deadline = clock() + limit
    parent, pid, ended = os.getpid(), os.fork(), 0
    if pid == 0:
        die_with(parent)
        _be_group(group, limit, files, stamp)
    try:
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                if code < 0:
                    return f"killed by {signal.Signals(-code).name}"
                return "ok" if code == 0 else f"failed with status {code}"
            if clock() > deadline:
                return f"killed after {limit:.0f} s"
            time.sleep(0.01)
    finally:
        # The session: the process, and what it may have left behind.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        if not ended:  # else its number may be another process's by now
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Called in a process that was just forked: it is killed where its parent is, also once it has
    become another command. Else it would keep the GPU busy when nobody waits for it any more."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before
        os._exit(1)


def _be_group(group: Group, limit: float, files: Files, stamp: Callable[[], dict]) -> None:
    """The forked process: never returns."""
    status = 1
    try:
        os.setsid()
        log = os.open(files.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable(2)  # where it crashed stands in the log
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        print(f"=== {group.name}, at most {limit:.0f} s", flush=True)
        group.run(Writer(files, group.name, stamp), group.seconds)
        status = 0
    except SystemExit as asked:
        status = asked.code if isinstance(asked.code, int) else 1
    except BaseException as error:  # it must not get to what the parent does next
        traceback.print_exc()
        with contextlib.suppress(BaseException):
            files.write(group.name, "error", False, note=first_line(error))
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(status)


def first_line(error: BaseException) -> str:
    """The error in a line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def say(row: dict) -> str:
    """A row in a line: ``route 48,5,2 ok 3e-7``, or what is wrong."""
    if "skipped" in row:
        return f"{row['name']} skipped: {row['skipped']}"
    if "text" in row:
        detail = row["text"]
    elif "note" in row:
        detail = row["note"]
    else:
        error = row.get("error")
        detail = f"{error:.0e}".replace("e-0", "e-") if isinstance(error, float) else ""
    return f"{row['name']} {'ok' if row['ok'] else 'FAILED'} {detail}".rstrip()


def table(rows: Sequence[dict], ended: dict[str, str], characters: int) -> str:
    """Of a run: failures first, then how groups ended, then results as far as there is room."""
    results = [row for row in rows if is_result(row)]
    failed = [row for row in results if not row["ok"]]
    skipped = [row for row in results if "skipped" in row]
    passed = [row for row in results if row["ok"] and "skipped" not in row]
    head = [f"{len(failed)} failed, {len(passed)} ok, {len(skipped)} skipped"]
    head += [f"{row['group']}: {say(row)}"[:300] for row in failed]
    head += [f"{name}: {status}" for name, status in ended.items() if status != "ok"]
    told = [row for row in (*skipped, *passed) if not row.get("quiet")]
    return _within([*head, "", *(f"{row['group']}: {say(row)}" for row in told)], characters)


def _within(text: Sequence[str], characters: int) -> str:
    """The first lines, as many as fit, and how many do not."""
    kept, left = [], characters - 40
    for index, line in enumerate(text):
        left -= len(line) + 1
        if left < 0:
            return "\n".join([*kept, f"... and {len(text) - index} more lines in the file"])
        kept.append(line)
    return "\n".join(kept)


def plan(groups: Sequence[Group], seconds: float) -> str:
    """What would be run, and for how long at most."""
    scale, left, text = scale_of(groups, seconds), seconds, []
    for index, group in enumerate(groups):
        limit = limit_of(groups, index, left, scale)
        text.append(
            f"{group.name:16} planned {group.seconds * scale:4.0f} s, at most {limit:4.0f} s  "
            f"{group.about}".rstrip()
        )
        left -= group.seconds * scale
    return "\n".join(text)


NO_GPU = 2  # exit status of a group, and of a command, that finds no GPU


def arguments(name: str, about: str, seconds: float) -> argparse.ArgumentParser:
    """The options that both parts have."""
    parser = argparse.ArgumentParser(prog=name, description=about)
    parser.add_argument("--seconds", type=float, default=seconds, help="for all of it")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for results")
    parser.add_argument("--cache", type=Path, help="Triton's cache folder, as precompile filled it")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    return parser


def some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """The type of an argument that names some of these, with commas between."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(names):
            got = ", ".join(sorted(unknown))
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(names)}, got {got}")
        return chosen

    return parse


def begun(argv: list[str] | None) -> float:
    """When a command began, by the monotonic clock. Its process did, unless it was called with
    arguments: imports, seconds long, are part of its time."""
    now = time.monotonic()
    if argv is not None:
        return now
    try:
        ticks = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, IndexError, ValueError):
        return now
    return now - max(0.0, uptime - int(ticks) / os.sysconf("SC_CLK_TCK"))


def command(
    args: argparse.Namespace,
    part: str,
    groups: Sequence[Group],
    stamp: Callable[[], dict],
    start: float,
    runner: Runner | None = None,
) -> int:
    """What both parts do with their groups: the exit status. start: when, by the clock."""
    if args.dry_run:
        print(plan(groups, args.seconds))
        return 0
    if args.cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(args.cache.resolve())
    records.commit(), records.driver()  # asked once; the forked processes know them
    files = Files(args.out.resolve(), part)
    before = len(jsonl.read(files.rows))
    ended = run_groups(groups, args.seconds, files, stamp, runner, start=start)
    rows = latest(jsonl.read(files.rows)[before:])
    print(table(rows, ended, CHARACTERS - 60 * len(groups)), flush=True)
    if f"failed with status {NO_GPU}" in ended.values():
        print("no GPU: torch.cuda.is_available() is False")
        return NO_GPU
    return 0 if all(row["ok"] for row in rows) else 1
