"""aggregate of maps, by the Triton kernels and row by row in torch, against the loop over experts.

Both make nothing of the rows' size beside the gradient of the rows, sum in float32 and round once,
so they are held to the same bounds.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hubpath_fast.kernels import _aggregate_maps, aggregate_with_exploit_loss
from hubpath_fast.kernels import aggregate as aggregate_in_triton
from support.aggregate_check import NAMES, check
from support.output_cases import (
    SMALL,
    Case,
    aggregate_reference,
    assert_within,
    double,
    leaves,
    loss_reference,
    make,
)
from torch import Tensor, nn

from bench.counting import allocated_peak
from hubpath_fast import HubPathway, HubPathwayLoss, LinearAggregator, _torch_ops
from hubpath_fast import functional as HF

MAPS = Case("odd maps 5x7: three tiles of 16, or one and three", n=4, c=5, c_out=3, trailing=(5, 7))
LAST = replace(MAPS, why="odd maps, channels last", channels_last=True)
CASES = [
    MAPS,
    LAST,
    Case("maps of 16 positions, the smallest of the kernel", n=5, c=5, trailing=(4, 4)),
    Case("sequences of 19", n=4, trailing=(19,)),
    Case("sequences of 70, channels last: two tiles", n=3, trailing=(70,), channels_last=True),
    Case("volumes", n=2, c=3, trailing=(3, 2, 4)),
    Case("C=130 > C_OUT: several tiles of one", n=2, c=130, c_out=5, trailing=(4, 5)),
    Case("C_OUT=70 > C: two tiles", n=2, c=3, c_out=70, trailing=(4, 5)),
    Case("C=1", n=3, c=1, c_out=1, trailing=(17,)),
    Case("single row", n=1, m=3, k=1, trailing=(4, 5)),
    Case("M=1, K=1", n=3, m=1, k=1, trailing=(4, 5)),
    Case("K=M", n=3, m=4, k=4, trailing=(4, 5)),
    Case("K=1", n=4, k=1, trailing=(4, 5)),
    Case("experts without rows", n=4, m=6, trailing=(4, 5), scores="gaps"),
    Case("the first experts without rows", n=4, m=7, k=3, trailing=(4, 5), scores="one"),
    Case("M=19, K=3", n=3, m=19, k=3, c=4, trailing=(4, 5)),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
both_layouts = pytest.mark.parametrize("case", [MAPS, LAST], ids=["contiguous", "last"])
half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])


def triton(tensors, inputs) -> Tensor:
    outputs, weights, matrix, bias = tensors
    return aggregate_in_triton(outputs, weights, inputs, matrix, bias)


def by_row(tensors, inputs) -> Tensor:
    """As ``functional`` calls it: autocast casts the matrix, and leaves the outputs."""
    outputs, weights, *linear = tensors
    if torch.is_autocast_enabled("cpu"):
        linear = [t.to(torch.get_autocast_dtype("cpu")) for t in linear]
    return _torch_ops.aggregate(outputs, weights, inputs, *linear, by_row=True)


FORMS = [triton, by_row]
forms = pytest.mark.parametrize("form", FORMS, ids=["triton", "torch"])


def place(form, device):
    return device if form is triton else torch.device("cpu")


@forms
@every_case
def test_matches_the_loop_in_float64(form, case, device):
    check(make(case, torch.float64, place(form, device)), form=form)


@forms
@every_case
def test_rounds_no_more_than_float32_has_to(form, case, device):
    check(make(case, torch.float32, place(form, device)), form=form)


@forms
@both_layouts
@half
def test_sums_in_float32_and_rounds_once(form, case, dtype, device):
    check(make(case, dtype, place(form, device)), form=form)


@forms
@both_layouts
@pytest.mark.parametrize("outputs", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_under_autocast_as_a_linear_layer(form, case, outputs, device):
    inputs = make(case, torch.float32, place(form, device))
    inputs.outputs = inputs.outputs.to(outputs)
    check(inputs, product=torch.bfloat16, autocast=True, form=form)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("trailing", [(3, 5), (4, 5), (16, 64)])
@pytest.mark.parametrize("m", [2, 5])
def test_autocasts_dtype_whatever_the_form(backend, trailing, m, device):
    """Small maps of few experts are concatenated, others are not; in bfloat16 all are."""
    inputs = make(replace(MAPS, n=2, m=m, c=8, c_out=8, trailing=trailing), torch.float32, device)
    clean = torch.linspace(-1, 1, 2 * m, device=device).view(2, m)
    routing = HF.noisy_topk(clean, clean, 2)
    matrix, bias = inputs.matrix, inputs.bias
    plain = HF.aggregate(inputs.outputs, routing, matrix, bias, backend="torch")
    with torch.autocast(device.type, torch.bfloat16):
        y = HF.aggregate(inputs.outputs, routing, matrix, bias, backend=backend)
    assert y.dtype == torch.bfloat16
    # Outputs, matrix, bias, their products (of a concatenation) and y are each rounded.
    terms = HF.aggregate(inputs.outputs.abs(), routing, matrix.abs(), bias.abs(), backend="torch")
    assert ((y.float() - plain).abs() <= 5 * 2.0**-7 * terms).all()


@both_layouts
def test_autocast_around_backward_changes_nothing(case):
    """What is computed in was decided forward."""
    inputs, found = make(case, torch.float32), []
    for enabled in (False, True):
        tensors = leaves(*inputs.sources)
        y = by_row(tensors, inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(y, tensors, inputs.d_y))
    assert all(map(torch.equal, *found))


def test_rounding_of_a_whole_map_in_float32():
    """A map of 64 x 64 with 98 channels: 1e-6 of the norm, as sums of 98 and of 4,096 products."""
    inputs = make(Case("", n=2, c=98, c_out=98, trailing=(64, 64)), torch.float32)
    tensors, exact = leaves(*inputs.sources), double(*inputs.sources)
    y, expected = by_row(tensors, inputs), aggregate_reference(*exact, inputs)
    found = torch.autograd.grad(y, tensors, inputs.d_y)
    wanted = torch.autograd.grad(expected, exact, inputs.d_y.double())
    for ours, right in zip((y, *found), (expected, *wanted), strict=True):
        assert (ours.double() - right).norm() <= 1e-6 * right.norm()


@forms
@both_layouts
@pytest.mark.parametrize("frozen", range(4), ids=NAMES)
def test_gradients_that_nobody_asked_for_are_not_made(form, case, frozen, device):
    inputs = make(case, torch.float64, place(form, device))
    tensors, exact = leaves(*inputs.sources), double(*inputs.sources)
    tensors[frozen].requires_grad_(False)
    form(tensors, inputs).backward(inputs.d_y)
    aggregate_reference(*exact, inputs).backward(inputs.d_y)
    assert tensors[frozen].grad is None
    for i in {0, 1, 2, 3} - {frozen}:
        assert_within(tensors[i].grad, exact[i].grad, 1e-13, NAMES[i])


@forms
@both_layouts
@pytest.mark.parametrize("asked", range(4), ids=NAMES)
def test_a_single_gradient(form, case, asked, device):
    inputs = make(case, torch.float64, place(form, device))
    tensors, exact = [t.detach() for t in inputs.sources], double(*inputs.sources)
    tensors[asked] = tensors[asked].requires_grad_()
    form(tensors, inputs).backward(inputs.d_y)
    aggregate_reference(*exact, inputs).backward(inputs.d_y)
    assert_within(tensors[asked].grad, exact[asked].grad, 1e-13, NAMES[asked])


@forms
def test_without_a_bias(form, device):
    inputs = make(MAPS, torch.float64, place(form, device))
    tensors, exact = leaves(*inputs.sources[:3]), double(*inputs.sources[:3])
    y, expected = form((*tensors, None), inputs), aggregate_reference(*exact, None, inputs)
    assert_within(y, expected, 1e-14, "y")
    wanted = torch.autograd.grad(expected, exact, inputs.d_y)
    for name, ours, right in zip(
        NAMES, torch.autograd.grad(y, tensors, inputs.d_y), wanted, strict=False
    ):
        assert_within(ours, right, 1e-13, name)


@forms
@both_layouts
def test_is_in_the_layout_of_the_outputs(form, case, device):
    inputs = make(case, torch.float32, place(form, device))
    tensors = leaves(*inputs.sources)
    y = form(tensors, inputs)
    (d_outputs,) = torch.autograd.grad(y, tensors[:1], inputs.d_y)
    for tensor in (y, d_outputs):
        seen = tensor.movedim(1, -1) if case.channels_last else tensor
        assert seen.is_contiguous()


def odd_layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of x [R, C, h, w] otherwise in memory."""
    wide = torch.cat([x, x + 1], dim=3)
    return {
        "a slice of wider maps": wide[..., : x.shape[3]],
        "every other channel": torch.stack([x, x + 1], dim=2).flatten(1, 2)[:, ::2],
        "transposed maps": x.transpose(2, 3).contiguous().transpose(2, 3),
        "rows behind channels": x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels between": x.transpose(1, 2).contiguous().transpose(1, 2),
    }


@forms
@pytest.mark.parametrize("name", odd_layouts(torch.zeros(2, 2, 2, 2)))
def test_outputs_and_gradients_of_other_layouts(form, name, device):
    """To the numbers, not the layout: in float64 other orders of sums are 1e-13 apart."""
    inputs = make(MAPS, torch.float64, place(form, device))
    exact, tensors = double(*inputs.sources), leaves(*inputs.sources)
    tensors[0] = odd_layouts(inputs.outputs)[name].requires_grad_()
    d_y = odd_layouts(inputs.d_y)[name]
    expected = aggregate_reference(*exact, inputs)
    y = form(tensors, inputs)
    assert_within(y, expected, 1e-13, "y")
    wanted = torch.autograd.grad(expected, exact, inputs.d_y)
    for label, ours, right in zip(NAMES, torch.autograd.grad(y, tensors, d_y), wanted, strict=True):
        assert_within(ours, right, 1e-12, label)


@forms
def test_the_gradient_of_a_sum(form, device):
    """Expanded from one number: no stride at all."""
    inputs = make(MAPS, torch.float64, place(form, device))
    tensors, exact = leaves(*inputs.sources), double(*inputs.sources)
    found = torch.autograd.grad(form(tensors, inputs).sum(), tensors)
    wanted = torch.autograd.grad(aggregate_reference(*exact, inputs).sum(), exact)
    for name, ours, right in zip(NAMES, found, wanted, strict=True):
        assert_within(ours, right, 1e-12, name)


@forms
@both_layouts
def test_repeats_are_bit_equal(form, case, device):
    results = []
    for _ in range(2):
        inputs = make(replace(case, n=7, c=37), torch.float32, place(form, device))
        tensors = leaves(*inputs.sources)
        y = form(tensors, inputs)
        results.append((y, *torch.autograd.grad(y, tensors, inputs.d_y)))
    assert all(map(torch.equal, *results))


@forms
def test_the_forward_keeps_nothing_but_its_inputs(form, device):
    inputs = make(MAPS, torch.float32, place(form, device))
    tensors, kept = leaves(*inputs.sources), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        form(tensors, inputs)
    given = {tensor.data_ptr() for tensor in (*tensors, *vars(inputs).values())}
    assert {tensor.data_ptr() for tensor in kept} <= given


@forms
def test_a_second_derivative_is_refused(form, device):
    inputs = make(MAPS, torch.float64, place(form, device))
    tensors = leaves(*inputs.sources)
    (d_outputs,) = torch.autograd.grad(
        form(tensors, inputs).square().sum(), tensors[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_outputs.sum().backward()


@both_layouts
def test_gradcheck(case):
    inputs = make(replace(case, n=2, c=2, c_out=2, trailing=(2, 2)), torch.float64)
    tensors = leaves(*inputs.sources)
    assert torch.autograd.gradcheck(lambda *t: by_row(t, inputs), tensors)


@both_layouts
def test_compiles_without_a_break_and_passes_opcheck(case):
    inputs = make(case, torch.float32)
    tensors = leaves(*inputs.sources)

    def function(*tensors):
        return by_row([tensor * 2 for tensor in tensors], inputs)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        y = call(*tensors)
        results.append((y, *torch.autograd.grad(y, tensors, inputs.d_y)))
    for eager, traced in zip(*results, strict=True):
        assert traced.stride() == eager.stride()
        assert torch.equal(traced, eager)

    values = [t.detach() for t in tensors]
    tables = inputs.experts, inputs.positions
    ops = torch.ops.hubpath_fast
    torch.library.opcheck(ops.cpu_map_aggregate.default, (*values, *tables))
    outputs, weights, matrix, _ = values
    for asked in ((True, True, True), (False, True, False), (True, False, False)):
        given = inputs.d_y, outputs, weights, matrix, *tables, *asked
        torch.library.opcheck(ops.cpu_map_aggregate_backward.default, given)


@both_layouts
@pytest.mark.parametrize("ops", ["triton", "torch"])
def test_in_one_node_with_the_exploit_loss(case, ops, device):
    """Classes at each position, and partial sums of the loss that another launch adds up."""
    inputs = make(replace(case, n=6), torch.float64, place(triton, device))
    inputs.target.view(-1)[0] = -100
    tensors, exact = leaves(*inputs.sources), double(*inputs.sources)
    outputs, weights, matrix, bias = tensors
    if ops == "triton":
        fused = aggregate_with_exploit_loss
    else:
        fused = _torch_ops.aggregate_with_exploit_loss
    y, loss = fused(outputs, weights, inputs, matrix, bias, inputs.target, 0.1, -100)
    gradients = torch.autograd.grad((y * inputs.d_y).sum() + 3 * loss, tensors)
    expected = aggregate_reference(*exact, inputs)
    wanted_loss = loss_reference(exact[0], inputs, 0.1)
    wanted = torch.autograd.grad((expected * inputs.d_y).sum() + 3 * wanted_loss, exact)
    assert_within(y, expected, 1e-13, "y")
    assert_within(loss, wanted_loss, 1e-13, "loss")
    for name, ours, right in zip(NAMES, gradients, wanted, strict=True):
        assert_within(ours, right, 1e-12, name)


def test_maps_are_one_launch_forward_and_two_backward(launches, device):
    inputs = make(MAPS, torch.float32, device)
    tensors = leaves(*inputs.sources)
    y = triton(tensors, inputs)
    assert launches == ["_sum_products"]
    y.backward(inputs.d_y)
    assert launches == ["_sum_products", "_backward_rows", "_backward_matrix"]


def test_small_maps_and_vectors_keep_the_form_for_vectors(launches, device):
    for trailing in ((), (3, 5)):
        assert not _aggregate_maps.adds_in_place(torch.empty(2, 3, *trailing))
    inputs = make(replace(SMALL, trailing=(3, 5)), torch.float32, device)
    aggregate_in_triton(*leaves(*inputs.sources[:2]), inputs, *inputs.sources[2:], grouped=True)
    assert launches == ["_products", "_sum_rows"]


def test_where_rows_are_multiplied_one_by_one():
    def preferred(c, *trailing, c_out=None):
        outputs = torch.empty(4, c, *trailing, device="meta")
        return _torch_ops.prefer_rows(outputs, torch.empty(c_out or c, 2 * c, device="meta"))

    assert preferred(98, 64, 64)
    assert preferred(29, 4096)
    assert not preferred(98)  # vectors
    assert not preferred(20000)
    assert not preferred(5, 16, 16)  # the calls outweigh the products
    assert not preferred(300, 8, 8)  # a block of the matrix outweighs a map
    assert not preferred(98, 16, 16, c_out=300)


ROOM = 1 << 18  # bytes of what is small: a sample's map in float32, blocks of the matrix


def large(dtype=torch.float32, channels_last=False):
    """N=8, M=3, K=2 and maps of 20 x 32 x 32: 1.25 MiB of rows in float32, 80 KiB a row."""
    case = Case("", n=8, m=3, c=20, c_out=20, trailing=(32, 32), channels_last=channels_last)
    inputs = make(case, dtype)
    clean = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    return inputs, HF.noisy_topk(clean, clean, 2)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_memory_is_that_of_y_and_the_gradient_of_the_rows(dtype, channels_last):
    inputs, routing = large(dtype, channels_last)
    outputs, _, matrix, bias = leaves(*inputs.sources)

    def forward():
        return HF.aggregate(outputs, routing, matrix, bias)

    def step():
        return torch.autograd.grad(forward(), (outputs, matrix, bias), inputs.d_y)

    with torch.no_grad():
        assert allocated_peak(forward) <= inputs.d_y.nbytes + ROOM
    assert allocated_peak(step) <= inputs.d_y.nbytes + outputs.nbytes + ROOM


def test_memory_under_autocast():
    """Rows in float32 are not cast as a whole: y is in bfloat16, the gradient in float32."""
    inputs, routing = large()
    outputs, _, matrix, bias = leaves(*inputs.sources)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            y = HF.aggregate(outputs, routing, matrix, bias)
        assert y.dtype == torch.bfloat16
        return torch.autograd.grad(y, (outputs, matrix, bias), y.detach())

    assert allocated_peak(step) <= inputs.d_y.nbytes // 2 + outputs.nbytes + ROOM


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_its_losses_keep_no_rows(training):
    """With a loss of the task that itself makes nothing of a map's size: beside the prediction
    there are the rows' gradients, of the prediction and of their own losses, and no third."""
    inputs, routing = large()
    outputs, targets = leaves(inputs.outputs)[0], inputs.d_y.mean(1)
    model = HubPathway([nn.Flatten()] * 3, nn.Flatten(), LinearAggregator(3, 20), num_outputs=20)
    model.train(training)
    model._executor = lambda _: lambda *_: outputs  # what its experts would give
    criterion = HubPathwayLoss(task_loss=lambda maps, y: maps.sum((1, 2, 3)) + y.sum((1, 2)))

    def step():
        out = model(torch.empty(8, 3), routing=routing)
        if not training:
            return out
        return torch.autograd.grad(criterion(out, targets).total, outputs)

    with torch.set_grad_enabled(training):
        peak = allocated_peak(step)
    assert peak <= inputs.d_y.nbytes + training * 2 * outputs.nbytes + ROOM
