"""What tests of exports share."""

from __future__ import annotations

import json

import pytest

from hubpath_fast.serving import proof, run_package


@pytest.fixture
def asked_here(monkeypatch):
    """Packages are asked in this process: a fresh one takes seconds to import torch."""

    def ask(room):
        run_package.ask(room, json.loads((room / "job.json").read_text()))

    monkeypatch.setattr(proof, "run_isolated", ask)
