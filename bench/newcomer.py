"""A sixth network joins a trained hub: the digits in a rendering that the hub has never seen.

    python -m bench.newcomer newcomer-out

Six small networks are pre-trained, each on one rendering of 700 digits. Five of them become a hub,
trained on 240 others in the five renderings that these know; then `hubpath add` adds the one that
knows striped digits. 75 striped digits that it was not fitted on, and the run's test split, say
what it is worth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

import hubpath_fast as hp
from hubpath_fast.cli.add import table
from hubpath_fast.compare.digits_hub import NETWORKS, DigitsHub, Pretraining
from hubpath_fast.data import DigitsTask
from hubpath_fast.recipes.add import add
from hubpath_fast.recipes.fit import fit
from hubpath_fast.runs.config import FitConfig

SIXTH = "striped"

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("out", type=Path)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--epochs", type=int, default=40, help="of pre-training a network")
parser.add_argument("--steps", type=int, default=400, help="of training the hub")
args = parser.parse_args()
console, digits = Console(), DigitsTask(args.seed, num_validation=60)


def weights(hub: DigitsHub, index: int) -> str:
    """The name of a pre-trained network: a file of weights, and what it is."""
    member = hub.members[index]
    file = args.out / f"{member.rendering}.safetensors"
    if not file.exists():
        console.print(f"pre-training {member.network} on {member.rendering} digits")
        save_file(hub.pretrain(index)[0], file)
    return f"file/{file}?arch=timm/{member.network}"


args.out.mkdir(parents=True, exist_ok=True)
how = Pretraining(epochs=args.epochs)
five = DigitsHub(digits, how, NETWORKS, args.out)
sixth = DigitsHub(digits, how, NETWORKS[:1], args.out, SIXTH)
config = FitConfig.from_dict(
    {
        "dataset": "digits",
        "hub": [weights(five, i) for i in range(5)],
        "image_size": digits.size,
        "trainer": {"steps": args.steps, "seed": args.seed, "lr_expert": 5e-4},
        "workers": 0,
    }
)
fit(config, args.out / "run", False, console)

# Of the digits that the hub is trained and chosen on, so that its test digits are new to all.
striped, folder = DigitsTask(args.seed).rendered("target", SIXTH), args.out / SIXTH
for i in range(len(striped)):
    place = folder / striped.classes[striped.targets[i]]
    place.mkdir(parents=True, exist_ok=True)
    Image.fromarray(striped.images[i, 0].numpy()).save(place / f"{i}.png")
result = add(args.out / "run", weights(sixth, 0), args.out / "hub", folder, tell=console.print)
console.print(table(result))
console.print(result["unchanged"], result["seconds"])
print(hp.from_pretrained(args.out / "hub").origin.labels)
