"""One allocation for many tensors: they are as if each had been made by itself."""

import torch
from torch import nn

from hubpath_fast.executors.graphs.slab import ALIGNMENT, LARGE, Slab

CPU = torch.device("cpu")
LIKE = [
    torch.zeros(3, 5),
    torch.zeros(4, 6, 3, 3).contiguous(memory_format=torch.channels_last),
    torch.zeros(7, dtype=torch.bfloat16),
    torch.zeros(()),
    torch.zeros(0, 4),
    torch.zeros(5, 3).t(),
    torch.zeros(1).expand(9),
    torch.zeros(65, dtype=torch.bfloat16),
]


def test_shapes_dtypes_and_strides_are_those_of_empty_like():
    for found, like in zip(Slab(LIKE).new(CPU), LIKE, strict=True):
        expected = torch.empty_like(like)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.stride() == expected.stride()
        assert found.is_contiguous() == expected.is_contiguous()


def test_tensors_are_aligned_and_do_not_overlap():
    found = Slab(LIKE).new(CPU)
    first = {t.dtype: t.untyped_storage().data_ptr() for t in found}
    assert {(t.data_ptr() - first[t.dtype]) % ALIGNMENT for t in found if t.numel()} == {0}
    assert len({t.untyped_storage().data_ptr() for t in found}) == 2  # allocations
    for i, tensor in enumerate(found):
        tensor.fill_(i + 1)
    assert [bool((t == i + 1).all()) for i, t in enumerate(found)] == [True] * len(LIKE)


def test_each_call_gives_new_memory_and_none_of_it_for_nothing():
    slab = Slab(LIKE[:2])
    a, b = slab.new(CPU), slab.new(CPU)
    assert a[0].data_ptr() != b[0].data_ptr()
    assert Slab([]).new(CPU) == []


def test_a_large_tensor_has_memory_of_its_own_and_a_small_one_pins_no_more_than_small_ones():
    like = [torch.zeros(4), torch.zeros(LARGE // 4), torch.zeros(8)]
    small, large, other = Slab(like).new(CPU)
    assert large.untyped_storage().nbytes() == LARGE
    assert small.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 2 * ALIGNMENT


def test_a_change_of_one_is_no_change_of_another():
    a, b = Slab([torch.zeros(3), torch.zeros(3)]).new(CPU)
    weight = torch.ones(3, requires_grad=True)
    product = (weight * a.fill_(2)).sum()  # keeps a for the backward pass
    b.mul_(2)
    product.backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))


def test_autograd_takes_its_tensors_as_gradients_without_a_copy():
    class Filled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *leaves):
            ctx.slab = Slab(leaves)
            return leaves[0].sum()

        @staticmethod
        def backward(ctx, d_loss):
            given.extend(t.fill_(i) for i, t in enumerate(ctx.slab.new(CPU)))
            addresses.extend(t.data_ptr() for t in given)
            result = tuple(given)
            given.clear()
            return result

    given, addresses = [], []
    layers = [nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(2, 3)]
    leaves = [p for layer in layers for p in layer.parameters()]
    Filled.apply(*leaves).backward()
    assert [p.grad.data_ptr() for p in leaves] == addresses
    leaves[0].grad.mul_(2).add_(7)  # where gradients are recorded, too: as of any other
    leaves[1].grad.requires_grad_().sum().backward()
    for i, p in enumerate(leaves[1:], 1):
        assert torch.equal(p.grad, torch.full_like(p, i))
