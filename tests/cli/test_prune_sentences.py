"""What ``hubpath prune`` says of an elimination."""

from hubpath_fast.cli.prune import sentences
from hubpath_fast.cli.shelf.prune import unmeasured
from hubpath_fast.tasks import Classification

METRIC = Classification.metric


def loss(value, lost):
    return {"value": value, "lost": lost, "interval": (lost - 1, lost + 1)}


def found(best, left, count=30):
    """Of a hub of so many experts that is right on 90 %, of which the first ``left`` stay."""
    names = [f"e{i}" for i in range(count)]
    chosen = {"kept": names[:left], "dropped": names[left:], "validation": loss(0.9, 0.0)}
    return {
        "experts": [{"name": name, "removable": True} for name in names],
        "images": 600,
        "value": 0.9,
        "points": 0.5,
        "best": best,
        "chosen": {**chosen, "test": None},
    }


def test_a_smaller_hub_that_is_better_than_all_is_told():
    best = {"left": 10, **loss(0.92163, -2.1630001)}
    first, second, _ = sentences(found(best, 3), METRIC)
    assert first == (
        "10 experts do better than all 30: accuracy 92.2 % instead of 90.0 %, 2.16 points gained "
        "on 600 validation images (95 % interval 1.16 to 3.16); --points -2.163 proposes the "
        "smallest hub that gains as much"
    )
    assert second.startswith("the smallest hub within 0.5 points has 3 of 30 experts: e0, e1, e2; ")


def test_it_is_not_told_again_where_it_is_proposed():
    best = {"left": 3, **loss(0.92, -2.0)}
    first, _ = sentences(found(best, 3), METRIC)
    assert first.startswith("the smallest hub")


def test_many_names_are_counted():
    first, _ = sentences(found(None, 3), METRIC)
    assert "; dropped: 27 experts (see prune.json); " in first
    first, _ = sentences(found(None, 3, count=19), METRIC)
    assert "dropped: e3, e4, e5" in first


def confirmation(points, lost, confirmed):
    result = {**found(None, 3), "points": points}
    test = {"images": 800, "hub": 0.9, **loss(0.9 - lost / 100, lost), "confirmed": confirmed}
    return sentences({**result, "chosen": {**result["chosen"], "test": test}}, METRIC)[-1]


def test_test_images_confirm_what_was_asked_for_in_words():
    assert confirmation(0.5, -1.5625, True) == (
        "accuracy 91.6 % instead of 90.0 %, 1.56 points gained on 800 test images (95 % interval "
        "0.56 to 2.56); confirmed: lost at most 0.5 there, too"
    )
    assert confirmation(0.5, 2.0, False).endswith(
        "2.00 points lost on 800 test images (95 % interval 1.00 to 3.00); not confirmed: "
        "more than 0.5 lost there"
    )
    assert confirmation(-1.0, 0.0, False).endswith("not confirmed: less than 1 gained there")
    assert confirmation(-1.0, -2.0, True).endswith("confirmed: gained at least 1 there, too")


def test_points_finer_than_an_image_are_said():
    assert unmeasured({"images": 24, "points": 0.5}) == [
        "one of 24 validation images is 4.2 points, so 0.5 cannot be measured: on balance no "
        "image may be lost"
    ]
    [said] = unmeasured({"images": 24, "points": -0.5})
    assert said.endswith("on balance an image must be gained")
    assert unmeasured({"images": 200, "points": 0.5}) == []
    assert unmeasured({"images": 24, "points": 0.0}) == []
