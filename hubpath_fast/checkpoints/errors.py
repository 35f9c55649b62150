"""What is wrong with a checkpoint, in a sentence that says what to do."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from safetensors import SafetensorError

from .layout import CONFIG_FILE, STATE_FILE


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model or configuration."""


def damaged(path: Path, reason: str = "") -> CheckpointError:
    """reason: of those that read it; torch's is about its own insides."""
    reason = f" ({reason.splitlines()[0]})" if reason else ""
    folder = path.parent
    if not (folder / CONFIG_FILE).exists() and (folder.parent / CONFIG_FILE).exists():
        folder = folder.parent  # of an expert's file, or the optimizer's
    remedy = f"restore {folder} from a copy"
    if (folder / STATE_FILE).exists():
        remedy += ", or delete it and resume, which makes it again"
    return CheckpointError(f"{path} is truncated or damaged{reason}; {remedy}")


def unreadable(error: Exception, path: Path) -> CheckpointError:
    """What a user can do about an error from reading one of a checkpoint's files."""
    if isinstance(error, CheckpointError):
        return error
    number = errno_of(error)
    if not path.exists():
        return CheckpointError(f"{path} is missing; the checkpoint is not whole")
    if number is not None:
        return CheckpointError(f"{path} cannot be read: {os.strerror(number)}")
    return damaged(path, str(error) if isinstance(error, SafetensorError) else "")


def errno_of(error: BaseException) -> int | None:
    """The operating system's error behind ``error``: torch and safetensors wrap it in their own.
    None of one that all ranks know: it is said already, and on which rank."""
    if getattr(error, "agreed", False):
        return None
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError):
            return chain.errno or errno.EIO
        found = re.search(r"os error (\d+)", str(chain))
        if found and isinstance(chain, SafetensorError):
            return int(found.group(1))
        chain = chain.__cause__ or chain.__context__
    return None
