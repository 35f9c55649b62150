"""Nested records of plain values, compared."""

from __future__ import annotations

import pytest


def assert_records_close(found, expected, tolerance: float) -> None:
    """Dictionaries and lists of the same values; floats may differ by ``tolerance``."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_records_close(found[key], expected[key], tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_records_close(one, other, tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
    else:
        assert found == expected
