"""Bytes as text."""

from __future__ import annotations

import pytest

from hubpath_fast.executors.resident import read_room
from hubpath_fast.sizes import bytes_text, parse_bytes, parse_count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GB", 80 * 10**9),
        ("16GiB", 16 * 2**30),
        ("8000000000", 8 * 10**9),
        (7, 7),
        ("1.5 MiB", 3 * 2**19),
        (" 2TB ", 2 * 10**12),
        ("12B", 12),
        ("0.1GB", 10**8),  # exact, although 0.1 is no float
        ("9007199254740993B", 9007199254740993),
    ],
)
def test_bytes_are_read_with_their_unit(text, count):
    assert parse_bytes("memory", text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "80 G", "80gb", "0GB", "1e9", 0, -5, True, 2.5])
def test_other_text_is_refused_by_name(text):
    with pytest.raises(ValueError, match=r"^memory: expected bytes such as '80GB'.*got"):
        parse_bytes("memory", text)


def test_bytes_read_well():
    assert bytes_text(3 * 2**29) == "1.50 GiB"
    assert bytes_text(2**20) == "1.0 MiB"
    assert bytes_text(2**9) == "0.5 KiB"


def test_a_room_is_bytes_with_a_unit_and_experts_without():
    assert read_room("8GB") == (8 * 10**9, None)
    assert read_room("8") == read_room(8) == (None, 8)
    for wrong in ("8 experts", 0, "0MB", None, True):
        with pytest.raises(ValueError, match=r"^room: expected bytes .* or a number of experts"):
            read_room(wrong)


@pytest.mark.parametrize(
    ("text", "count"),
    [("50M", 50 * 10**6), ("1.5 K", 1500), ("2B", 2 * 10**9), ("2G", 2 * 10**9), ("7", 7), (7, 7)],
)
def test_counts_are_read_with_their_unit(text, count):
    assert parse_count("parameters", text) == count


@pytest.mark.parametrize("text", ["", "M", "-1M", "0", "0.5", "50MB", "50m", 0, True, 2.5])
def test_other_counts_are_refused_by_name(text):
    with pytest.raises(ValueError, match=r"parameters: expected a count such as 50000 or '50M'"):
        parse_count("parameters", text)
