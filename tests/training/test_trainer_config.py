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


def test_an_unknown_setting_is_named_with_the_closest():
    with pytest.raises(ValueError, match="'lr_experts'; closest: lr_expert"):
        TrainerConfig.from_dict({"lr_experts": 0.1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number"),
        ({"batch_size": True}, "batch_size=True must be a whole number"),
        ({"optimizer": "adam"}, "optimizer='adam' must be one of adamw, sgd"),
        ({"schedule": "linear"}, "schedule='linear' must be one of one-cycle, steps"),
        ({"amp": "fp16"}, "amp='fp16' must be one of none, bf16"),
        ({"lr_expert": -1}, "lr_expert=-1 must be a number of at least 0"),
        ({"lr_router": float("nan")}, "lr_router=nan must be a number"),
        ({"lr_head": "x"}, "lr_head='x' must be a number"),
        ({"momentum": 1.5}, "momentum=1.5 must be a number between 0 and 1"),
        ({"clip_norm": 0}, "clip_norm=0 must be a number above 0, or None"),
        ({"patience": 0}, "patience=0 must be a whole number of at least 1"),
        ({"accumulate": 49}, "accumulate=49 cuts a batch of batch_size=48"),
        ({"milestones": (5, 5), "schedule": "steps"}, "milestones=(5, 5) must be increasing"),
        ({"milestones": 5, "schedule": "steps"}, "milestones=5 must be increasing"),
        ({"milestones": (1000,), "schedule": "steps"}, "between 1 and 999 (steps is 1000)"),
        ({"schedule": "steps"}, "needs at least one"),
        ({"milestones": (5,)}, 'milestones belong to schedule="steps"'),
        ({"warmup_steps": 1001}, "warmup_steps=1001 is longer than steps=1000"),
        ({"nesterov": True}, 'needs optimizer="sgd"'),
        ({"cycle_momentum": True, "schedule": "cosine"}, 'belongs to schedule="one-cycle"'),
        ({"device": "tpu0"}, "device='tpu0' is none that torch knows"),
        ({"metric": ""}, "metric='' must be the name"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_what_is_allowed(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainerConfig(**settings)
