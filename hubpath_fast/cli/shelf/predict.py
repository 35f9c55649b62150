"""``hubpath shelf predict``."""

from __future__ import annotations

from rich.markup import escape

from ..fit import Device
from ..messages import messages
from ..predict import (
    AnswersOut,
    Classes,
    Decoders,
    Images,
    answer,
    answer_in,
    end,
    find,
    one_line,
    say,
)
from .arguments import HubFolder, ShelfFolder


def predict(
    shelf: ShelfFolder,
    images: Images,
    hub: HubFolder = None,
    out: AnswersOut = None,
    classes: Classes = False,
    device: Device = "cpu",
    workers: Decoders = None,
) -> None:
    """Classify new images with a routed hub.

    Class and probability of each image, and which models were asked, with what weight. The router
    looks at all images; then each model that is asked is opened, run on its own images alone, and
    closed, so that one is in memory at a time. Answers come together, of as many images as 1 GiB
    holds. An image that cannot be read is named on stderr, and the others are answered;
    then the status is 1, or 2 if no image could be read.
    """
    with messages():
        from ...data.images import default_workers
        from ...recipes.answers import check_ending
        from ...recipes.shelf_predict import open_predictor, predict_each, sentence

        if classes and out is None:
            raise ValueError("classes: they are written to a file; give --out FILE, too")
        if out is not None:
            check_ending(out)
        opened, predictor = open_predictor(shelf, hub, device)
        found = find(images)
        workers = default_workers() if workers is None else workers
        predictions = predict_each(opened, predictor, found, workers)
        if out is None:
            done, broken = answer(predictions, len(found))
        else:
            columns = opened.labels, opened.shelf.classes if classes else ()
            done, broken = answer_in(out, columns, predictions, len(found))
        if done > broken:
            say(escape(one_line(sentence(predictor))))
        end(broken, done, "have no answer")
