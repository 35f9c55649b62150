"""Knowledge Flow against a forward pass written out layer by layer, and its losses by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.images import RandomImages, check_resuming
from support.training import QUIET
from torch import nn

from hubpath_fast.baselines.knowledge_flow import (
    KnowledgeFlow,
    KnowledgeFlowObjective,
    knowledge_flow_groups,
)
from hubpath_fast.baselines.single import SingleModel
from hubpath_fast.hub import Expert, ExpertSpec, build_experts
from hubpath_fast.tasks import Classification
from hubpath_fast.training import Trainer, TrainerConfig

TASK = Classification(("a", "b", "c", "d"))
batch = RandomImages().batch
STAGES = ("act1", "layer1", "layer2", "layer3", "layer4")


def hub(names=("test_resnet",) * 2):
    torch.manual_seed(0)
    experts = build_experts(names, 4, pretrained=False, input_size=32)
    for expert in experts:  # statistics that are not those of any batch
        for layer in expert.module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
    return experts


def stages(net, x, mix=lambda depth, own: own):
    """timm's test_resnet written out; ``mix`` takes each stage's output and gives the next input.

    -> logits, and the stages' outputs before mixing."""
    outputs = []
    for depth, stage in enumerate(STAGES):
        if depth == 0:
            x = net.act1(net.bn1(net.conv1(x)))
        else:
            x = getattr(net, stage)(net.maxpool(x) if depth == 1 else x)
        outputs.append(x)
        x = mix(depth, x)
    return net.fc(x.mean((2, 3))), outputs


def normalised(expert, images):
    mean, std = (torch.tensor(v).view(3, 1, 1).double() for v in (expert.mean, expert.std))
    return (images / 255.0 - mean) / std


def random_mixture(model):
    for parameter in (model.flow.logits, *model.flow.projections.parameters()):
        nn.init.normal_(parameter, std=0.3)
    model.remember()


def test_the_mixture_is_the_formula_layer_by_layer():
    """In float64, with batch statistics in the student and running ones in the teachers; rounding
    and another order of sums leave some 1e-12."""
    experts = hub(("test_resnet",) * 3)
    experts[2].mean, experts[2].std = (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)
    model = KnowledgeFlow(experts, student=1).double().train()
    random_mixture(model)
    assert model.layers == STAGES
    images, _ = batch(0)
    images = images.double() / 255

    taught = []
    for expert in experts:
        net = copy.deepcopy(expert.module).double().eval()
        taught.append(stages(net, normalised(expert, 255 * images))[1])

    def mix(depth, own):
        e = model.flow.logits[depth].exp()
        total = e[0] / e.sum() * own
        for t in range(3):
            matrix = model.flow.projections[depth][t].weight[:, :, 0, 0]
            moved = torch.einsum("ij,njhw->nihw", matrix, taught[t][depth])
            total = total + e[1 + t] / e.sum() * moved
        return total

    own = copy.deepcopy(experts[1].module).double().train()
    expected, _ = stages(own, normalised(experts[1], 255 * images), mix)
    prediction = model(images)
    torch.testing.assert_close(prediction, expected, rtol=1e-9, atol=1e-10)

    parameters = [model.flow.logits, model.flow.projections[2][1].weight]
    wanted = torch.autograd.grad(expected.square().sum(), [*parameters, own.conv1[0].weight])
    model.zero_grad()
    prediction.square().sum().backward()
    mine = [*(p.grad for p in parameters), model.student.module.conv1[0].weight.grad]
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_it_starts_as_half_student_and_untouched_projections():
    model = KnowledgeFlow(hub(("test_resnet",) * 3))
    torch.testing.assert_close(model.weights(), torch.tensor([[0.5, 1 / 6, 1 / 6, 1 / 6]] * 5))
    x = torch.randn(2, 48, 3, 3)
    assert torch.equal(model.flow.projections[2][1](x), x)
    assert len(model.flow.projections) == 5


def test_evaluation_is_the_student_alone():
    experts = hub()
    model = KnowledgeFlow(experts, student=1).eval()
    random_mixture(model)
    model.flow.projections[0][0].register_forward_hook(lambda *_: pytest.fail("mixed"))
    for teacher in model.teachers:
        teacher.register_forward_hook(lambda *_: pytest.fail("a teacher ran"))
    images, _ = batch(0)
    with torch.no_grad():
        alone = SingleModel(experts[1]).eval()(images)
        assert torch.equal(model(images), alone)
        assert torch.equal(model(images / 255), alone)


def test_images_have_as_many_channels_as_the_experts_take():
    """Four grey frames, say; the teachers' outputs are those of a plain forward pass."""
    experts = []
    for _ in range(2):
        module = nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Conv2d(3, 5, 3), nn.Flatten())
        experts.append(Expert("frames", module.double(), (0.25,) * 4, (0.5,) * 4, 6))
    model = KnowledgeFlow(experts).double().train()
    assert model.layers == ("1", "2")
    random_mixture(model)
    images = torch.rand(2, 4, 6, 6, dtype=torch.float64)
    w, q, x = model.weights(), model.flow.projections, (images - 0.25) / 0.5
    ends = [expert.module[0](x).relu() for expert in experts]
    taught = [expert.module[2](end) for expert, end in zip(experts, ends, strict=True)]
    h = w[0, 0] * ends[0] + sum(w[0, 1 + t] * q[0][t](ends[t]) for t in range(2))
    h = experts[0].module[2](h)
    h = w[1, 0] * h + sum(w[1, 1 + t] * q[1][t](taught[t]) for t in range(2))
    torch.testing.assert_close(model(images), h.flatten(1), rtol=1e-9, atol=1e-10)


def test_teachers_stay_as_they_are_and_out_of_checkpoints():
    experts = hub()
    model = KnowledgeFlow(experts).train()
    before = [copy.deepcopy(teacher.state_dict()) for teacher in model.teachers]
    objective = KnowledgeFlowObjective(TASK, 10)
    objective(model, *batch(0)).total.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    for old, teacher in zip(before, model.teachers, strict=True):
        assert not any(module.training for module in teacher.modules())
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, old[name]), name
    assert not any("teacher" in name for name in model.state_dict())
    originals = [p for expert in experts for p in expert.module.parameters()]
    assert all(p.requires_grad and p.grad is None for p in originals)
    ids = {id(p) for p in model.parameters()}
    assert not ids & {id(p) for p in originals}
    assert all(p.dtype == torch.float64 for t in model.double().teachers for p in t.parameters())


def test_the_losses_by_hand():
    """Step 0: no dependency yet, and nothing has changed. Then of 10 steps 5 is RISE, so that the
    batch after 2 others has 2/5 of the weight; the KL is that to the flow before the update."""
    model = KnowledgeFlow(hub()).double().train()
    random_mixture(model)
    objective = KnowledgeFlowObjective(TASK, steps=10, dependency=0.7, keep=1.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    old = None
    for step in range(3):
        images, targets = batch(step)
        twin = copy.deepcopy(model)
        logits = twin(images)
        task = -logits.log_softmax(1)[range(6), targets].mean()
        w = twin.weights()
        dependency = -(w[0, 0] * w[1, 0] * w[2, 0] * w[3, 0] * w[4, 0]).log()
        p = (logits if old is None else old(images)).softmax(1).detach()
        keep = (p * (p.log() - logits.log_softmax(1))).sum() / 6
        total = task + 0.7 * (step / 5) * dependency + 1.3 * keep
        old = copy.deepcopy(model)

        losses = objective(model, images, targets)
        expected = {"task": task, "dependency": dependency, "keep": keep}
        for name, value in expected.items():
            torch.testing.assert_close(losses.parts[name], value, rtol=1e-9, atol=1e-12)
        # 2/5 is a float32 in the objective, as the count is no float64.
        torch.testing.assert_close(losses.total, total, rtol=1e-7, atol=1e-12)
        own = (-dependency / 5).exp()
        torch.testing.assert_close(losses.parts["own"], own, rtol=1e-9, atol=0)
        assert (losses.parts["keep"] > 1e-6) == (step > 0)
        total.backward()
        optimizer.zero_grad()
        losses.total.backward()
        theirs = dict(twin.named_parameters())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(
                    parameter.grad, theirs[name].grad, rtol=1e-7, atol=1e-9, msg=name
                )
        optimizer.step()


def test_the_dependency_rises_over_half_the_micro_batches_and_stays():
    model = KnowledgeFlow(hub(), layers=["layer3"]).train()
    objective = KnowledgeFlowObjective(TASK, steps=4, dependency=2.0, keep=0.0, accumulate=2)
    seen = []
    for _ in range(6):
        losses = objective(model, *batch(0))
        seen.append(((losses.total - losses.parts["task"]) / losses.parts["dependency"]).item())
    assert seen == pytest.approx([0, 0.5, 1, 1.5, 2, 2], abs=1e-5)
    assert model.batches.item() == 6
    assert losses.parts["keep"].item() == 0


def test_micro_batches_share_the_flow_before_the_last_update():
    model = KnowledgeFlow(hub(), layers=["layer3"]).train()
    objective = KnowledgeFlowObjective(TASK, steps=4, accumulate=2)
    kept = []
    for step in range(2):
        for part in range(2):
            kept.append(objective(model, *batch(part)).parts["keep"].item())
        with torch.no_grad():
            for p in model.student.parameters():
                p += 0.02 * (step + 1)
    assert kept[:2] == pytest.approx([0, 0], abs=1e-6)
    assert min(kept[2:]) > 1e-4


def trainer(folder, steps=5, resume=False, dependency=1.0, **settings):
    model = KnowledgeFlow(hub(), student=1)
    config = TrainerConfig(steps=steps, batch_size=6, **settings)
    objective = KnowledgeFlowObjective(TASK, steps, dependency, accumulate=config.accumulate)
    groups = knowledge_flow_groups(model, config)
    options = {"task": TASK, "reporting": QUIET, "groups": groups, "resume": resume}
    return Trainer(model, objective, RandomImages(), config, folder, **options)


def test_a_resumed_training_ends_with_the_same_weights(tmp_path):
    """In two micro-batches a step, so that both counts have to be taken up."""

    def make(folder, resume):
        return trainer(folder, resume=resume, accumulate=2)

    _, result = check_resuming(make, tmp_path, stop=2)
    assert {"task", "dependency", "keep", "own"} < result.history[-1].keys()


def test_the_weights_move_to_the_student(tmp_path):
    """In 12 steps, by Adam at the logits' own rate; without the dependency they do not."""
    run = trainer(tmp_path / "with", steps=12)
    run.fit()
    assert (run.model.weights()[:, 0] > 0.95).all()
    run = trainer(tmp_path / "without", steps=12, dependency=0.0)
    run.fit()
    assert (run.model.weights()[:, 0] < 0.95).any()


def test_groups_hold_every_parameter_at_its_rate():
    model = KnowledgeFlow(hub())
    config = TrainerConfig(steps=100, lr_expert=1e-3, lr_head=2e-3, lr_router=3e-3)
    groups = knowledge_flow_groups(model, config)
    assert {group.name: group.lr for group in groups} == {
        "experts": 1e-3,
        "heads": 2e-3,
        "projections": 3e-3,
        "weights": 0.2,
    }
    ids = [id(p) for group in groups for p in group.params]
    assert sorted(ids) == sorted(id(p) for p in model.flow.parameters())


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_the_stages_of_a_resnet50(source):
    """The same five of both, also where the last is a single pixel, as pooling leaves it."""
    [expert] = build_experts([f"{source}/resnet50"], 4, pretrained=False, input_size=32)
    model = KnowledgeFlow([expert])
    first = "act1" if source == "timm" else "relu"
    assert model.layers == (first, *STAGES[1:])
    widths = [depth[0].weight.shape[0] for depth in model.flow.projections]
    assert widths == [64, 256, 512, 1024, 2048]


def test_the_stages_of_a_plain_network():
    """Within its only part that makes images: a run of equal shapes ends before its pooling."""
    features = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.AvgPool2d(3, 1, 1),
    )  # fmt: skip
    net = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    experts = build_experts([net], 4, pretrained=False, input_size=8)
    assert KnowledgeFlow(experts).layers == ("0.1", "0.4")


def test_an_activation_in_place_spares_what_was_recorded():
    """bn1's output is overwritten by act1."""
    experts = hub()
    model = KnowledgeFlow(experts, layers=["bn1"]).double().train()
    images = batch(0)[0].double() / 255
    net = copy.deepcopy(experts[1].module).double().eval()
    expected = net.bn1(net.conv1(normalised(experts[1], 255 * images)))
    assert expected.min() < 0
    torch.testing.assert_close(model.teach(images)[0][1], expected, rtol=1e-10, atol=1e-10)


def test_a_teacher_that_works_at_another_size_is_resized_to_the_student():
    experts = hub(["test_resnet", ExpertSpec("test_resnet", size=64)])
    model = KnowledgeFlow(experts).train()
    with torch.no_grad():
        model.flow.logits[:] = torch.tensor([-1e4, -1e4, 0])  # the second teacher alone
    images = batch(0)[0]
    taught = model.teach(images)
    assert [depth[1].shape[-1] for depth in taught] == [32, 16, 8, 4, 2]
    last = F.interpolate(taught[4][1], (1, 1), mode="bilinear").flatten(1)
    torch.testing.assert_close(model(images), model.student.module.fc(last))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"student": 2}, r"student: expected 0\.\.1, got 2"),
        ({"layers": ["layer9"]}, "'layer9' does not run exactly once .* conv1, bn1"),
        ({"layers": ["fc"]}, r"'fc' gives \[1, 4\]"),
        ({"layers": []}, "at least one"),
        ({"layers": ["layer1", "layer1"]}, "none twice"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        KnowledgeFlow(hub(), **options)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ((), "experts: expected at least one teacher, got none"),
        (("test_resnet", "test_byobnet"), "test_resnet.* and .*test_byobnet.* diff"),
        ((ExpertSpec("test_vit", size=160),), "convolutional"),
    ],
)
def test_hubs_without_knowledge_that_flows(names, match):
    experts = hub(names) if names else []
    with pytest.raises(ValueError, match=match):
        KnowledgeFlow(experts)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"dependency": -1}, "dependency"),
        ({"dependency": math.nan}, "dependency: expected a finite weight >= 0, got nan"),
        ({"keep": -1}, "keep"),
        ({"keep": "1"}, "keep: expected a finite weight >= 0, got '1'"),
    ],
)
def test_bad_weights(changes, match):
    with pytest.raises(ValueError, match=match):
        KnowledgeFlowObjective(TASK, **{"steps": 5, **changes})
