"""The command line as a user types it, in this process."""

from __future__ import annotations

import functools
import json

import typer.testing
from typer.testing import CliRunner

from hubpath_fast.cli import app

# All commands and their options are built once for this process, as for one that a user starts.
typer.testing._get_command = functools.cache(typer.testing._get_command)


def hubpath(*arguments, status: int = 0):
    """What ``hubpath`` with these arguments prints, if it ends with this status."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def refused(*arguments) -> str:
    """What it says of wrong input."""
    return hubpath(*arguments, status=2).stderr


def shown(*arguments) -> dict:
    """The settings of ``hubpath fit`` with these arguments."""
    return json.loads(hubpath("fit", *arguments, "--print-config").stdout)
