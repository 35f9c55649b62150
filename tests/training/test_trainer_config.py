import json
import re

import pytest

from hubpath_fast.training import TrainerConfig


def test_a_round_trip_through_json_keeps_every_setting():
    config = TrainerConfig(
        steps=90, schedule="steps", milestones=[30, 60], optimizer="sgd", nesterov=True, lr_head=1
    )
    assert TrainerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.milestones == (30, 60)
    assert config.replace(steps=100).steps == 100


def test_a_file_that_names_the_metric_of_the_one_task_there_was_opens():
    old = {**TrainerConfig(steps=7).to_dict(), "metric": "accuracy", "metric_mode": "max"}
    assert TrainerConfig.from_dict(old) == TrainerConfig(steps=7)
    other = TrainerConfig.from_dict({**old, "metric": "loss", "metric_mode": "min"})
    assert (other.metric, other.metric_mode) == ("loss", "min")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 2.5}, "steps: expected an integer of at least 1, got 2.5"),
        ({"optimizer": "adam"}, "optimizer: expected one of adamw, sgd, got 'adam'"),
        ({"lr_router": float("nan")}, "lr_router: expected a number of at least 0, got nan"),
        ({"momentum": 1.5}, "momentum: expected a number from 0 to 1, got 1.5"),
        ({"clip_norm": 0}, "clip_norm: expected a number above 0, or None, got 0"),
        ({"patience": 0}, "patience: expected an integer of at least 1, or None, got 0"),
        ({"accumulate": 49}, "accumulate: expected an integer in 1..48 (batch_size), got 49"),
        (
            {"milestones": (5, 5), "schedule": "steps"},
            "milestones: expected increasing integers in 1..1999 (below steps), got [5, 5]",
        ),
        ({"milestones": 5, "schedule": "steps"}, "milestones: expected a list, each an integer"),
        ({"milestones": (2000,), "schedule": "steps"}, "in 1..1999 (below steps), got [2000]"),
        ({"schedule": "steps"}, "got [] with schedule=steps"),
        ({"milestones": (5,)}, "got [5] with schedule=one-cycle"),
        ({"warmup_steps": 2001}, "warmup_steps: expected an integer in 0..2000 (steps), got 2001"),
        ({"nesterov": True}, "nesterov: expected False unless optimizer=sgd"),
        ({"cycle_momentum": True, "schedule": "cosine"}, "False unless schedule=one-cycle"),
        ({"device": "tpu0"}, "device: expected cpu, cuda, cuda:0, ..., got 'tpu0'"),
        ({"metric": ""}, "metric: expected the name of a result, or None, got ''"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_what_is_allowed(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainerConfig(**settings)
