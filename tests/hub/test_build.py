"""Names to experts: heads, normalisation, sizes, and every problem reported at once."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch

from hubpath_fast.hub import (
    HubError,
    Resized,
    build_experts,
    create_model,
    default_input_size,
)
from hubpath_fast.hub.registry import find
from hubpath_fast.hub.weights import HASH_IN_NAME

TINY = ["test_resnet", "timm/test_efficientnet", "test_byobnet.r160_in1k"]


def test_heads_are_replaced_and_outputs_have_the_tasks_size():
    for expert in build_experts(TINY, 7, pretrained=False, input_size=32):
        assert expert.body.get_classifier().out_features == 7
        assert expert.module.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_names_are_completed_by_timms_default_tag():
    assert find("test_resnet").name == "timm/test_resnet.r160_in1k"
    assert find(" timm/resnet50.a2_in1k ").name == "timm/resnet50.a2_in1k"
    assert find("resnet50.a2_in1k").weights.repository == "timm/resnet50.a2_in1k"


def test_weights_that_are_not_on_the_hub_have_an_address():
    weights = find("gcvit_tiny.in1k").weights
    assert weights.repository is None
    assert weights.origin().startswith("https://github.com/")
    assert HASH_IN_NAME.search("resnet18-5c106cde.pth").group(1) == "5c106cde"
    assert HASH_IN_NAME.search("swin_tiny_patch4_window7_224.pth") is None


def test_default_input_size_is_the_most_frequent_and_then_the_smallest():
    assert default_input_size(TINY) == 160
    assert default_input_size(["resnet50.a1_in1k", *TINY]) == 160
    assert default_input_size(["resnet50.tv_in1k", "test_resnet"]) == 160
    assert default_input_size(["resnet50.tv_in1k", "resnet18.tv_in1k", "test_resnet"]) == 224


def test_an_architecture_of_one_size_resizes_inside():
    flexible, fixed = build_experts(
        ["test_resnet", "levit_128s"], 4, pretrained=False, input_size=64
    )
    assert not isinstance(flexible.module, Resized)
    assert (flexible.size, fixed.size) == (64, 224)
    assert isinstance(fixed.module, Resized)
    images = torch.randn(2, 3, 64, 64)
    enlarged = torch.nn.functional.interpolate(images, (224, 224), mode="bicubic", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(fixed.module.eval()(images), fixed.body(enlarged))


def test_any_architecture_resizes_inside_on_request():
    [expert] = build_experts(
        ["test_resnet"], 4, pretrained=False, input_size=32, resize_to_native=True
    )
    assert (expert.size, expert.module.size) == (160, 160)
    [expert] = build_experts(["test_resnet"], 4, pretrained=False, resize_to_native=True)
    assert not isinstance(expert.module, Resized)


def test_resized_leaves_the_right_size_alone():
    x = torch.randn(1, 3, 8, 8)
    assert Resized(torch.nn.Identity(), 8)(x) is x


def test_all_problems_come_together_and_before_any_download(no_network):
    names = ["resnet5", "test_resnet", "resnet50.nope", "mocc/resnet50", "inception_v3", "resnet5"]
    with pytest.raises(HubError) as caught:
        build_experts(names, 5, input_size=32)
    closest, tag, source, size = caught.value.problems  # 'resnet5' is reported once
    assert "no model 'resnet5'; did you mean resnet50" in closest
    assert "no weights 'nope' for 'resnet50'" in tag
    assert "resnet50.a1_in1k" in tag
    assert "unknown source 'mocc'" in source
    assert "timm/inception_v3.tv_in1k refuses images of 32 x 32" in size
    assert "it takes, for example, 96, 112, 128" in size
    assert "the hub has 4 problems" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.problems, str(again)) == (caught.value.problems, str(caught.value))
    assert not (no_network / "hf").exists()


def test_a_name_like_no_other_gets_a_way_to_search():
    with pytest.raises(HubError, match="hubpath hub list WORD"):
        find("zzqqxx")


def test_a_model_without_weights_is_a_problem_only_when_they_are_wanted(no_network):
    name = next(n for n in timm.list_models("resnet*") if not timm.models.is_model_pretrained(n))
    with pytest.raises(HubError, match=r"no pre-trained weights.*--no-pretrained"):
        build_experts([name], 5, input_size=64)
    [expert] = build_experts([name], 5, pretrained=False, input_size=64)
    assert expert.name.startswith(f"timm/{name}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": "test_resnet"}, "names: expected a sequence of names .*got 'test_resnet'"),
        ({"num_outputs": 0}, "num_outputs: expected .* got 0"),
        ({"input_size": 0}, "input_size: expected .* got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_experts(**({"names": TINY, "num_outputs": 3} | arguments))


def test_create_model_is_a_hub_pathway_on_raw_images():
    model = create_model(TINY, num_outputs=6, k=2, pretrained=False, input_size=32)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    output = model(images)
    assert output.prediction.shape == (8, 6)
    assert output.expert_outputs.shape == (16, 6)
    model.eval()
    with torch.no_grad():
        # Bytes and the same images as floats are one input, up to the rounding of float32.
        torch.testing.assert_close(model(images), model(images.float() / 255), atol=1e-5, rtol=1e-5)


def test_create_model_takes_experts_that_are_built():
    experts = build_experts(TINY, 6, pretrained=False, input_size=32)
    model = create_model(experts, num_outputs=6, k=1, min_group=3)
    assert [*model.experts] == [expert.module for expert in experts]
    assert (model.k, model.min_group) == (1, 3)


def test_create_model_checks_k_before_it_builds(no_network):
    with pytest.raises(ValueError, match=r"k: expected an integer in 1\.\.3 .* got 4"):
        create_model(TINY, 6, k=4)
