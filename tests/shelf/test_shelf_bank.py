"""The heads of all experts in one tensor: what a GPU runs, without one by Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
import triton
from support.host_reads import host_reads
from support.shelves import make_shelf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hubpath_fast as hp
from hubpath_fast.executors.sequential import SequentialExecutor
from hubpath_fast.features import write_shelf
from hubpath_fast.shelf.executor import GroupedHeads
from hubpath_fast.shelf.model import build_hub, join
from hubpath_fast.shelf.placing import SHARE, capacity, place
from hubpath_fast.training import TrainerConfig, build_optimizer
from hubpath_fast.training.optimizer import pathway_groups

pytestmark = pytest.mark.either
M, C, VIEWS, N_ALL = 6, 3, 2, 60
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# After some steps of AdamW at a rate of 1e-2: a gradient that is zero but for its rounding of 1e-16
# to 1e-15 is divided by the epsilon of 1e-8.
TRAINED = {"rtol": 1e-8, "atol": 1e-8}
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of a hundred terms


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank") / "shelf"
    return make_shelf(folder, M, C, (30, 15, 15), views=VIEWS, dtype=torch.float16)


def hub(shelf, models=range(M), placed=True, **options):
    torch.manual_seed(0)
    model = build_hub(shelf, list(models), 2, width=4, **options).double().to(DEVICE)
    nn.init.normal_(model.generator.clean.weight)
    if len(model.experts) > 3:
        model.generator.clean.bias.data[3] = -50.0  # nobody asks expert 3
    model.executor = GroupedHeads("triton")
    if placed:
        place(model, DEVICE, free=2**40)
    return model


def batch(shelf, count=20, seed=1):
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(N_ALL, generator=draw)[:count]
    return (N_ALL + numbers).double().to(DEVICE), shelf.targets[numbers].to(DEVICE)


def step(model, x, y, eps=None):
    """Prediction and total loss of a step, whose gradients are then there."""
    out = model(x, eps, target=y)
    total = hp.HubPathwayLoss(explore=0.7)(out, y).total
    total.backward()
    return out.prediction.detach(), total.detach()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def noise(x, seed=2):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(len(x), M, dtype=torch.float64, generator=draw).to(DEVICE)


def assert_same(found, expected):
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient, **EXACT)


@pytest.mark.parametrize("placed", [True, False], ids=["on the device", "gathered on the host"])
@pytest.mark.parametrize("aggregator", ["linear", "sum"])
def test_outputs_and_gradients_are_the_sequential_experts(shelf, aggregator, placed):
    model = hub(shelf, aggregator=aggregator, placed=placed)
    theirs = copy.deepcopy(model)
    theirs.executor = SequentialExecutor()
    x, y = batch(shelf)
    for expected, found in zip(
        step(theirs, x, y, noise(x)), step(model, x, y, noise(x)), strict=True
    ):
        torch.testing.assert_close(found, expected, **EXACT)
    assert gradients(theirs)["experts.3.layer.weight"] is None
    assert_same(gradients(model), gradients(theirs))


def test_gradients_of_several_backward_passes_add_up_and_zero_grad_forgets_them(shelf):
    model = hub(shelf)
    theirs = copy.deepcopy(model)
    theirs.executor = SequentialExecutor()
    for seed in (1, 2):
        x, y = batch(shelf, count=2, seed=seed)  # of few rows: other experts each time
        step(model, x, y, noise(x, seed)), step(theirs, x, y, noise(x, seed))
    assert_same(gradients(model), gradients(theirs))
    for each in (model, theirs):
        each.zero_grad(set_to_none=True)
        step(each, x, y, noise(x))
    assert_same(gradients(model), gradients(theirs))


def test_frozen_parts_of_heads_get_no_gradient(shelf):
    model = hub(shelf)
    model.experts[0].layer.weight.requires_grad_(False)
    model.experts[1].layer.bias.requires_grad_(False)
    x, y = batch(shelf)
    step(model, x, y, noise(x))
    theirs = copy.deepcopy(model)
    theirs.executor = SequentialExecutor()
    theirs.zero_grad(set_to_none=True)
    step(theirs, x, y, noise(x))
    assert gradients(model)["experts.0.layer.weight"] is None
    assert_same(gradients(model), gradients(theirs))


def test_parameters_stay_what_they_are(shelf):
    """Loaded, copied, moved and replaced ones count at the next call."""
    model = hub(shelf).eval()
    x, _ = batch(shelf)
    theirs = copy.deepcopy(model)
    theirs.executor = SequentialExecutor()

    def same():
        torch.testing.assert_close(model.ask_all(x), theirs.ask_all(x), **EXACT)

    before = list(model.experts.parameters())
    same()
    assert all(a is b for a, b in zip(model.experts.parameters(), before, strict=True))
    state = {name: value + 1 for name, value in theirs.state_dict().items()}
    model.load_state_dict(state), theirs.load_state_dict(state)
    same()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.experts[1].layer.weight.zero_()
    torch.testing.assert_close(copied.ask_all(x), theirs.ask_all(x), **EXACT)
    model.load_state_dict(state, assign=True)
    same()
    for each in (model, theirs):
        each.float().double()  # moves every parameter, of which these have other values now
        each.load_state_dict({name: value + 1 for name, value in state.items()})
    same()
    for each in (model, theirs):
        layer = nn.Linear(each.experts[2].layer.in_features, C).double().to(DEVICE)
        torch.manual_seed(3), layer.reset_parameters()
        each.experts[2].layer = layer
    same()


def test_rows_that_a_policy_drops_are_not_asked_for(shelf):
    model = hub(shelf).eval()
    x, _ = batch(shelf)
    routing = model.route(x).keeping(
        torch.tensor([[True, n % 3 > 0] for n in range(len(x))]).to(DEVICE)
    )
    source = model._row_source(x, routing)
    with torch.no_grad():
        found = model.executor(model.experts, source, 2)
        expected = SequentialExecutor()(model.experts, source, 2)
    assert len(found) < 2 * len(x)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_newcomer_joins_the_others(shelf):
    model = hub(shelf, models=range(M - 1)).eval()
    x, _ = batch(shelf)
    model.ask_all(x)
    join(model, shelf, M - 1)
    model.double().to(DEVICE)
    theirs = copy.deepcopy(model)
    theirs.executor = SequentialExecutor()
    torch.testing.assert_close(model.ask_all(x), theirs.ask_all(x), **EXACT)
    place(model, DEVICE, free=2**40)
    torch.testing.assert_close(model.ask_all(x), theirs.ask_all(x), **EXACT)


def test_predictions_within_inference_mode_leave_parameters_to_be_trained(shelf):
    model = hub(shelf)
    x, y = batch(shelf)
    with torch.inference_mode():
        model.predict(x)
    step(model, x, y, noise(x))
    assert model.experts[0].layer.weight.grad is not None


def trained(model, shelf, steps=5, updating=True, **settings):
    """After some steps of the trainer's optimizer, with rates that change. Optimizer's state."""
    settings = {"weight_decay": 0.1, "decay_bias_and_norm": False, **settings}
    config = TrainerConfig(lr_expert=1e-2, lr_router=1e-2, **settings)
    optimizer = build_optimizer(model, pathway_groups(model, config), config)
    go_on(model, optimizer, shelf, range(steps), updating)
    return optimizer


def go_on(model, optimizer, shelf, steps, updating=True):
    executor = model.executor if updating else SequentialExecutor()
    with executor.updating(model.experts, optimizer):
        for number in steps:
            x, y = batch(shelf, count=3, seed=number)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] / (number + 1)
            optimizer.zero_grad(set_to_none=True)
            step(model, x, y, noise(x, number))
            optimizer.step()


def states(model, optimizer):
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}.{key}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if state["step"] > 0
    }


def assert_same_training(found, expected):
    """(model, optimizer) each."""
    ours, theirs = (dict(model.named_parameters()) for model, _ in (found, expected))
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name], p, **TRAINED)
    ours, theirs = states(*found), states(*expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **TRAINED)


@pytest.mark.parametrize("placed", [True, False], ids=["on the device", "gathered on the host"])
def test_updates_are_those_of_the_optimizer_with_experts_without_rows_left_alone(shelf, placed):
    model = hub(shelf, placed=placed)
    theirs = copy.deepcopy(model)
    theirs.executor = SequentialExecutor()
    optimizers = trained(model, shelf), trained(theirs, shelf)
    counts = {float(optimizers[1].state[h.layer.weight].get("step", 0)) for h in theirs.experts}
    assert len(counts) > 2  # some are asked more often than others
    assert_same_training((model, optimizers[0]), (theirs, optimizers[1]))
    # What goes on without, goes on with torch's own updates.
    go_on(model, optimizers[0], shelf, range(5, 8), updating=False)
    go_on(theirs, optimizers[1], shelf, range(5, 8))
    assert_same_training((model, optimizers[0]), (theirs, optimizers[1]))


def test_a_loaded_state_of_the_optimizer_is_taken_over(shelf):
    """By itself saved and loaded, and from a training on a DEVICE, whose experts that were never
    asked have no state."""
    theirs = hub(shelf)
    theirs.executor = SequentialExecutor()
    optimizer = trained(theirs, shelf)
    model = hub(shelf)
    own = trained(model, shelf, steps=1)
    with model.executor.updating(model.experts, own):
        model.load_state_dict(theirs.state_dict())
        own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        go_on(model, own, shelf, range(5, 7), updating=False)
    go_on(theirs, optimizer, shelf, range(5, 7))
    assert_same_training((model, own), (theirs, optimizer))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_weights_and_biases_go_on_from_their_own_numbers_of_updates(shelf, frozen):
    """After some steps without one of them, in which its optimizer counted none."""
    model = hub(shelf)
    theirs = copy.deepcopy(model)
    theirs.executor = SequentialExecutor()
    optimizers = [trained(each, shelf, steps=0, updating=False) for each in (model, theirs)]
    for each, optimizer in zip((model, theirs), optimizers, strict=True):
        parts = [getattr(head.layer, frozen) for head in each.experts]
        for p in parts:
            p.requires_grad_(False)
        go_on(each, optimizer, shelf, range(3), updating=False)
        for p in parts:
            p.requires_grad_(True)
        go_on(each, optimizer, shelf, range(3, 6))
    assert_same_training((model, optimizers[0]), (theirs, optimizers[1]))


@pytest.mark.parametrize("move", ["data", "to"])
def test_an_update_of_heads_that_were_moved_before_it_is_refused(shelf, move):
    model = hub(shelf)
    config = TrainerConfig()
    optimizer = build_optimizer(model, pathway_groups(model, config), config)
    x, y = batch(shelf)
    with model.executor.updating(model.experts, optimizer):
        step(model, x, y, noise(x)), optimizer.step()
        step(model, x, y, noise(x))
        if move == "data":
            weight = model.experts[1].layer.weight
            weight.data = weight.data.clone()
        else:
            model.float().double()
        with pytest.raises(ValueError, match=r"experts: .* got some moved .* before step\(\)"):
            optimizer.step()


@pytest.mark.parametrize("settings", [{"optimizer": "sgd"}, {}], ids=["sgd", "a frozen head"])
def test_optimizers_that_it_does_not_know_make_their_own_updates(shelf, settings):
    model = hub(shelf)
    if not settings:
        model.experts[1].layer.bias.requires_grad_(False)
    theirs = copy.deepcopy(model)
    theirs.executor = SequentialExecutor()
    optimizers = [trained(each, shelf, **settings) for each in (model, theirs)]
    for (name, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, **TRAINED, msg=name)
    assert len(optimizers[0].state) == len(optimizers[1].state)


def test_a_step_reads_nothing_on_the_host(shelf):
    model = hub(shelf, models=range(1, M), router="features:model0")
    config = TrainerConfig()
    optimizer = build_optimizer(model, pathway_groups(model, config), config)
    x, y = batch(shelf)
    eps = noise(x)[:, 1:]
    with model.executor.updating(model.experts, optimizer):
        step(model, x, y, eps), optimizer.step(), optimizer.zero_grad()
        with host_reads() as found:
            model.executor(model.experts, model._row_source(x, model.route(x, eps)), 2)
        assert found == []
        out = model.executor(model.experts, model._row_source(x, model.route(x, eps)), 2)
        with host_reads() as found:
            out.sum().backward()
        assert found == []
    assert model.executor.host_reads == 0
    assert model.executor_report().host_reads_per_step == 0


def test_gathered_rows_take_one_read_of_the_device(shelf):
    model = hub(shelf, placed=False)
    x, _ = batch(shelf)
    source = model._row_source(x, model.route(x, noise(x)))
    model.executor(model.experts, source, 2)
    source = model._row_source(x, model.route(x, noise(x)))
    with host_reads() as found:
        model.executor(model.experts, source, 2)
    assert found.count("cpu") == 1
    assert source.routing.counts_known


def test_features_that_are_placed_later_are_found(shelf):
    model = hub(shelf, placed=False).eval()
    x, _ = batch(shelf)
    before = model.ask_all(x)
    assert model.executor.bank(model.experts).features is None
    place(model, DEVICE, free=2**40)
    assert torch.equal(model.ask_all(x), before)
    assert model.executor.bank(model.experts).features is not None


@pytest.mark.parametrize("free", [0, 2**40], ids=["gathered on the host", "on the device"])
def test_widths_that_are_read_in_larger_units(tmp_path, free):
    features = {name: torch.randn(9, d).half() for name, d in (("a", 16), ("b", 8), ("c", 24))}
    pixels = torch.zeros(9, 3, 8, 8, dtype=torch.uint8)
    targets = torch.arange(9) % 2
    made = write_shelf(tmp_path / "s", features, targets, ["x", "y"], {"train": 9}, pixels)
    model = build_hub(made, range(3), 2, width=4).double().to(DEVICE).eval()
    place(model, DEVICE, free)
    x = torch.arange(9, device=DEVICE).double()
    expected = model.ask_all(x)
    model.executor = GroupedHeads("triton")
    torch.testing.assert_close(model.ask_all(x), expected, **EXACT)
    assert model.executor.bank(model.experts).table.vec == 8


def test_gathered_rows_come_in_few_sizes():
    sizes = {elements: capacity(elements) for elements in range(1, 5000)}
    assert all(size >= elements for elements, size in sizes.items())
    assert all(size <= elements * 9 / 8 for elements, size in sizes.items() if elements > 128)
    assert len(set(sizes.values())) < 60


def test_features_are_placed_where_they_take_at_most_their_share(shelf):
    model = hub(shelf, placed=False)
    nbytes = sum(h.mapped.nbytes for h in model.experts) + model.generator.mapped.nbytes
    least = int(nbytes / SHARE)
    found = place(model, DEVICE, free=least - 1)
    assert found == (DEVICE, nbytes, least - 1, False)
    assert model.experts[0].placed is None
    assert model.generator.placed is None
    assert place(model, DEVICE, free=least).fits
    assert {h.placed.untyped_storage().data_ptr() for h in model.experts} == {
        model.experts[0].placed.untyped_storage().data_ptr()
    }
    for head in model.experts:
        assert torch.equal(head.placed.cpu(), head.mapped)
    assert torch.equal(model.generator.placed.cpu(), model.generator.mapped)


def test_updates_of_experts_of_another_kind_are_refused():
    experts = [nn.Linear(2, C)]
    optimizer = torch.optim.AdamW(experts[0].parameters())
    with pytest.raises(ValueError, match="expected a FeatureHead"):
        GroupedHeads("triton").updating(experts, optimizer).__enter__()


def test_heads_of_other_dtypes_or_outputs_are_refused(shelf):
    model = hub(shelf).eval()
    x, _ = batch(shelf)
    model.experts[2].float()
    with pytest.raises(ValueError, match=r"experts\[2\]: expected a head of dtype torch.float64"):
        model.ask_all(x)
    model.experts[2].layer = (
        nn.Linear(model.experts[2].layer.in_features, C + 1).double().to(DEVICE)
    )
    with pytest.raises(ValueError, match=r"experts\[2\]: expected 3 outputs"):
        model.ask_all(x)


class TorchLaunches(TorchDispatchMode):
    """Names of torch's own operators that compute something."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        makes = name.startswith(("empty", "new_empty", "detach", "alias", "_unsafe_view"))
        if func.namespace != "hubpath_fast" and not func.is_view and not makes:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_launches_the_same_whatever_the_number_of_experts(tmp_path, monkeypatch):
    """Four; one more where the rate has changed."""
    found = []
    run = type(triton.jit(batch)).run

    def counted(self, *args, **kwargs):
        found.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(triton.jit(batch)), "run", counted)
    launches = {}
    for m in (4, 20):
        features = {f"m{i}": torch.randn(12, 4).half() for i in range(m + 1)}
        targets = torch.arange(12) % 3
        made = write_shelf(tmp_path / f"{m}", features, targets, list("abc"), {"train": 12})
        model = build_hub(made, range(m), 2, f"features:m{m}", aggregator="sum").to(DEVICE)
        model.executor = GroupedHeads("triton")
        place(model, DEVICE, free=2**40)
        config = TrainerConfig()
        optimizer = build_optimizer(model, pathway_groups(model, config), config)
        x = torch.arange(12).double().to(DEVICE)
        source = model._row_source(x, model.route(x))
        upstream = torch.ones(24, 3, device=DEVICE)
        with model.executor.updating(model.experts, optimizer):
            for _ in range(2):  # the second time nothing has to be made
                del found[:]
                with TorchLaunches(found):
                    outputs = model.executor(model.experts, source, 2)
                    outputs.backward(upstream)
                    optimizer.step()
            launches[m] = [name for name in found if not name.startswith("_record_function")]
    heads = ["_heads_forward", "_heads_backward", "_count_updates", "_update"]
    assert launches == {4: heads, 20: heads}
