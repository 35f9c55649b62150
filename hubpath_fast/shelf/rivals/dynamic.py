"""DESlib's dynamic selection of an ensemble: KNORA-E and META-DES, as they are in DESlib.

DESlib gives every classifier of its pool the same X, and looks for neighbours in it. Here X is the
number of an image, one column: the pool looks up what the heads said of it, and ``Neighbours``
compares what a router looks at. The selection set is the validation images; probabilities are
averaged over the models that are selected (DESlib's voting="soft"), since the heads' are fitted by
their likelihood. The number of neighbours is that with the best accuracy in cross-validation over
the validation images, and what is said of those is said without them. It is not the log-loss that
decides, since models are selected by where they are right: on the digits' shelf that would cost
KNORA-E about a point of accuracy.

Letters: n images, M models, C classes.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from deslib.des.knora_e import KNORAE
from deslib.des.meta_des import METADES
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_X_y
from torch import Tensor

from .problem import Answer, CannotRun, Look, Problem, folds, score

FOLDS = 5
NEIGHBOURS = (5, 7, 11, 20, 40)  # 7 is DESlib's own
PROFILES = 5  # DESlib's own number of similar output profiles, for META-DES
AT_ONCE = 512  # images, whose probabilities by all models DESlib holds at a time, as float64
# Outputs of META-DES's pool on the validation images, n * M * C: it compares them as profiles, one
# image to each, and does so for each fold and number of neighbours. 256 models of 100 classes and
# 600 images, which are half as many, take half a minute on one thread.
MOST_OUTPUTS = 2**25


class Given(ClassifierMixin, BaseEstimator):
    """A fitted classifier of DESlib's pool: probabilities [n, C] by the number of an image."""

    def __init__(self, probabilities: np.ndarray):
        self.probabilities = probabilities
        self.classes_ = np.arange(probabilities.shape[1])

    def fit(self, X: np.ndarray, y: np.ndarray) -> Given:
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return self.probabilities[X[:, 0].astype(np.int64)]

    def predict(self, X: np.ndarray) -> np.ndarray:
        return self.predict_proba(X).argmax(1)


class Neighbours:
    """The nearest of given rows: by what ``vectors`` [n, F] say of an image, where a row is its
    number, a single column; else by the row itself, which is a profile of the pool's outputs."""

    def __init__(self, vectors: np.ndarray, n_neighbors: int):
        self.vectors, self.n_neighbors = vectors, n_neighbors

    def fit(self, X: np.ndarray, y: np.ndarray) -> Neighbours:
        self.seen = self._rows(X)
        return self

    def kneighbors(
        self, X: np.ndarray, n_neighbors: int | None = None, return_distance: bool = True
    ) -> Any:
        distances = torch.cdist(self._rows(X), self.seen)
        found = distances.sort(dim=1, stable=True)
        count = n_neighbors or self.n_neighbors
        numbers = found.indices[:, :count].numpy()
        return (found.values[:, :count].numpy(), numbers) if return_distance else numbers

    def _rows(self, X: np.ndarray) -> Tensor:
        rows = self.vectors[X[:, 0].astype(np.int64)] if X.shape[1] == 1 else X
        return torch.from_numpy(np.ascontiguousarray(rows))


class OfNumbers:
    """What DESlib 0.3.7 lacks: scikit-learn from 1.7 on has no ``_validate_data``, and a class that
    the selection set has no image of is an error there."""

    def _validate_data(self, X: np.ndarray, y: np.ndarray, **_: Any) -> tuple[Any, Any]:
        return check_X_y(X, y, dtype=np.float64)

    def _setup_label_encoder(self, y: np.ndarray) -> None:
        super()._setup_label_encoder(self.pool_classifiers_[0].classes_)


class Knorae(OfNumbers, KNORAE):
    needs_all = False

    def selected(self, numbers: np.ndarray) -> np.ndarray:
        """bool [n, M]: those that are right on the most of the nearest images, up to the first on
        which they are not. It takes no outputs of the pool, so no other has to run."""
        _, near = self.get_competence_region(numbers)
        return self.select(self.estimate_competence(near))

    def of_selected(self, numbers: np.ndarray) -> np.ndarray:
        """Probabilities [n, C]: ``predict_proba`` averages over all models where all agree, which
        would have them all run; the class is the same."""
        probabilities = self._predict_proba_base(numbers)
        distances, near = self.get_competence_region(numbers)
        return np.asarray(
            self.predict_proba_with_ds(probabilities.argmax(2), probabilities, near, distances)
        )


class Metades(OfNumbers, METADES):
    """The competence of a model is estimated from its own output and the outputs of all, so all of
    them run for every image, however few are selected."""

    needs_all = True

    def of_selected(self, numbers: np.ndarray) -> np.ndarray:
        return np.asarray(self.predict_proba(numbers))


METHODS = {"knora_e": Knorae, "meta_des": Metades}


def dynamic(problem: Problem, name: str, look: Look) -> Answer:
    """name: of ``METHODS``. Raises CannotRun for too few models or images, or none to learn by."""
    pool = Pool(problem, look)
    pool.check(name)
    parts = folds(pool.validation, FOLDS, problem.seed)
    targets = problem.targets["validation"]
    smallest = pool.validation - max(map(len, parts))
    counts = [count for count in NEIGHBOURS if count < smallest]
    best = None
    for count in counts:
        found = torch.zeros(len(targets), problem.log_probs["validation"].shape[2])
        for part in parts:
            seen = np.setdiff1d(np.arange(pool.validation), part.numpy())
            found[part] = pool.answer(pool.fit(name, count, seen), part.numpy())
        scored = score(found, targets)
        worth = scored["accuracy"], -scored["loss"]
        if best is None or worth > best[0]:
            best = worth, count, found
    _, count, found = best
    model = pool.fit(name, count, np.arange(pool.validation))
    probabilities = {"validation": found}
    scored = np.arange(pool.validation)
    if problem.split == "test":
        scored = np.arange(pool.validation, pool.images)
        probabilities["test"] = pool.answer(model, scored)
    kept = torch.ones(len(problem.labels))
    asked = kept.expand(len(scored), -1)
    if not model.needs_all:
        asked = torch.from_numpy(model.selected(column(scored))).float()
        if look.model is not None:
            asked[:, look.model] = 1.0
    return Answer(probabilities, asked, kept, {"look": look.title, "neighbours": count})


class Pool:
    """The heads as DESlib's pool of classifiers, on validation images and then those scored."""

    def __init__(self, problem: Problem, look: Look):
        splits = problem.splits
        log_probs = torch.cat([problem.log_probs[split] for split in splits], 1)
        self.heads = [Given(head.exp().numpy()) for head in log_probs]
        vectors = torch.cat([look.vectors[split] for split in splits]).double()
        self.validation, self.images = len(problem.targets["validation"]), len(vectors)
        vectors = vectors - vectors[: self.validation].mean(0)
        # Euclidean distances of unit vectors are in the order of their cosines.
        self.vectors = torch.nn.functional.normalize(vectors, dim=1).numpy()
        self.targets = problem.targets["validation"].numpy()
        self.seed = problem.seed

    def check(self, name: str) -> None:
        """Raises CannotRun for too few models or images, or more than is bearable."""
        if len(self.heads) < 2:
            raise CannotRun("DESlib needs at least 2 models")
        fewest = -(-(max(PROFILES, NEIGHBOURS[0]) + 2) * FOLDS // (FOLDS - 1))
        if self.validation < fewest:
            raise CannotRun(
                f"DESlib needs at least {fewest} validation images, got {self.validation}"
            )
        outputs = self.validation * sum(head.probabilities.shape[1] for head in self.heads)
        if name == "meta_des" and outputs > MOST_OUTPUTS:
            raise CannotRun(
                f"META-DES would take too long: {self.validation} validation images, "
                f"{len(self.heads)} models and their classes make {outputs:,} outputs, and "
                f"{MOST_OUTPUTS:,} are tried"
            )

    def fit(self, name: str, count: int, numbers: np.ndarray) -> Any:
        """count: of neighbours. numbers: of the validation images to select by. Raises CannotRun
        for META-DES where heads are right about all of them, or about none."""
        model = METHODS[name](
            self.heads,
            k=count,
            knn_classifier=functools.partial(Neighbours, self.vectors),
            voting="soft",
            n_jobs=1,
            random_state=self.seed,
        )
        model.fit(column(numbers), self.targets[numbers])
        if name == "meta_des" and len(np.unique(model.DSEL_processed_)) == 1:
            raise CannotRun(
                "META-DES learns when heads are right and when wrong, and on the validation images "
                "all are the same"
            )
        return model

    def answer(self, model: Any, numbers: np.ndarray) -> Tensor:
        """Probabilities [n, C] of images by their numbers."""
        parts = [numbers[i : i + AT_ONCE] for i in range(0, len(numbers), AT_ONCE)]
        found = np.concatenate([model.of_selected(column(part)) for part in parts])
        return torch.from_numpy(found).float()


def column(numbers: np.ndarray) -> np.ndarray:
    """As DESlib's X: float64 [n, 1]."""
    return numbers.astype(np.float64)[:, None]
