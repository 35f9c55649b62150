"""Batches copied in advance: their order and the streams' order, without a GPU by stand-ins."""

from __future__ import annotations

import contextlib
from itertools import islice

import pytest
import torch

from hubpath_fast.data import DataError, EvalBatches, ImageDataset, TrainStream, images, open_images
from hubpath_fast.data.prefetch import CudaCopier, prefetched
from hubpath_fast.data.transforms import eval_transform


class FakeCopier:
    def __init__(self, log):
        self.log = log

    def start(self, batch):
        self.log.append(("start", batch))
        return batch

    def finish(self, copy):
        self.log.append(("finish", copy))
        return copy


def test_each_batch_is_copied_before_the_one_in_front_is_handed_out():
    log = []
    for batch in prefetched(iter("abc"), FakeCopier(log)):
        log.append(("used", batch))
    assert log == [
        ("start", "a"), ("start", "b"), ("finish", "a"), ("used", "a"),
        ("start", "c"), ("finish", "b"), ("used", "b"), ("finish", "c"), ("used", "c"),
    ]  # fmt: skip
    assert list(prefetched([], FakeCopier(log))) == []
    assert list(prefetched(["a"], FakeCopier(log))) == ["a"]


class FakeTensor:
    """What a copier calls of a tensor, noted with the stream that is current."""

    def __init__(self, name, cuda):
        self.name, self.cuda = name, cuda

    def to(self, device, non_blocking):
        assert (str(device), non_blocking) == ("cuda:1", True)
        self.cuda.log.append(f"copy {self.name} on {self.cuda.current}")
        return self

    def record_stream(self, stream):
        self.cuda.log.append(f"mark {self.name} for {stream.name}")


class FakeCuda:
    """Streams that note what is queued on them."""

    def __init__(self, monkeypatch):
        self.log, self.current, cuda = [], "main", self

        class Stream:
            def __init__(self, device=None, name="copies"):
                self.name, self.events = name, 0

            def record_event(self):
                self.events += 1
                cuda.log.append(f"event {self.events} on {self.name}")
                return self.events

            def wait_event(self, event):
                cuda.log.append(f"{self.name} waits for event {event}")

        @contextlib.contextmanager
        def stream(chosen):
            before, self.current = self.current, chosen.name
            yield
            self.current = before

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device: Stream(device, self.current)
        )


def test_the_current_stream_waits_for_the_copy_it_uses_and_not_for_the_next(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    copier = CudaCopier("cuda:1")
    batches = [(FakeTensor(f"x{i}", cuda), FakeTensor(f"y{i}", cuda)) for i in range(2)]
    assert next(prefetched(batches, copier)) == batches[0]
    assert cuda.log == [
        "copy x0 on copies", "copy y0 on copies", "event 1 on copies",
        "copy x1 on copies", "copy y1 on copies", "event 2 on copies",
        "main waits for event 1", "mark x0 for main", "mark y0 for main",
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_and_evaluations_give_the_same_through_a_copier(animals, monkeypatch, workers):
    dataset = ImageDataset(open_images(animals, validation=0.25).train, eval_transform(16))

    def batches():
        stream = TrainStream(dataset, 4, seed=1, workers=workers).batches(2)
        evaluation = EvalBatches(dataset, 4, workers)
        taken = [*islice(stream, 3), *evaluation, *evaluation]
        stream.close()
        return taken

    plain, log = batches(), []
    monkeypatch.setattr(images, "_copier", lambda device: FakeCopier(log))
    for (x, y), (same_x, same_y) in zip(plain, batches(), strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)
    # Of the endless stream one batch more was started than handed out.
    assert [kind for kind, _ in log].count("start") == len(plain) + 1


@pytest.mark.parametrize("copier", [None, FakeCopier([])], ids=["plain", "copier"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_is_named(animals, monkeypatch, workers, copier):
    splits = open_images(animals, validation=0.25)
    splits.train.paths[-1].write_text("overwritten while training")
    monkeypatch.setattr(images, "_copier", lambda device: copier)
    batches = iter(EvalBatches(ImageDataset(splits.train, eval_transform(16)), 4, workers))
    whole = (len(splits.train) - 1) // 4
    assert len(list(islice(batches, whole))) == whole
    with pytest.raises(
        DataError, match=rf"^cannot read the image {splits.train.paths[-1]} \(no image file\)$"
    ):
        next(batches)


@pytest.mark.gpu
def test_copies_are_right_while_the_gpu_computes(animals):
    dataset = ImageDataset(open_images(animals, validation=0.25).train, eval_transform(64))
    expected = list(islice(TrainStream(dataset, 8, seed=1).batches(), 30))
    a = torch.rand(2048, 2048, device="cuda")
    sums = []
    for x, y in islice(TrainStream(dataset, 8, seed=1, device="cuda").batches(), 30):
        assert x.is_cuda
        for _ in range(5):  # keeps the current stream behind, while x and y are dropped early
            a = (a @ a).softmax(dim=1)
        sums.append((x.long().sum(), y.sum()))
    torch.cuda.synchronize()
    for (x, y), (sum_x, sum_y) in zip(expected, sums, strict=True):
        assert (x.long().sum().item(), y.sum().item()) == (sum_x.item(), sum_y.item())
