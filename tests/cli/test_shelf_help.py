"""What ``hubpath shelf`` says of its commands and of their options."""

from __future__ import annotations

import re

import pytest
from support.command import hubpath

COMMANDS = ("extract", "rank", "fit", "compare", "prune", "add", "predict", "unfreeze", "demo")


def test_the_list_of_commands_has_a_whole_sentence_of_each():
    told = hubpath("shelf", "--help").stdout
    listed = re.findall(r"^  ([a-z]+)  +(\S.*)$", told.partition("Commands:")[2], re.MULTILINE)
    assert tuple(name for name, _ in listed) == COMMANDS
    assert [text for _, text in listed if not text.endswith(".") or text.endswith("...")] == []


def test_fit_says_what_holds_where_nothing_is_given():
    whole = hubpath("shelf", "fit", "--help").stdout
    told = " ".join(whole.split())
    assert "active experts of each image; default: 2" in told
    assert "default: 32, or all where there are fewer" in told
    assert "peak learning rate of the experts' heads; default: 0.003" in told
    assert "--device <str> cpu, cuda, cuda:1, ...; default: cpu" in told
    assert "None" not in told
    assert len(re.findall(r"^  --[a-z]", whole, re.MULTILINE)) <= 12 + 1  # and --help


@pytest.mark.parametrize("command", COMMANDS)
def test_no_help_begins_in_the_middle_of_a_sentence(command):
    """As "of the folds" does, which only the option's name completes."""
    told = " ".join(hubpath("shelf", command, "--help").stdout.split())
    assert re.findall(r"--[a-z-]+ (?:<[^>]*>|[A-Z]+) of .{20}", told) == []
