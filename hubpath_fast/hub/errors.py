"""The one error of this layer: a hub that cannot be built, with all that is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence


class HubError(ValueError):
    """A hub, or the weights of one, cannot be built as asked.

    problems: one message each, so that a user mends a list of names in one go.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        if len(problems) == 1:
            message = problems[0]
        else:
            lines = [f"  {i}. {problem}" for i, problem in enumerate(problems, start=1)]
            message = "\n".join([f"the hub has {len(problems)} problems:", *lines])
        super().__init__(message)
