"""Settings: checked where they are made, compared without what is free, and plain in JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from hubpath_fast.fields import Settings, differences, leaves, setting


@dataclass(frozen=True)
class Inner(Settings):
    steps: int = setting(10, "updates", low=1)
    rate: float = setting(0.5, "of learning", above=0)
    log_every: int = setting(5, "steps between lines", low=1, free=True)


@dataclass(frozen=True)
class Outer(Settings):
    hub: tuple[str, ...] = setting(help="names of models")
    k: int = setting(2, "active experts", low=1, high=5)
    share: float = setting(0.1, "held out", low=0, below=1)
    size: int | None = setting(None, "pixels a side", low=1)
    kind: str = setting("linear", "of the aggregator", choices=("linear", "mlp"))
    flip: bool = setting(True, "mirror half of the images")
    clip: float | None = setting(None, "largest norm", above=0, finite=False)
    workers: int = setting(0, "processes", low=0, free=True)
    inner: Inner = setting(Inner, "of the trainer")

    def check(self):
        if self.k > len(self.hub):
            raise ValueError(f"k: expected at most {len(self.hub)} (the hub), got {self.k}")

    @classmethod
    def upgrade(cls, values):
        return {"kind" if name == "aggregator" else name: values[name] for name in values}


HUB = ["a", "b", "c"]

REFUSED = {
    "k": (9, "k: expected an integer in 1..5, got 9"),
    "share": (1.0, "share: expected a number of at least 0 and below 1, got 1.0"),
    "size": (0, "size: expected an integer of at least 1, or None, got 0"),
    "kind": ("tree", "kind: expected one of linear, mlp, got 'tree'"),
    "flip": (1, "flip: expected True or False, got 1"),
    "clip": (float("nan"), "clip: expected a number above 0, or None, got nan"),
    "workers": (True, "workers: expected an integer of at least 0, got True"),
    "hub": ("a,b", "hub: expected a list, each text, got 'a,b'"),
    "inner": ({"steps": 0}, "steps: expected an integer of at least 1, got 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_is_not_allowed_is_refused_by_name(name):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=r"expected") as caught:
        Outer.from_dict({"hub": HUB, name: value})
    assert str(caught.value) == message


def test_values_are_kept_in_one_form():
    made = Outer(hub=HUB, share=0, clip=float("inf"), inner={"rate": 1})
    assert made.hub == ("a", "b", "c")
    assert isinstance(made.share, float)
    assert made.clip == float("inf")
    assert made.inner == Inner(rate=1.0)


def test_settings_survive_a_trip_to_json():
    made = Outer(hub=HUB, k=3, size=64, inner=Inner(steps=7))
    values = json.loads(json.dumps(made.to_dict()))
    assert values["hub"] == HUB
    assert values["inner"] == {"steps": 7, "rate": 0.5, "log_every": 5}
    assert Outer.from_dict(values) == made
    assert made.replace(k=1).k == 1


def test_what_several_settings_must_be_together_is_checked_too():
    with pytest.raises(ValueError, match=r"k: expected at most 1 \(the hub\), got 2"):
        Outer(hub=["a"])


def test_unknown_and_missing_names_are_told():
    with pytest.raises(ValueError, match="unknown setting 'worker'; closest: workers"):
        Outer.from_dict({"hub": HUB, "worker": 1})
    with pytest.raises(ValueError, match="unknown setting 'zzz'; known: hub, k"):
        Outer(hub=HUB).replace(zzz=1)
    with pytest.raises(ValueError, match="hub: nothing given"):
        Outer.from_dict({})


def test_an_older_file_opens():
    assert Outer.from_dict({"hub": HUB, "aggregator": "mlp"}).kind == "mlp"


def test_two_runs_are_the_same_but_for_what_is_free():
    made = Outer(hub=HUB)
    free = made.replace(workers=3, inner=made.inner.replace(log_every=1))
    assert free.identity() == made.identity()
    assert made.identity()["inner.steps"] == 10
    assert "workers" not in made.identity()
    other = made.replace(k=1, inner=Inner(steps=11))
    assert differences(made.identity(), other.identity()) == [
        "k: 2 there, 1 now",
        "inner.steps: 10 there, 11 now",
    ]


def test_all_settings_have_dotted_names():
    names = [name for name, _ in leaves(Outer)]
    assert names[:2] == ["hub", "k"]
    assert names[-3:] == ["inner.steps", "inner.rate", "inner.log_every"]


def test_a_setting_that_was_added_counts_where_it_differs_from_its_default():
    """Runs older than it have none, and are as the default says."""

    @dataclass(frozen=True)
    class Grown(Settings):
        steps: int = setting(5)
        mixing: float = setting(0.0, added=True)

    assert Grown().identity() == {"steps": 5}
    assert Grown(mixing=0.2).identity() == {"steps": 5, "mixing": 0.2}
    assert Grown().to_dict() == {"steps": 5, "mixing": 0.0}


@pytest.mark.parametrize("values", [5, "k", ["k"], None])
def test_what_is_no_set_of_settings_is_refused(values):
    with pytest.raises(ValueError, match="expected settings by their names, got"):
        Outer.from_dict(values)
    with pytest.raises(ValueError, match="inner: expected Inner, got 5"):
        Outer.from_dict({"hub": HUB, "inner": 5})


@pytest.mark.parametrize("name", ["share", "clip", "size", "workers"])
def test_integers_that_no_library_takes_are_refused_and_not_written_out(name):
    for value in (10**400, -(10**400), 2**63, 10**5000):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got ") as caught:
            Outer.from_dict({"hub": HUB, name: value})
        assert len(str(caught.value)) < 200
    with pytest.raises(ValueError, match=r"got 10{59}\.\.\. \(401 characters\)$"):
        Outer(hub=HUB, size=10**400)
