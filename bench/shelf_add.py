"""A model joins a routed hub of a shelf that has none of its kind.

    python -m bench.shelf_add SHELF LABEL [LABEL ...] [--hub DIR]

LABEL: of a model of the shelf, "KIND-...", such as edges-resnet-0400 of the shelf of
``hubpath shelf demo``. For each, all experts of its kind are taken out of the hub, and the model is
added to the others: accuracy on test images of the whole hub, without the kind and with the
newcomer, the share of images that it gets, and by how much a probability of the others changed.
"""

from __future__ import annotations

import argparse

from hubpath_fast.shelf.add import add_model
from hubpath_fast.shelf.prune import answers_of, smaller
from hubpath_fast.shelf.save import open_hub_of


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shelf", metavar="SHELF")
    parser.add_argument("labels", metavar="LABEL", nargs="+")
    parser.add_argument("--hub", metavar="DIR", help="default: SHELF/hub")
    options = parser.parse_args(arguments)
    heads = "newcomer", "all experts", "without its kind", "accuracy", "with it", "gets", "moved"
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for label in options.labels:
        hub = open_hub_of(options.shelf, options.hub)
        answers = answers_of(hub, hub.shelf.splits["test"])
        scores = hub.task.scores(hub.task.predict(answers.predict()), answers.targets)
        whole = 100 * scores.mean().item()
        kind = label.partition("-")[0]
        others = tuple(i for i, own in enumerate(hub.labels) if own.partition("-")[0] != kind)
        less = smaller(hub, others)
        result, _ = add_model(less, hub.shelf.find(label))
        [group] = result["groups"]
        before, after, share = (100 * group[name] for name in ("before", "after", "share"))
        print(
            f"| {label} | {whole:.1f} | {len(others)} of {len(hub.labels)} | {before:.1f} | "
            f"{after:.1f} | {share:.1f} % | {result['unchanged']['largest_change']:.1g} |"
        )


if __name__ == "__main__":
    main()
